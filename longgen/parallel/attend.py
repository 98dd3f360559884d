"""Attention of a rank's queries, layer by layer: what is exchanged, and where everything then
stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longgen.attention import attention
from longgen.layout import Axis, Layout
from longgen.parallel.group import ContextGroup
from longgen.parallel.heads import (
    gather_heads,
    head_offset,
    heads_obstacle,
    heads_sent_bytes,
    scatter_heads,
)
from longgen.parallel.ranges import fetch_ranges, plan_ranges, ranges_sent_bytes
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan


def route(
    pattern: SparsePattern, group: ContextGroup, num_heads: int, num_key_value_heads: int
) -> str:
    """Return how a layer exchanges: "heads" or "ranges" (see `ContextGroup.full_mode`).

    Sparse layers always fetch ranges, a few blocks where all-to-all would move every token.
    """
    if not pattern.is_full:
        return "ranges"
    if group.full_mode != "auto":
        return group.full_mode
    return "ranges" if heads_obstacle(num_heads, num_key_value_heads, group.size) else "heads"


def context_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pattern: SparsePattern,
    rows: tuple[Axis, ...],
    group: ContextGroup,
    scale: float | None = None,
    impl: str = "auto",
    by: str | None = None,
) -> torch.Tensor:
    """Compute a rank's part of attention; every rank of the group must call it.

    Args:
        q: queries (B, T, H, D) of this rank's tokens.
        k: keys (B, T, Hkv, D), rotary applied at their true positions.
        v: values (B, T, Hkv, D).
        pattern: what each query sees.
        rows: for each batch row where its size * T tokens stand; each document in one run.
        group: the ranks that share the rows.
        scale: factor on the scores; None is D ** -0.5.
        impl: as in `longgen.attention.attention`.
        by: "heads" or "ranges"; None is what `route` says.

    Returns:
        (B, T, H, D) in q's dtype.

    Raises:
        UsageError: if the heads do not divide and `by` or the group asks for it, or the
            implementation cannot do the work.
    """
    num_key_value_heads = k.shape[2]
    if (by or route(pattern, group, q.shape[2], num_key_value_heads)) == "heads":
        q, k, v = scatter_heads(q, k, v, group)
        out = attention(
            q,
            k,
            v,
            pattern=pattern,
            layout=Layout.of_rows(rows),
            scale=scale,
            head_offset=head_offset(num_key_value_heads, group),
            impl=impl,
        )
        return gather_heads(out, group)
    plan = plan_ranges(pattern, rows, group.rank, group.size, num_key_value_heads)
    k, v = fetch_ranges(k, v, plan, group)
    return attention(q, k, v, pattern=pattern, layout=plan.layout, scale=scale, impl=impl)


def sent_bytes(
    pattern: SparsePattern,
    rows: tuple[Axis, ...],
    group: ContextGroup,
    *,
    num_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    bytes_per_element: int = 2,
    by: str | None = None,
) -> int:
    """Return the bytes that this rank sends to others in one layer's forward pass; nothing is run.

    Args:
        pattern: what the layer sees.
        rows: for each batch row where its tokens stand.
        group: the ranks that share the rows; it needs no processes behind it.
        num_heads: query heads.
        num_key_value_heads: key/value heads.
        head_dim: size of a head.
        bytes_per_element: 2 for bf16.
        by: "heads" or "ranges"; None is what `route` says.
    """
    if (by or route(pattern, group, num_heads, num_key_value_heads)) == "heads":
        length = sum(run.length for run in rows[0]) // group.size
        return heads_sent_bytes(
            len(rows),
            length,
            num_heads,
            num_key_value_heads,
            head_dim,
            group.size,
            bytes_per_element,
        )
    plan = plan_ranges(pattern, rows, group.rank, group.size, num_key_value_heads)
    return ranges_sent_bytes(plan, num_key_value_heads, head_dim, bytes_per_element)


@dataclass(frozen=True, slots=True)
class ContextLayouts:
    """Carry one forward pass's rows to all its layers.

    Attributes:
        plan: which layers are full.
        rows: for each batch row where its tokens stand, those of all ranks.
        group: the ranks that share the rows.
    """

    plan: LayerPlan
    rows: tuple[Axis, ...]
    group: ContextGroup

    def attend(
        self,
        layer_idx: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        impl: str,
    ) -> torch.Tensor:
        """Attend in one layer: q (B, T, H, D), k and v (B, T, Hkv, D) to (B, T, H, D)."""
        return context_attention(
            q,
            k,
            v,
            pattern=self.plan.pattern_of(layer_idx),
            rows=self.rows,
            group=self.group,
            scale=scale,
            impl=impl,
        )
