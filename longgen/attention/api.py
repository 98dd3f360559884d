"""The one way in: `attention()` checks its inputs, chooses an implementation and runs it.

B batch, T queries, S keys, H query heads, Hkv key/value heads, D head size. Tensors are (B, T, H,
D) throughout.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Literal, overload

import torch

from longgen.attention.blocked import blocked_attention
from longgen.attention.dense import dense_attention
from longgen.attention.flash import flash_attend, flash_obstacle
from longgen.attention.flex import flex_attend, flex_obstacle
from longgen.attention.keep import attend_once, is_keeping
from longgen.attention.reference import reference_attention
from longgen.errors import UsageError
from longgen.layout import Layout
from longgen.pattern import SparsePattern

logger = logging.getLogger(__name__)

_MASKED: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor | None]]] = {
    "reference": reference_attention,
    "blocked": blocked_attention,
    "flex": flex_attend,
    "flash": flash_attend,
}
IMPLEMENTATIONS = ("auto", *_MASKED)

# Below this many queries a chunk with a cache is cheaper in plain PyTorch than a compiled kernel's
# launch and lists.
_FEW_QUERIES = 16

_announced: set[tuple[str, SparsePattern]] = set()


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pattern: SparsePattern | None = ...,
    layout: Layout | None = ...,
    scale: float | None = ...,
    head_offset: int = ...,
    impl: str = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pattern: SparsePattern | None = ...,
    layout: Layout | None = ...,
    scale: float | None = ...,
    head_offset: int = ...,
    impl: str = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pattern: SparsePattern | None = None,
    layout: Layout | None = None,
    scale: float | None = None,
    head_offset: int = 0,
    impl: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute attention under a sparse pattern.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, Hkv, D), rotary already applied; H must be a multiple of Hkv.
        v: values (B, S, Hkv, D).
        pattern: what each query sees; None is full causal attention.
        layout: where queries and keys stand in their documents; None is one document whose last T
            of S tokens are the queries.
        scale: factor on the scores; None is D ** -0.5.
        head_offset: global index of the first key/value head given here (tensor or Ulysses
            parallelism).
        impl: "reference" (fp32 softmax over a dense mask), "blocked" (plain PyTorch, any device),
            "flex" (FlexAttention), "flash" (FlashAttention-4 on Hopper, extra `flash`), or "auto",
            which picks by card, dtype, head size and what is installed, and logs its choice once.
            A named implementation runs or raises; none is ever replaced by another.
        return_lse: whether to return the log-sum-exp of the scores too, with which parts of one
            attention that were computed apart can be put together.

    Returns:
        (B, T, H, D) in q's dtype; queries that see nothing (padding) give zeros. With `return_lse`
        also (B, H, T), at least fp32, natural logarithm, -inf where a query sees nothing.

    Raises:
        UsageError: if shapes, layout and pattern do not fit together, or the implementation cannot
            do the work.
    """
    pattern = SparsePattern.full() if pattern is None else pattern
    _check_tensors(q, k, v, impl)
    is_layout = layout is None or isinstance(layout, Layout)
    if not isinstance(pattern, SparsePattern) or not is_layout:
        raise UsageError(
            f"pattern and layout must be a SparsePattern and a Layout; they are {pattern!r} and "
            f"{layout!r}. Layout.packed(cu_seqlens) makes one of cumulative lengths."
        )
    layout = layout or _causal(q.shape[1], k.shape[1])
    _check_layout(q, k, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "auto":
        impl = _auto(q, k, v, pattern, layout, head_offset, return_lse)

    def compute(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        with _as_given(q.device.type):
            if impl.startswith("dense"):
                return dense_attention(q, k, v, is_causal=impl == "dense_causal", scale=scale)
            out, lse = _MASKED[impl](
                q,
                k,
                v,
                pattern=pattern,
                layout=layout,
                scale=scale,
                head_offset=head_offset,
                return_lse=return_lse,
            )
        if not return_lse:
            return out
        assert lse is not None
        return out, lse

    return attend_once(compute, q, k, v) if is_keeping() else compute(q, k, v)


def _as_given(device_type: str) -> AbstractContextManager[Any]:
    """Return a context without autocast, which would compute fp32 inputs, the reference's too, in
    half precision."""
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device_type):
        # Entering one takes longer than all else before the kernels.
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _auto(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: SparsePattern,
    layout: Layout,
    head_offset: int,
    return_lse: bool,
) -> str:
    """Choose an implementation, and say which and why not the faster one."""
    device, length = q.device.type, q.shape[1]
    impl = _choose(pattern, layout, length, device, head_offset)
    obstacle = None
    if device == "cuda" and (impl in ("flex", "dense_causal") and length > _FEW_QUERIES):
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        obstacle = flash_obstacle(q, gradients=gradients)
        impl = impl if obstacle else "flash"
    if return_lse and impl.startswith("dense"):
        # PyTorch's own kernels keep it to themselves.
        impl = "flex" if device == "cuda" else "blocked"
    if impl == "flex" and flex_obstacle(q):
        impl = "blocked"
    _announce(impl, pattern, q, obstacle)
    return impl


def _causal(num_queries: int, num_keys: int) -> Layout:
    if torch.compiler.is_compiling():
        return Layout.causal(num_queries, num_keys)
    return _made_causal(num_queries, num_keys)


# Made and checked anew it takes as long as all else before the kernels.
_made_causal = lru_cache(maxsize=256)(Layout.causal)


@lru_cache(maxsize=256)
def _choose(
    pattern: SparsePattern, layout: Layout, num_queries: int, device_type: str, head_offset: int
) -> str:
    if layout.is_causal:
        _, start, length = layout.queries[0][0]
        if pattern.is_full or (start == 0 and pattern.covers(length)):
            return "dense_causal"
    if layout.sees_everything(pattern, head_offset):
        return "dense"
    return "flex" if device_type == "cuda" and num_queries > _FEW_QUERIES else "blocked"


def _announce(impl: str, pattern: SparsePattern, q: torch.Tensor, obstacle: str | None) -> None:
    key = (impl, pattern)
    if key not in _announced:
        _announced.add(key)
        note = f" (not flash: {obstacle})" if obstacle else ""
        logger.info("attention (%s) on %s: %s%s", pattern, q.device.type, impl, note)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise UsageError(
            f"There is no attention implementation {impl!r}; choose from {IMPLEMENTATIONS}."
        )
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise UsageError(
            f"q must be (B, T, H, D) and k, v (B, S, Hkv, D) alike; they are {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise UsageError(
            f"q, k and v must have one dtype; they are {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if not q.dtype.is_floating_point or q.dtype.itemsize < 2:
        raise UsageError(
            f"q, k and v must be of floating point, 16 bits or more; they are {q.dtype}."
        )
    if not q.device == k.device == v.device:
        raise UsageError(
            f"q, k and v must be on one device; they are on {q.device}, {k.device}, {v.device}."
        )
    if 0 in (*q.shape[1:], *k.shape[1:]):
        raise UsageError(
            "q and k need at least one token, one head and a head size; they are "
            f"{tuple(q.shape)} and {tuple(k.shape)}."
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise UsageError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch and head size, "
            "with query heads a multiple of key/value heads."
        )


def _check_layout(q: torch.Tensor, k: torch.Tensor, layout: Layout) -> None:
    if layout.num_queries != q.shape[1] or layout.num_keys != k.shape[1]:
        raise UsageError(
            f"The layout describes {layout.num_queries} queries and {layout.num_keys} keys, "
            f"the tensors hold {q.shape[1]} and {k.shape[1]}."
        )
    if layout.num_rows not in (1, q.shape[0]) or layout.num_key_heads not in (1, k.shape[2]):
        raise UsageError(
            f"The layout describes {layout.num_rows} rows and {layout.num_key_heads} key heads, "
            f"the tensors hold {q.shape[0]} and {k.shape[2]}."
        )
