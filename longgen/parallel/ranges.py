"""Sparse layers by ranges: queries stay where they are, and each rank fetches only the keys and
values of other ranks that its queries see.

What they see is `SparsePattern.key_ranges`, cut at document borders: the sinks, the halo of the
window, the strided blocks of each head. Full attention is a pattern too, so the same code serves
full layers whose heads do not divide among the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from longgen.layout import PADDING, Axis, Layout, Run, axis_length, cut
from longgen.parallel.collectives import begin_all_to_all
from longgen.parallel.group import ContextGroup
from longgen.pattern import SparsePattern

# Kernels work on tiles of this many keys; a rank's own keys begin at one.
_TILE = 128


@dataclass(frozen=True, slots=True, eq=False)
class RangePlan:
    """Say what a rank sends and fetches, and where its queries and keys then stand.

    A row of a tensor is the key (or value) of one token and one group of heads: all heads where
    all see the same, else one head.

    Attributes:
        layout: this rank's queries against [fetched keys, padding, own keys].
        num_fetched: key columns F before the own ones, padding included; the same in all rows and
            heads.
        num_groups: groups of heads G.
        send: rows of the own keys (B, T, G) to send, those for rank 0 first.
        num_sent: how many of them go to each rank.
        fetch: rows of the new keys (B, F + T, G) that what comes is put into, rank 0's first.
        num_received: how many of them come from each rank.
        empty: rows of the new keys that are padding.
    """

    layout: Layout
    num_fetched: int
    num_groups: int
    send: np.ndarray
    num_sent: tuple[int, ...]
    fetch: np.ndarray
    num_received: tuple[int, ...]
    empty: np.ndarray


class _Begun(NamedTuple):
    """Describe a document that reaches into a shard from before it.

    Its tokens in the row are `run`, the first in column `column`; the shard's queries of it have
    positions [start, stop).
    """

    run: Run
    column: int
    start: int
    stop: int


def _begun(row: Axis, length: int, size: int) -> list[_Begun | None]:
    """Return for each of `size` shards of `length` columns the document that began before it."""
    found: list[_Begun | None] = [None] * size
    column = 0
    for run in row:
        if run.document != PADDING:
            for rank in range(column // length + 1, (column + run.length - 1) // length + 1):
                shift = run.start - column
                stop = min((rank + 1) * length, column + run.length)
                found[rank] = _Begun(run, column, rank * length + shift, stop + shift)
        column += run.length
    return found


def _seen(pattern: SparsePattern, begun: _Begun | None, head: int) -> Axis:
    """Return what a shard's queries see of the columns before it, as runs in order."""
    if begun is None:
        return ()
    document, first, _ = begun.run
    ranges = pattern.key_ranges(begun.start, begun.stop, head)
    clipped = ((max(a, first), min(b, begun.start)) for a, b in ranges)
    return tuple(Run(document, a, b - a) for a, b in clipped if a < b)


def _columns(begun: _Begun | None, seen: Axis) -> np.ndarray:
    """Return the columns of the row in which the tokens of `seen` are."""
    if begun is None or not seen:
        return np.zeros(0, np.int64)
    shift = begun.column - begun.run.start
    return np.concatenate([np.arange(a, a + n) + shift for _, a, n in seen])


