"""The operators: what compilers are told of them, gradients, checkpointing, one node in a graph."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from longgen.attention import attention, flash
from longgen.attention.flash import flash_attend
from longgen.attention.flash.ops import (
    flash_dense,
    flash_dense_backward,
    flash_listed,
    flash_listed_backward,
)
from longgen.attention.flash.plan import tables
from longgen.attention.testing import ErrorBudget, random_inputs
from longgen.layout import Layout, padded
from longgen.pattern import SparsePattern
from tests.attention.flash.operands import (
    FULL,
    LAYOUTS,
    LENGTH,
    SCALE,
    SINK,
    STRIDED,
    arguments,
    draw,
)

Tensor = torch.Tensor
LayoutMask = Callable[..., Tensor]


def dense_arguments(packed: bool) -> list[Any]:
    """Return arguments of `flash_dense`."""
    if not packed:
        return [*draw(), None, SCALE]
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in draw()]
    bounds = [0, 30, LENGTH, 2 * LENGTH]
    return [*flat, torch.tensor(bounds, dtype=torch.int32), SCALE]


@pytest.mark.parametrize("pattern", [SINK, STRIDED], ids=["sink", "strided"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_listed_passes_pytorch_own_checks(on_cpu: Any, kind: str, pattern: SparsePattern) -> None:
    torch.library.opcheck(flash_listed, (*draw(), *arguments(LAYOUTS[kind], pattern)))


def test_listed_without_gradients_passes_pytorch_own_checks(on_cpu: Any) -> None:
    more = arguments(LAYOUTS["packed"], gradients=False)
    assert more[1] == more[2] == []
    torch.library.opcheck(flash_listed, (*draw(requires_grad=False), *more))


@pytest.mark.parametrize("packed", [False, True])
def test_dense_passes_pytorch_own_checks(on_cpu: Any, packed: bool) -> None:
    torch.library.opcheck(flash_dense, tuple(dense_arguments(packed)))


def test_backward_operators_pass_pytorch_own_checks(on_cpu: Any) -> None:
    q, k, v = draw(requires_grad=False)
    _, backward, strided, _, *masks, _, scale = more = arguments(LAYOUTS["packed"])
    out, lse = flash_listed(q, k, v, *more)
    for grad_lse in (None, torch.randn_like(lse)):
        taken = (torch.randn_like(q), grad_lse, q, k, v, out, lse)
        torch.library.opcheck(flash_listed_backward, (*taken, backward, strided, *masks, scale))
        torch.library.opcheck(flash_dense_backward, (*taken, None, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_fake_results_look_like_real_ones(device: str, dtype: torch.dtype) -> None:
    """Compilers and memory planners see shapes before any kernel runs."""
    with FakeTensorMode():

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def seen(*tensors: Tensor) -> list[tuple[Any, ...]]:
            assert all(x.is_contiguous() for x in tensors)
            return [(tuple(x.shape), x.dtype, x.device.type) for x in tensors]

        q, k = empty(2, 50, 6, 64), empty(2, 70, 2, 64)
        out, lse = flash_listed(q, k, k, [], [], [], "", "", "", 64, SCALE)
        one = [((2, 50, 6, 64), dtype, device), ((2, 6, 50), torch.float32, device)]
        assert seen(out, lse) == one
        assert seen(*flash_dense(q, k, k, None, SCALE)) == one
        of_keys = ((2, 70, 2, 64), dtype, device)
        taken = (out, lse, q, k, k, out, lse)
        gradients = flash_listed_backward(*taken, [], [], "", "", SCALE)
        assert seen(*gradients) == [one[0], of_keys, of_keys]
        assert seen(*flash_dense_backward(*taken, None, SCALE)) == [one[0], of_keys, of_keys]
        flat, short = empty(90, 6, 64), empty(90, 2, 64)
        bounds = torch.empty(3, dtype=torch.int32, device=device)
        shapes = [(90, 6, 64), (6, 90)]
        assert [x[0] for x in seen(*flash_dense(flat, short, short, bounds, SCALE))] == shapes


@pytest.mark.parametrize("pattern", [FULL, SINK, STRIDED], ids=["full", "sink", "strided"])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("head_offset", [0, 5])
def test_attention_with_gradients(
    on_cpu: Any,
    no_obstacle: None,
    layout_mask: LayoutMask,
    pattern: SparsePattern,
    kind: str,
    head_offset: int,
) -> None:
    """From the front door to the kernels' and back."""
    layout = LAYOUTS[kind]
    inputs = random_inputs(LENGTH, batch=2, heads=4, head_dim=16)
    budget = ErrorBudget(inputs, layout_mask(pattern, layout, 2, head_offset))
    attend = partial(
        attention, pattern=pattern, layout=layout, head_offset=head_offset, impl="flash"
    )
    budget.check("flash", attend)


