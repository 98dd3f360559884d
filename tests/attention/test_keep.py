"""Attention under gradient checkpointing that keeps its outputs: it runs once, its gradients are
the same, and nothing stays in memory but what it says."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from longgen.attention import attention
from longgen.attention.keep import is_keeping, keep_attention
from longgen.layout import Layout, Run
from longgen.pattern import SparsePattern

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 200, 4, 2, 8
WIDTH = HEADS * HEAD_DIM
WINDOW = SparsePattern(block_size=16, sink_blocks=1, local_blocks=2)
STRIDED = SparsePattern.block_sparse(block_size=8, stride_blocks=5, local_blocks=2, head_shift=2)
PACKED = Layout.of_rows(((Run(0, 0, 90), Run(1, 0, 110)),))
CASES = {
    "window": dict(pattern=WINDOW),
    "strided": dict(pattern=STRIDED),
    "full": dict(),
    "packed": dict(pattern=WINDOW, layout=PACKED),
    "reference": dict(pattern=STRIDED, layout=PACKED, impl="reference"),
    "lse": dict(pattern=WINDOW, return_lse=True),
}


class Kernels(TorchDispatchMode):
    """Count the attention kernels that run, and their backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "attention" in function.__name__:
            self.backward += "backward" in function.__name__
            self.forward += "backward" not in function.__name__
        return function(*args, **(kwargs or {}))


def draw_weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(WIDTH, WIDTH, generator=generator).requires_grad_() for _ in range(4)]


def draw_input() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, LENGTH, WIDTH, generator=generator).requires_grad_()


def layer(
    x: torch.Tensor, weights: list[torch.Tensor], case: dict[str, Any], slices: bool = False
) -> torch.Tensor:
    """Be a decoder layer: projections, attention, and something behind it that is recomputed."""
    if slices:
        # All three in one memory, as an exchange between processes leaves them.
        q, k, v = torch.tanh(x @ torch.cat([w / WIDTH**0.5 for w in weights[:3]], 1)).chunk(3, -1)
    else:
        q, k, v = (torch.tanh(x @ w / WIDTH**0.5) for w in weights[:3])
    q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)) for t in (q, k, v))
    out = attention(q, k[:, :, :KV_HEADS], v[:, :, :KV_HEADS], **case)
    if case.get("return_lse"):
        out, lse = out
        out = out * torch.sigmoid(lse).transpose(1, 2)[..., None]
    return x + torch.tanh(out.flatten(2) @ weights[3])


def run(
    case: dict[str, Any], context: Callable[..., Any] | None, slices: bool = False, passes: int = 1
) -> tuple[list[torch.Tensor], Kernels]:
    """Return the gradients of two layers, checkpointed under a context, and the kernels run."""
    weights, x = draw_weights(), draw_input()
    options = {"context_fn": context} if context else {}
    with Kernels() as kernels:
        hidden = x
        for _ in range(2):
            hidden = checkpoint(
                layer, hidden, weights, case, slices, use_reentrant=False, **options
            )
        for number in range(passes):
            hidden.square().sum().backward(retain_graph=number + 1 < passes)
    grads = [leaf.grad for leaf in (x, *weights)]
    assert all(grad is not None for grad in grads)
    return [grad for grad in grads if grad is not None], kernels


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("slices", [False, True], ids=["", "slices"])
@pytest.mark.parametrize("name", CASES)
def test_attention_runs_once_and_gradients_are_the_same(name: str, slices: bool) -> None:
    expected, twice = run(CASES[name], None, slices)
    found, once = run(CASES[name], keep_attention, slices)
    assert_equal(found, expected)
    if name != "reference":
        # Plain checkpointing attends again; that is what is saved.
        assert once.backward == once.forward == twice.backward > 0
        assert twice.forward == 2 * twice.backward


def test_bf16_is_kept_as_well() -> None:
    case = dict(pattern=WINDOW)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = run(case, None)
        found, kernels = run(case, keep_attention)
    assert_equal(found, expected)
    assert kernels.forward == kernels.backward > 0


def test_the_backward_pass_can_be_done_again() -> None:
    expected, _ = run(CASES["window"], None, passes=2)
    found, kernels = run(CASES["window"], keep_attention, passes=2)
    assert_equal(found, expected)
    assert kernels.backward == 2 * kernels.forward


def test_what_is_kept_can_be_held_elsewhere() -> None:
    """Where memory is given back at once, an address comes to hold several tensors."""
    held: list[torch.Size] = []

    def hold(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        held.append(tensor.shape)
        copy = tensor.clone()
        return lambda: copy.clone()

    for name in CASES:
        expected, _ = run(CASES[name], None)
        found, _ = run(CASES[name], partial(keep_attention, hold))
        assert_equal(found, expected)
    assert torch.Size([1, LENGTH, HEADS, HEAD_DIM]) in held


def test_only_outputs_and_log_sum_exps_stay() -> None:
    """Full attention is one kernel: of all that it saves, queries, keys and values go."""
    kept: list[tuple[torch.Size, int]] = []

    def hold(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        kept.append((tensor.shape, tensor.numel()))
        return lambda: tensor

    run({}, partial(keep_attention, hold))
    outputs = [numel for _, numel in kept if numel == LENGTH * WIDTH]
    others = [numel for _, numel in kept if numel != LENGTH * WIDTH]
    # Of each layer the output, in the kernel's order of dimensions and in ours.
    assert len(outputs) <= 4 and all(numel <= HEADS * LENGTH for numel in others)


def test_nothing_is_left_after_the_backward_pass() -> None:
    outputs: list[Any] = []

    def hold(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        outputs.append(weakref.ref(tensor))
        return lambda: tensor

    gc.collect()
    gc.disable()
    try:
        run(CASES["window"], partial(keep_attention, hold))
        # No cycle that the collector would have to find.
        assert outputs and all(reference() is None for reference in outputs)
    finally:
        gc.enable()


def test_frozen_layers_and_inference_attend_as_ever() -> None:
    frozen = [w.detach() for w in draw_weights()]
    x = draw_input()
    with torch.no_grad():
        expected = layer(x, frozen, CASES["window"])
        found = checkpoint(
            layer, x, frozen, CASES["window"], use_reentrant=False, context_fn=keep_attention
        )
    assert torch.equal(found, expected)
    out = checkpoint(
        layer, x, frozen, CASES["window"], use_reentrant=False, context_fn=keep_attention
    )
    out.sum().backward()
    assert x.grad is not None and not is_keeping()