@lru_cache(maxsize=8)
def plan_ranges(
    pattern: SparsePattern, rows: tuple[Axis, ...], rank: int, size: int, num_key_value_heads: int
) -> RangePlan:
    """Plan the exchange of one layer.

    Args:
        pattern: what a query sees.
        rows: for each batch row where its size * T tokens stand; each document in one run.
        rank: this rank.
        size: ranks that share the rows.
        num_key_value_heads: key/value heads of the layer.
    """
    length = axis_length(rows[0]) // size
    num_groups = num_key_value_heads if pattern.num_head_classes > 1 else 1

    begun = [_begun(row, length, size) for row in rows]
    mine = [[_seen(pattern, starts[rank], head) for head in range(num_groups)] for starts in begun]
    longest = max(axis_length(axis) for heads in mine for axis in heads)
    num_fetched = -(-longest // _TILE) * _TILE

    fetch: list[list[np.ndarray]] = [[] for _ in range(size)]
    send: list[list[np.ndarray]] = [[] for _ in range(size)]
    empty = []
    for b, starts in enumerate(begun):
        for group in range(num_groups):
            columns = _columns(starts[rank], mine[b][group])
            slots = b * (num_fetched + length) + np.arange(num_fetched)
            slots = slots * num_groups + group
            for source in range(rank):
                came = columns // length == source
                fetch[source].append(slots[: len(columns)][came])
            empty.append(slots[len(columns) :])
            for other in range(rank + 1, size):
                wanted = _columns(starts[other], _seen(pattern, starts[other], group))
                own = wanted[wanted // length == rank] - rank * length
                send[other].append((b * length + own) * num_groups + group)
    axes = []
    for b, row in enumerate(rows):
        own_axis = cut(row, rank * length, (rank + 1) * length)
        keys = []
        for axis in mine[b]:
            padding = num_fetched - axis_length(axis)
            keys.append((*axis, *([Run(PADDING, 0, padding)] if padding else []), *own_axis))
        axes.append((own_axis, tuple(keys[:1] if len(set(keys)) == 1 else keys)))
    return RangePlan(
        layout=_layout(axes, num_groups),
        num_fetched=num_fetched,
        num_groups=num_groups,
        send=_joined([part for parts in send for part in parts]),
        num_sent=tuple(sum(map(len, parts)) for parts in send),
        fetch=_joined([part for parts in fetch for part in parts]),
        num_received=tuple(sum(map(len, parts)) for parts in fetch),
        empty=_joined(empty),
    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _layout(axes: list[tuple[Axis, tuple[Axis, ...]]], num_groups: int) -> Layout:
    """Make a layout of each row's query axis and key axes; equal rows are shared."""
    if len(set(axes)) == 1:
        axes = axes[:1]
    # Rows must have as many key axes as each other.
    heads = max(len(keys) for _, keys in axes)
    keys = tuple(row if len(row) == heads else row * heads for _, row in axes)
    return Layout(tuple(query for query, _ in axes), keys)


@lru_cache(maxsize=8)
def _indices(plan: RangePlan, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return send, fetch, empty, and the distinct rows of send with the place of each among
    them."""
    distinct, places = np.unique(plan.send, return_inverse=True)
    arrays = (plan.send, plan.fetch, plan.empty, distinct, places)
    with torch.inference_mode(False):
        return tuple(torch.from_numpy(array).to(device) for array in arrays)


class _Fetch(torch.autograd.Function):
    """Put the keys and values that other ranks hold before the own ones; send their gradients
    home."""

    @staticmethod
    def forward(
        ctx: Any, k: torch.Tensor, v: torch.Tensor, plan: RangePlan, process_group: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.plan, ctx.process_group = plan, process_group
        batch, length, heads, head_dim = k.shape
        width = heads // plan.num_groups * head_dim
        send, fetch, empty, _, _ = _indices(plan, k.device)
        rows = torch.cat([states.reshape(-1, width)[send] for states in (k, v)], 1)
        wait = begin_all_to_all(rows, plan.num_sent, plan.num_received, process_group)
        # What is here already goes to its place while the rest is on its way.
        wholes = []
        for states in (k, v):
            whole = states.new_empty(batch, plan.num_fetched + length, heads, head_dim)
            whole[:, plan.num_fetched :] = states
            # Finite, since a masked key still meets a probability of zero.
            whole.view(-1, width)[empty] = 0.0
            wholes.append(whole)
        for whole, part in zip(wholes, wait().split(width, 1), strict=True):
            whole.view(-1, width)[fetch] = part
        return wholes[0], wholes[1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan: RangePlan = ctx.plan
        heads, head_dim = grads[0].shape[2:]
        width = heads // plan.num_groups * head_dim
        _, fetch, _, distinct, places = _indices(plan, grads[0].device)
        rows = torch.cat([grad.reshape(-1, width)[fetch] for grad in grads], 1)
        wait = begin_all_to_all(rows, plan.num_received, plan.num_sent, ctx.process_group)
        owns = [grad[:, plan.num_fetched :].contiguous() for grad in grads]
        for own, part in zip(owns, wait().split(width, 1), strict=True):
            flat = own.view(-1, width)
            # Ranks are added in their order and each at most once to a row: the same bits every
            # time, on GPUs too. Half precision would round at every one of them.
            total = flat[distinct].to(torch.promote_types(own.dtype, torch.float32))
            start = 0
            for count in plan.num_sent:
                span = slice(start, start + count)
                total[places[span]] += part[span]
                start += count
            flat[distinct] = total.to(own.dtype)
        return owns[0], owns[1], None, None


def fetch_ranges(
    k: torch.Tensor, v: torch.Tensor, plan: RangePlan, group: ContextGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values (B, F + T, Hkv, D) as `plan.layout` has them, from a rank's own (B, T,
    Hkv, D)."""
    return _Fetch.apply(k, v, plan, group.process_group)


def ranges_sent_bytes(
    plan: RangePlan, num_key_value_heads: int, head_dim: int, bytes_per_element: int
) -> int:
    """Return the bytes of keys and values that a rank sends to others in one layer's forward pass.

    Its backward pass sends as many bytes as its forward pass receives:
    `ranges_received_bytes`.
    """
    row = 2 * num_key_value_heads // plan.num_groups * head_dim * bytes_per_element
    return sum(plan.num_sent) * row


def ranges_received_bytes(
    plan: RangePlan, num_key_value_heads: int, head_dim: int, bytes_per_element: int
) -> int:
    """Return the bytes of keys and values that come from other ranks in one layer's forward
    pass."""
    row = 2 * num_key_value_heads // plan.num_groups * head_dim * bytes_per_element
    return sum(plan.num_received) * row
