"""Which token of which document stands where along the query and key axes: packing, padding,
caches, offsets.

A sparse pattern counts blocks from the start of each document. Packed sequences, left-padded
batches, chunked prefill and caches that dropped tokens all put documents at other places of a
tensor; an `Axis` says where, and everything that needs positions reads them from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from longgen.errors import UsageError
from longgen.pattern import SparsePattern

PADDING = -1


class Run(NamedTuple):
    """Describe `length` consecutive tokens of one document, the first at position `start` of it."""

    document: int
    start: int
    length: int


Axis = tuple[Run, ...]


def contiguous(length: int, start: int = 0) -> Axis:
    """Return the axis of one document's tokens [start, start + length)."""
    return (Run(0, start, length),) if length else ()


def packed(cu_seqlens: Sequence[int]) -> Axis:
    """Return the axis of documents packed one after another, given their cumulative lengths [0, n1,
    n1 + n2, ...]."""
    bounds = [int(bound) for bound in cu_seqlens]
    if not bounds or bounds[0] != 0 or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise UsageError(f"cu_seqlens is {bounds}; it must start at 0 and never fall.")
    pairs = zip(bounds, bounds[1:], strict=False)
    return tuple(Run(i, 0, b - a) for i, (a, b) in enumerate(pairs) if b > a)


def padded(length: int, start: int, padding: int) -> Axis:
    """Return columns [start, start + length) of a row whose first `padding` columns are padding."""
    stop = start + length
    runs = (
        Run(PADDING, 0, max(min(stop, padding) - start, 0)),
        Run(0, max(start - padding, 0), max(stop - max(start, padding), 0)),
    )
    return tuple(run for run in runs if run.length)


def from_position_ids(position_ids: np.ndarray) -> Axis:
    """Return the axis of one row of `position_ids` (T,): a new document begins wherever they do not
    count on by one."""
    breaks = np.flatnonzero(np.diff(position_ids) != 1) + 1
    bounds = [0, *breaks.tolist(), len(position_ids)]
    pairs = zip(bounds, bounds[1:], strict=False)
    return tuple(Run(i, int(position_ids[a]), b - a) for i, (a, b) in enumerate(pairs))


def cached(
    pattern: SparsePattern, seen: int, padding: int, head: int, length: int | None = None
) -> Axis:
    """Return what a sparse layer's cache holds of one row after `seen` columns, filled up with
    padding to `length`."""
    runs = [Run(0, a, b - a) for a, b in pattern.kept_ranges(max(seen - padding, 0), head)]
    held = sum(run.length for run in runs)
    if length is not None and length > held:
        runs.append(Run(PADDING, 0, length - held))
    return tuple(runs)