@pytest.mark.parametrize("only", ["out", "lse", "both"])
@pytest.mark.parametrize("pattern", [FULL, STRIDED], ids=["full", "strided"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_gradients_of_out_and_lse(
    on_cpu: Any, no_obstacle: None, pattern: SparsePattern, kind: str, only: str
) -> None:
    """Each may be left out of the loss, as merging parts of one attention does."""
    found = []
    for impl in ("flash", "reference"):
        qkv = draw(dtype=torch.float32)
        out, lse = attention(
            *qkv, pattern=pattern, layout=LAYOUTS[kind], impl=impl, return_lse=True
        )
        parts = {"out": out.cos().sum(), "lse": lse[lse > float("-inf")].sin().sum()}
        loss = sum(parts[name] for name in (parts if only == "both" else [only]))
        found.append([out, lse, *torch.autograd.grad(loss, qkv, materialize_grads=True)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("pattern", [FULL, STRIDED], ids=["full", "strided"])
def test_checkpointing(
    on_cpu: Any, no_obstacle: None, pattern: SparsePattern, use_reentrant: bool
) -> None:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v.exp(), pattern=pattern, impl="flash").sin()

    qkv = draw()
    plain = torch.autograd.grad(block(*qkv).sum(), qkv)
    kept = checkpoint(block, *qkv, use_reentrant=use_reentrant)
    # The reentrant kind only works with backward().
    kept.sum().backward()
    for x, expected in zip(qkv, plain, strict=True):
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("name", ["listed", "dense"])
def test_one_node_of_a_compiled_graph(on_cpu: Any, name: str) -> None:
    op: Callable[..., tuple[Tensor, Tensor]] = flash_listed if name == "listed" else flash_dense
    more = arguments(LAYOUTS["packed"]) if name == "listed" else (None, SCALE)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = op(q * 2, k, v, *more)
        return out * lse.transpose(1, 2)[..., None].cos()

    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    qkv = draw()
    expected, actual = block(*qkv), compiled(*qkv)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(x.sum(), qkv) for x in (expected, actual)]
    torch.testing.assert_close(*grads)
    assert backend.frame_count == 1
    called = [str(n.target) for n in backend.graphs[0].graph.nodes if n.op == "call_function"]
    assert [x for x in called if "longgen" in x] == [f"longgen.flash_{name}.default"]


def other(layout: Layout) -> Layout:
    """Return a layout of the same size, with other documents."""
    if layout.num_rows > 1:
        return Layout.of_rows(padded(LENGTH, 0, n) for n in (0, 90))
    return Layout.packed([0, 70, LENGTH])


@pytest.mark.parametrize("pattern", [FULL, SINK, STRIDED], ids=["full", "sink", "strided"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
@pytest.mark.parametrize("kind", [None, *LAYOUTS])
def test_attention_is_one_node_of_a_compiled_graph(
    on_cpu: Any, monkeypatch: pytest.MonkeyPatch, kind: str | None, pattern: SparsePattern
) -> None:
    """Its tables are constants of the graph, which is made anew for each layout and no more."""
    # Poisoned memory asks for deterministic algorithms.
    torch.use_deterministic_algorithms(False)
    # As if the card were a Hopper GPU, and some package that is here the one that it takes.
    monkeypatch.setattr(flash, "_unfit", lambda device: None)
    monkeypatch.setattr(flash, "version", lambda name: importlib.metadata.version("numpy"))
    monkeypatch.setattr(flash, "FLASH_ATTN_4", importlib.metadata.version("numpy"))
    flash._missing.cache_clear()

    def block(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None) -> Tensor:
        return attention(q * 2, k, v, pattern=pattern, layout=layout, impl="flash").cos()

    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    inputs = random_inputs(LENGTH, batch=2, heads=4, dtype=torch.bfloat16)[:3]
    qkv = [x.requires_grad_() for x in inputs]
    layout = None if kind is None else LAYOUTS[kind]
    layouts = [layout, other(layout or Layout.causal(LENGTH)), layout]
    for each in layouts:
        results = []
        for function in (block, compiled):
            out = function(*qkv, each and Layout(each.queries, each.keys))
            results.append([out, *torch.autograd.grad(out.sum(), qkv)])
        torch.testing.assert_close(*results)
    assert backend.frame_count == 2
    for graph in backend.graphs:
        called = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        assert len([x for x in called if "longgen" in x]) == 1
    flash._missing.cache_clear()


@pytest.mark.parametrize(
    ("requires_grad", "enabled", "wanted"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_backward_tables_are_made_only_for_gradients(
    on_cpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    requires_grad: bool,
    enabled: bool,
    wanted: bool,
) -> None:
    asked, made = [], []

    def obstacle(q: Tensor, *, gradients: bool) -> None:
        asked.append(gradients)

    def spy(*args: Any) -> Any:
        made.append(tables(*args))
        return made[-1]

    monkeypatch.setattr(flash, "flash_obstacle", obstacle)
    monkeypatch.setattr(flash, "tables", spy)
    q, k, v = draw(requires_grad=False)
    with torch.set_grad_enabled(enabled):
        flash_attend(
            *(q, k, v.requires_grad_(requires_grad)),
            pattern=STRIDED,
            layout=LAYOUTS["packed"],
            scale=SCALE,
        )
    assert asked == [wanted]
    assert [bool(x.backward and x.strided) for x in made] == [wanted]


def test_inference_then_training(on_cpu: Any, no_obstacle: None) -> None:
    """Tables that inference made are saved for backward by training."""
    for pattern in (FULL, STRIDED):
        for layout in (LAYOUTS["plain"], LAYOUTS["packed"]):
            qkv = draw()
            attend = partial(attention, *qkv, pattern=pattern, layout=layout, impl="flash")
            with torch.inference_mode():
                attend()
            assert all(x is not None for x in torch.autograd.grad(attend().sum(), qkv))


def test_the_cpu_has_no_kernel_of_its_own() -> None:
    """The written-out kernels are gone when their test ends."""
    with pytest.raises(NotImplementedError, match="with arguments from the 'CPU' backend"):
        flash_dense(*draw(requires_grad=False), None, SCALE)
