"""Calls past the operators: as with them, and only where nothing looks at operators."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from longgen.attention.flash.ops import attend_dense, attend_listed, flash_dense, flash_listed
from tests.attention.flash.operands import LAYOUTS, SCALE, arguments, draw

Tensor = torch.Tensor


class Watch(TorchDispatchMode):
    """Take down which of our operators PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "longgen":
            self.names.append(func._schema.name.removeprefix("longgen::flash_"))
        return func(*args, **(kwargs or {}))


WAYS = {"listed": (attend_listed, flash_listed), "dense": (attend_dense, flash_dense)}


@pytest.mark.parametrize("name", WAYS)
def test_past_the_operators_it_is_the_same(on_cpu: Any, name: str) -> None:
    """Bit for bit, with gradients of one result, of both or of neither."""
    more = arguments(LAYOUTS["packed"]) if name == "listed" else (None, SCALE)
    found = []
    for attend in WAYS[name]:
        qkv = draw(dtype=torch.float32)
        out, lse = attend(*qkv, *more)
        each = [out, lse]
        for loss in (out.sin().sum(), lse[lse > -1e9].sum(), out.sum() + lse[lse > -1e9].sum()):
            each += torch.autograd.grad(loss, qkv, retain_graph=True, materialize_grads=True)
        each += torch.autograd.grad(out.sum(), qkv[:1])
        with torch.no_grad():
            each += attend(*qkv, *more)
        found.append(each)
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected) and actual.dtype == expected.dtype


@pytest.mark.parametrize("name", WAYS)
def test_who_watches_sees_operators(on_cpu: Any, name: str) -> None:
    attend, _ = WAYS[name]
    more = arguments(LAYOUTS["plain"]) if name == "listed" else (None, SCALE)
    qkv = draw()
    with Watch() as watch:
        out, _ = attend(*qkv, *more)
        torch.autograd.grad(out.sum(), qkv)
    assert watch.names == [name, f"{name}_backward"]
    with torch.profiler.profile() as profile:
        out, _ = attend(*qkv, *more)
        torch.autograd.grad(out.sum(), qkv)
    assert not any(event.name.startswith("longgen::") for event in profile.events())


@pytest.mark.parametrize("name", WAYS)
def test_who_watches_backward_alone_sees_its_operator(on_cpu: Any, name: str) -> None:
    attend, _ = WAYS[name]
    more = arguments(LAYOUTS["plain"]) if name == "listed" else (None, SCALE)
    qkv = draw()
    out, _ = attend(*qkv, *more)
    with Watch() as watch:
        torch.autograd.grad(out.sum(), qkv)
    assert watch.names == [f"{name}_backward"]


def test_who_watches_is_seen_whatever_other_threads_did(
    on_cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Watch() as watch, monkeypatch.context() as patch:
        # PyTorch's note for all threads, after another one that began to watch before us has ended.
        patch.setattr(_python_dispatch, "_is_in_torch_dispatch_mode", False)
        attend_dense(*draw(), None, SCALE)
    assert watch.names == ["dense"]


@pytest.mark.parametrize("name", WAYS)
def test_compiled_backward_passes_see_one_operator(on_cpu: Any, name: str) -> None:
    """Those of compiled autograd, which look into autograd functions of eager forward passes."""
    attend, _ = WAYS[name]
    more = arguments(LAYOUTS["packed"]) if name == "listed" else (None, SCALE)
    qkv = draw()
    out, _ = attend(*qkv, *more)
    expected = torch.autograd.grad(out.cos().sum(), qkv, retain_graph=True)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("eager")
    with torch._dynamo.compiled_autograd._enable(partial(torch.compile, backend=backend)):
        actual = torch.autograd.grad(out.cos().sum(), qkv)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    called = [str(node.target) for graph in backend.graphs for node in graph.graph.nodes]
    assert [x for x in called if "longgen" in x] == [f"longgen.flash_{name}_backward.default"]


def _nested(attend: Callable[..., tuple[Tensor, Tensor]], qkv: list[Tensor], more: Any) -> Any:
    grad = torch.func.grad(lambda q: attend(q, *qkv[1:], *more)[0].sin().sum())
    return torch.func.grad(lambda q: grad(q).sum())(qkv[0])


def _batched(attend: Callable[..., tuple[Tensor, Tensor]], qkv: list[Tensor], more: Any) -> Any:
    out, _ = attend(*(x.requires_grad_() for x in qkv), *more)
    return torch.autograd.grad(out, qkv, out.detach().expand(2, *out.shape), is_grads_batched=True)


def _mapped(attend: Callable[..., tuple[Tensor, Tensor]], qkv: list[Tensor], more: Any) -> Any:
    return torch.func.vmap(lambda q: attend(q, *qkv[1:], *more)[0])(qkv[0].expand(2, 2, -1, -1, -1))


@pytest.mark.parametrize("transform", [_nested, _batched, _mapped])
def test_transforms_of_functions_do_as_with_operators(on_cpu: Any, transform: Any) -> None:
    """Kernels can't read tensors of transforms, and gradients of gradients would come out as 0."""
    messages = []
    for attend in WAYS["listed"]:
        with pytest.raises(RuntimeError) as error:
            transform(attend, draw(requires_grad=False), arguments(LAYOUTS["plain"]))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_holds_the_operator(on_cpu: Any) -> None:
    """Not what the kernels computed for its example."""
    traced = torch.jit.trace(
        lambda *qkv: attend_dense(*qkv, None, SCALE), tuple(draw(False)), check_trace=False
    )
    assert [x.kind() for x in traced.graph.nodes() if "::" in x.kind()].count(
        "longgen::flash_dense"
    ) == 1


@pytest.mark.parametrize("requires_grad", [False, True])
def test_kernels_never_read_tensors_that_stand_for_their_negatives(
    on_cpu: Any, monkeypatch: pytest.MonkeyPatch, requires_grad: bool
) -> None:
    """Their memory holds the other sign."""
    module, seen = sys.modules["longgen.attention.flash.hopper"], []

    def spy(q: Tensor, *args: Any) -> Any:
        seen.append(q.is_neg())
        return on_cpu.dense_forward(q, *args)

    monkeypatch.setattr(module, "dense_forward", spy)
    q, k, v = draw(requires_grad)
    actual, _ = attend_dense(torch._neg_view(q), k, v, None, SCALE)
    expected, _ = attend_dense(-q, k, v, None, SCALE)
    assert seen == [False, False] and torch.equal(actual, expected)


@pytest.mark.parametrize("loss", [Tensor.sum, lambda out: out.sin().sum()], ids=["sum", "sin"])
@pytest.mark.parametrize("way", [0, 1], ids=["past", "operators"])
@pytest.mark.parametrize("name", WAYS)
def test_gradients_of_gradients_are_refused(
    on_cpu: Any, name: str, way: int, loss: Callable[[Tensor], Tensor]
) -> None:
    """Not left out: they would be missing from those of a loss that has another part."""
    more = arguments(LAYOUTS["plain"]) if name == "listed" else (None, SCALE)
    qkv = draw(dtype=torch.float32)
    out, _ = WAYS[name][way](*qkv, *more)
    (grad,) = torch.autograd.grad(loss(out), qkv[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="backward through longgen"):
        torch.autograd.grad(grad.square().sum() + qkv[0].sum(), qkv[:1])