# Few: an entry is as long as a sequence.
@lru_cache(maxsize=64)
def _expand(axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    if not axis:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    documents = np.repeat([run.document for run in axis], [run.length for run in axis])
    positions = np.concatenate([np.arange(run.start, run.start + run.length) for run in axis])
    return documents.astype(np.int32), positions.astype(np.int32)


def axis_length(axis: Axis) -> int:
    """Return the number of tokens (columns) of an axis."""
    return sum(run.length for run in axis)


def cut(axis: Axis, start: int, stop: int) -> Axis:
    """Return columns [start, stop) of an axis."""
    runs = []
    column = 0
    for document, first, length in axis:
        a, b = max(start - column, 0), min(stop - column, length)
        if a < b:
            runs.append(Run(document, first + a, b - a))
        column += length
    return tuple(runs)


@dataclass(frozen=True, slots=True)
class Layout:
    """Say where the tokens of a query tensor (B, T, H, D) and a key tensor (B, S, Hkv, D) come
    from.

    Attributes:
        queries: one axis a batch row, or a single one that all rows share.
        keys: for each batch row (or one for all) one axis a key/value head, or a single one that
            all heads share.
    """

    queries: tuple[Axis, ...]
    keys: tuple[tuple[Axis, ...], ...]

    def __post_init__(self) -> None:
        rows = {len(self.queries), len(self.keys)} - {1}
        heads = {len(row) for row in self.keys}
        queries = {axis_length(axis) for axis in self.queries}
        keys = {axis_length(axis) for row in self.keys for axis in row}
        if len(rows) > 1 or any(len(found) != 1 for found in (heads, queries, keys)):
            raise UsageError(
                f"A layout has {len(self.queries)} rows of {sorted(queries)} queries and "
                f"{len(self.keys)} rows of {sorted(heads)} heads with {sorted(keys)} keys; rows "
                "and heads must be as long as each other. Fill the shorter ones with padding."
            )

    @classmethod
    def causal(cls, num_queries: int, num_keys: int | None = None) -> Layout:
        """Return the layout of one unpadded document whose last `num_queries` of `num_keys` tokens
        are the queries."""
        num_keys = num_queries if num_keys is None else num_keys
        if num_keys < num_queries:
            raise UsageError(
                f"There are {num_queries} queries but only {num_keys} keys; give keys for every "
                "query."
            )
        return cls((contiguous(num_queries, num_keys - num_queries),), ((contiguous(num_keys),),))

    @classmethod
    def packed(cls, cu_seqlens: Sequence[int]) -> Layout:
        """Return the layout of documents packed into one sequence."""
        axis = packed(cu_seqlens)
        return cls((axis,), ((axis,),))

    @classmethod
    def of_rows(cls, rows: Iterable[Axis]) -> Layout:
        """Return the layout of rows that attend to themselves (no cache); equal rows are shared."""
        axes = tuple(rows)
        if len(set(axes)) == 1:
            axes = axes[:1]
        return cls(axes, tuple((axis,) for axis in axes))

    @property
    def num_queries(self) -> int:
        """Number of query columns T."""
        return axis_length(self.queries[0])

    @property
    def num_keys(self) -> int:
        """Number of key columns S."""
        return axis_length(self.keys[0][0])

    @property
    def num_rows(self) -> int:
        """Batch rows that differ (1: all the same)."""
        return max(len(self.queries), len(self.keys))

    @property
    def num_key_heads(self) -> int:
        """Key/value heads whose keys differ in place (1: all the same)."""
        return max(len(row) for row in self.keys)

    def row(self, index: int) -> tuple[Axis, tuple[Axis, ...]]:
        """Return the query axis and the key axes of one batch row."""
        return (
            self.queries[index if len(self.queries) > 1 else 0],
            self.keys[index if len(self.keys) > 1 else 0],
        )

    @property
    def is_causal(self) -> bool:
        """Whether queries and keys are the same unpadded document from its start: the plain
        training case."""
        return (
            self.num_rows == 1
            and self.num_key_heads == 1
            and len(self.queries[0]) == 1
            and self.queries[0][0].document != PADDING
            and self.queries[0] == self.keys[0][0]
        )

    def sees_everything(self, pattern: SparsePattern, head_offset: int = 0) -> bool:
        """Whether the only query of every row sees every key, so that decoding needs no mask at
        all."""
        if self.num_queries != 1:
            return False
        for index in range(self.num_rows):
            query, heads = self.row(index)
            document, position, _ = query[0]
            for head, axis in enumerate(heads):
                if any(run.document != document or document == PADDING for run in axis):
                    return False
                if (
                    len(heads) == 1
                    and pattern.num_head_classes > 1
                    and not pattern.covers(position + 1)
                ):
                    return False
                ranges = pattern.key_ranges(position, position + 1, head_offset + head)
                if not all(
                    any(a <= run.start and run.start + run.length <= b for a, b in ranges)
                    for run in axis
                ):
                    return False
        return True

    def query_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (documents, positions) of the queries, each (rows or 1, T), int32."""
        places = [_expand(axis) for axis in self.queries]
        return np.stack([p[0] for p in places]), np.stack([p[1] for p in places])

    def key_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (documents, positions) of the keys, each (rows or 1, heads or 1, S), int32."""
        rows = [[_expand(axis) for axis in heads] for heads in self.keys]
        return tuple(np.stack([np.stack([p[i] for p in row]) for row in rows]) for i in (0, 1))  # type: ignore[return-value]

    def dense_mask(
        self, pattern: SparsePattern, num_key_value_heads: int, head_offset: int = 0
    ) -> np.ndarray:
        """Return the oracle: bool (rows or 1, heads or 1, T, S), True where a query sees a key.

        For tests and the reference only: it takes T * S bytes.
        """
        q_documents, q_positions = self.query_places()
        k_documents, k_positions = self.key_places()
        heads = np.arange(head_offset, head_offset + num_key_value_heads)[None, :, None, None]
        if pattern.num_head_classes == 1 and self.num_key_heads == 1:
            heads = heads[:, :1]
        q_documents, q_positions = q_documents[:, None, :, None], q_positions[:, None, :, None]
        k_documents, k_positions = k_documents[:, :, None, :], k_positions[:, :, None, :]
        same = (q_documents == k_documents) & (q_documents != PADDING)
        return same & pattern.visible(q_positions, k_positions, heads)
