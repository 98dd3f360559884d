"""Training on NVIDIA GPUs: sequences and model shared by two over NCCL equal one, and what layers
keep for the backward pass changes no gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longgen.attention import api, attention
from longgen.attention.flash import flash_obstacle
from longgen.attention.keep import keep_attention
from longgen.checkpoint import load_model
from longgen.hf.head import fused_loss, liger_loss, linear_cross_entropy
from longgen.layout import Layout, Run
from longgen.pattern import SparsePattern
from longgen.train.config import ExtendConfig
from longgen.train.recompute import to_host
from tests.processes import run_groups, run_processes
from tests.train.extending import extend_twice
from tests.train.work import Training, make_model, train_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

WINDOW = SparsePattern(block_size=64, sink_blocks=1, local_blocks=4)
STRIDED = SparsePattern.block_sparse(block_size=64, stride_blocks=3, local_blocks=2, head_shift=1)
FULL = SparsePattern.full()


def on_gpu(pattern: SparsePattern, **changes: Any) -> Training:
    """Return a run of sequences of 2,048 tokens, with heads that every kernel takes."""
    run = Training(pattern, (4, 2), packed=True, context=2048, head_dim=64, device="cuda")
    return replace(run, **changes)


# In fp32 FlexAttention runs (and PyTorch's own kernel for whole documents), in bf16 what is fastest
# here: FlashAttention-4's kernels on a Hopper GPU with the extra `flash`.
RUNS = {
    "window": on_gpu(WINDOW, recompute="full"),
    "window-kept": on_gpu(WINDOW, recompute="selective"),
    "strided-host": on_gpu(STRIDED, recompute="selective", offload=True, packed=False),
    "tied": on_gpu(WINDOW, tied=True),
    "bf16": on_gpu(WINDOW, recompute="selective", bf16=True),
    "bf16-products": on_gpu(WINDOW, recompute="elementwise", bf16=True),
    "bf16-strided": on_gpu(STRIDED, recompute="full", bf16=True, packed=False),
    "bf16-flex": on_gpu(STRIDED, recompute="selective", bf16=True, attention="longgen_flex"),
}
SHARED = (
    ("window", 2, "ddp"),
    ("window", 1, "fsdp"),
    ("window-kept", 2, "fsdp"),
    ("strided-host", 2, "fsdp"),
    ("tied", 2, "fsdp"),
    ("bf16", 2, "fsdp"),
    ("bf16-products", 2, "fsdp"),
    ("bf16-products", 1, "ddp"),
    ("bf16-strided", 2, "fsdp"),
    ("bf16-flex", 1, "fsdp"),
)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_equal_one() -> None:
    names = list(RUNS)
    jobs = [(RUNS[name], 1, "none") for name in names]
    alone = dict(zip(names, run_groups(1, train_all, jobs, at_once=4)[0], strict=True))
    jobs = [(RUNS[name], size, sharding) for name, size, sharding in SHARED]
    ranks = run_groups(2, train_all, jobs, at_once=4)
    for index, (name, size, sharding) in enumerate(SHARED):
        case, bf16 = (name, size, sharding), RUNS[name].bf16
        expected, found = alone[name], ranks[0][index]
        assert ranks[1][index]["logged"] == found["logged"], case
        for one, other in zip(expected["logged"], found["logged"], strict=True):
            # In bf16 activations are rounded to 2 ** -8, after other sums.
            assert other[0] == pytest.approx(one[0], rel=1e-2 if bf16 else 1e-5), case
        before = make_model(RUNS[name]).state_dict()
        for key, weight in expected["weights"].items():
            assert np.array_equal(found["weights"][key], ranks[1][index]["weights"][key]), case
            way, other = (w - before[key].numpy() for w in (weight, found["weights"][key]))
            assert np.abs(way).max() > 0, (case, key)
            if not bf16:
                # Gradients to a thousandth; weights themselves are rounded to fp32 at each step.
                bound = 1e-3 * np.abs(way).max() + 1e-6 * np.abs(weight).max()
                assert np.abs(way - other).max() <= bound, (case, key)
            elif weight.ndim == 2:
                cosine = (way * other).sum() / np.sqrt((way**2).sum() * (other**2).sum())
                assert cosine > 0.98, (case, key, cosine)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_a_run_on_two_gpus_is_interrupted_and_resumed(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """`longgen extend` as it is: compiled, in bf16, with checkpoints of both GPUs' parts."""
    base = make_checkpoint(
        tmp_path / "base", hidden_size=256, head_dim=64, tie_word_embeddings=True
    )
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i}: the river runs past {i * i} mills.\n" for i in range(3000)))
    whole, stopped = (
        ExtendConfig(
            model=str(base),
            out=str(tmp_path / name),
            context=2048,
            data=(str(text),),
            layers="SFS",
            pattern=WINDOW.to_dict(),
            steps=6,
            batch_tokens=4096,
            learning_rate=1e-3,
            warmup_steps=2,
            context_parallel=2,
            gradient_checkpointing="selective",
        )
        for name in ("whole", "stopped")
    )
    results = run_processes(2, extend_twice, whole, stopped, on_gpus=True)
    for result in results:
        assert [record["finished"] for record in result["records"]] == [True, False, True]
        assert result["records"][0]["training"]["sharding"] == "fsdp"
    losses = [
        [json.loads(line)["loss"] for line in (Path(config.out) / "training/log.jsonl").open()]
        for config in (whole, stopped)
    ]
    assert len(losses[0]) == 6 and losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    model = load_model(stopped.out, dtype="auto")
    assert model.config.layer_plan.layers == "SFS"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def gradients(
    dtype: torch.dtype, impl: str, pattern: SparsePattern, layout: Layout, context: Any
) -> tuple[list[torch.Tensor], int]:
    """Return the gradients of a checkpointed layer, and how often it attended."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32)
        return (values / shape[0] ** 0.5).to(dtype).requires_grad_()

    x = torch.randn(1, 2048, 256, generator=generator, device="cuda").to(dtype).requires_grad_()
    weights = [draw(256, 256), draw(256, 128), draw(256, 128), draw(256, 256)]
    calls = 0

    def layer(x: torch.Tensor) -> torch.Tensor:
        q, k, v = ((x @ w).unflatten(-1, (-1, 64)) for w in weights[:3])
        out = attention(q, k, v, pattern=pattern, layout=layout, impl=impl)
        return x + torch.tanh(out.flatten(2) @ weights[3])

    def counting(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    options = {"context_fn": context} if context else {}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in list(api._MASKED.items()):
            patch.setitem(api._MASKED, name, counting(function))
        patch.setattr(api, "dense_attention", counting(api.dense_attention))
        out = checkpoint(layer, x, use_reentrant=False, **options)
        out.float().square().sum().backward()
    torch.cuda.synchronize()
    return [leaf.grad for leaf in (x, *weights)], calls


@pytest.mark.parametrize("offload", [False, True], ids=["", "host"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("pattern", [WINDOW, STRIDED, FULL], ids=["window", "strided", "full"])
@pytest.mark.parametrize("impl", ["flash", "flex", "auto"])
def test_kept_attention_runs_once(
    impl: str, pattern: SparsePattern, packed: bool, offload: bool
) -> None:
    if impl == "flash":
        query = torch.empty(1, 1, 4, 64, device="cuda", dtype=torch.bfloat16)
        obstacle = flash_obstacle(query, gradients=True)
        if obstacle:
            pytest.skip(obstacle)
    layout = Layout.causal(2048, 2048)
    if packed:
        layout = Layout.of_rows(((Run(0, 0, 700), Run(1, 0, 1348)),))
    case = (torch.bfloat16, impl, pattern, layout)
    expected, twice = gradients(*case, None)
    keep = (
        partial(keep_attention, partial(to_host, smallest_bytes=0)) if offload else keep_attention
    )
    found, once = gradients(*case, keep)
    assert (twice, once) == (2, 1)
    for one, other in zip(found, expected, strict=True):
        # The flash backward pass adds up in no fixed order, in fp32, and rounds to bf16.
        assert (one - other).abs().max() <= 2**-6 * other.abs().max()


def test_kept_attention_holds_outputs_alone() -> None:
    """Between forward and backward a kept layer holds little more than a checkpointed one: the
    output, and fp32 log-sum-exps."""
    held = {}
    tokens, heads, size = 65536, 8, 128

    def layer(x: torch.Tensor) -> torch.Tensor:
        q = x.view(1, tokens, heads, size) * 2
        return attention(q, q * 2, q * 3, pattern=WINDOW).flatten(2)

    for name, options in (("full", {}), ("selective", {"context_fn": keep_attention})):
        for _ in range(2):
            x = torch.randn(1, tokens, heads * size, device="cuda", dtype=torch.bfloat16)
            x.requires_grad_()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            out = checkpoint(layer, x, use_reentrant=False, **options)
            loss = out.float().mean()
            del out
            held[name] = torch.cuda.memory_allocated() - before
            loss.backward()
            del x, loss
    output = tokens * heads * size * 2
    # Block lists may be made and cached on the first pass; 5 % for the allocator's rounding.
    assert held["selective"] - held["full"] <= 1.05 * (output + tokens * heads * 4)


def test_what_goes_to_the_host_leaves_the_gpu_and_comes_back() -> None:
    tensor = torch.randn(64, 1 << 20, device="cuda").transpose(0, 1)
    expected = tensor.cpu()
    before = torch.cuda.memory_allocated()
    back = to_host(tensor)
    del tensor
    torch.cuda.synchronize()
    # The allocator looks what other streams are done with when it is next asked.
    torch.empty(1 << 20, device="cuda")
    assert torch.cuda.memory_allocated() <= before - expected.nbytes
    # What then lies in its memory must not come back instead.
    torch.full((64 << 20,), float("nan"), device="cuda")
    assert torch.equal(back().cpu(), expected) and back().stride() == expected.stride()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_ligers_loss_is_the_chunked_one(mode: str, bias: bool) -> None:
    pytest.importorskip("liger_kernel")
    assert liger_loss() is not None
    generator = torch.Generator("cuda").manual_seed(0)
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    shapes = [(4096, 256), (32000, 256), *[(32000,)] * bias]
    leaves = [
        (torch.randn(shape, generator=generator, device="cuda") * 0.1).to(dtype).requires_grad_()
        for shape in shapes
    ]
    targets = torch.randint(0, 32000, (4096,), generator=generator, device="cuda")
    targets[::5] = -100
    results = []
    for loss in (fused_loss, linear_cross_entropy):
        with torch.autocast("cuda", torch.bfloat16, enabled=mode == "autocast"):
            value = loss(leaves[0], leaves[1], targets, *leaves[2:])
        results.append((value, torch.autograd.grad(value, leaves)))
    (one, grads), (other, same) = results
    assert one.dtype == other.dtype == torch.float32
    assert float(one) == pytest.approx(float(other), rel=1e-3)
    for got, want in zip(grads, same, strict=True):
        assert got.dtype == want.dtype
        # Logits are rounded to bf16 in one and not in the other.
        assert (got - want).abs().max() <= 2**-5 * want.abs().max()
