"""Attention that runs once in a checkpointed layer: its output and log-sum-exp are kept, queries,
keys and values are recomputed.

`torch.utils.checkpoint` runs a layer again in the backward pass. Under `keep_attention` that second
run gets the output of the first instead of attending, and the kernel's own backward pass gets what
the first run kept. It works at the boundary of `attention()`, so with every implementation,
compiled ones too: nothing has to be known of their operators. With `products` matrix products run
once as well (longgen/train/products.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

Tensor = torch.Tensor
# What a tensor is turned into while it is kept, and how to get it back.
Hold = Callable[[Tensor], Callable[[], Tensor]]


class KeptLayer:
    """Hold outputs of one checkpointed layer, in the order in which they were made."""

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self.outputs: list[tuple[Callable[[], Tensor], ...]] = []
        self.played = 0

    def next(self) -> tuple[Tensor, ...]:
        """Return what was kept first of what was not yet given back."""
        kept = self.outputs[self.played]
        self.played += 1
        return tuple(get().detach() for get in kept)


class Within:
    """Have a layer's run keep outputs, or get back what was kept; can be entered again.

    Attributes:
        layer: what is kept.
        again: whether this is the recomputation.
        products: whether matrix products are kept too.
    """

    def __init__(self, layer: KeptLayer, again: bool, products: bool) -> None:
        self.layer, self.again, self.products = layer, again, products

    def __enter__(self) -> None:
        self.layer.played = 0
        self._token = _current.set(self)

    def __exit__(self, *error: Any) -> None:
        _current.reset(self._token)


_current: ContextVar[Within | None] = ContextVar("kept outputs", default=None)


def _as_it_is(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def keep_attention(hold: Hold = _as_it_is, *, products: bool = False) -> tuple[Within, Within]:
    """Return the contexts of a layer's first run and of its recomputation: the `context_fn` of
    `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`.

    Args:
        hold: takes each tensor that is kept and returns a function that gives it back; by default
            it stays where it is.
        products: whether matrix products are to be kept too.
    """
    layer = KeptLayer(hold)
    return Within(layer, False, products), Within(layer, True, products)


def within() -> Within | None:
    """Return the run of a layer that keeps outputs, if there is one around this call."""
    return _current.get()


def is_keeping() -> bool:
    """Whether attention is called in a layer that keeps it."""
    return not torch.compiler.is_compiling() and _current.get() is not None


class _Anchor(torch.autograd.Function):
    """Have checkpointing recompute q, k and v, and nothing behind them, for the backward pass of
    the attention that follows."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def _geometry(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage().data_ptr(), x.dtype, x.shape, x.stride(), x.storage_offset()


class _Saved:
    """Stand between a kernel's autograd node and what it saves: what lies in the memory of q, k
    and v comes from `_Anchor`, that is, from recomputation; all else is held."""

    def __init__(self, inputs: tuple[Tensor, ...], node: Any, hold: Hold) -> None:
        self.hold = hold
        # The node of `_Anchor`, not the tensors: these would stay in memory.
        self.node = node
        self.places = [_geometry(x) for x in inputs]
        self.held: dict[tuple[Any, ...], tuple[Tensor, Callable[[], Tensor]]] = {}
        self.recomputed: tuple[Tensor, ...] | None = None

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Hold a tensor, once however often it is given."""
        key = _geometry(tensor)
        if key not in self.held:
            # The tensor too, so that no other comes to lie at its address meanwhile.
            self.held[key] = (tensor, self.hold(tensor.detach()))
        return self.held[key][1]

    def pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        address, dtype, *view = _geometry(tensor)
        for index, place in enumerate(self.places):
            if address and place[:2] == (address, dtype):
                return lambda: self.input(index).as_strided(*view)
        return self.keep(tensor)

    def input(self, index: int) -> Tensor:
        """Return a recomputed q, k or v."""
        if self.recomputed is None:
            # Checkpointing hands its tensors out once.
            self.recomputed = self.node.saved_tensors
        tensor = self.recomputed[index]
        assert _geometry(tensor)[1:] == self.places[index][1:], "recomputed with another layout"
        return tensor


def attend_once(
    compute: Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Any:
    """Return `compute(q, k, v)`, computed in the first run of the layer alone.

    Args:
        compute: attends; returns the output, or the output and the log-sum-exp.
        q: queries (B, T, H, D).
        k: keys (B, S, Hkv, D).
        v: values (B, S, Hkv, D).
    """
    run = _current.get()
    if run is None or not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return compute(q, k, v)
    layer = run.layer
    anchored = _Anchor.apply(q, k, v)
    if run.again:
        kept = tuple(x.requires_grad_() for x in layer.next())
        return kept if len(kept) > 1 else kept[0]
    saved = _Saved((q, k, v), anchored[0].grad_fn, layer.hold)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda get: get()):
        result = compute(*anchored)
    outputs = result if isinstance(result, tuple) else (result,)
    layer.outputs.append(tuple(saved.keep(x) for x in outputs))
    saved.held.clear()
    return result
