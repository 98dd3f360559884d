"""The one definition of what a sparse layer sees: `SparsePattern`.

Everything else (dense masks, kernel block lists, cache contents, accounting, communication) is
derived from this file. Positions count tokens from the start of a document; `head` is always the
GLOBAL key/value head index.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from longgen.errors import UsageError

# Large enough that no document outgrows it, small enough for 32-bit index arithmetic in kernels.
_EVERY_BLOCK = 1 << 30

Range = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsePattern:
    """Describe a static, causal, block-anchored attention pattern (arXiv 2410.01485).

    With block size B, query block i = q // B, key block j = k // B and key/value head h:

        visible(q, k, h)  <=>  k <= q  and
            ( j < sink_blocks
              or  i - j < local_blocks
              or  (stride_blocks and (j + h * head_shift) % stride_blocks == 0) )

    Blocks are counted from the start of the document, so a key that drops out of sight never comes
    back. That is what lets a cache free it.

    Attributes:
        block_size: tokens in a block.
        sink_blocks: blocks at the start of the document that every query sees.
        local_blocks: most recent blocks that a query sees, its own block included.
        stride_blocks: every `stride_blocks`-th block stays visible; 0 turns the stride off.
        head_shift: how far the strided blocks move from one key/value head to the next, in blocks.
    """

    block_size: int = 128
    sink_blocks: int = 1
    local_blocks: int = 16
    stride_blocks: int = 0
    head_shift: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (
            ("block_size", 1),
            ("sink_blocks", 0),
            ("local_blocks", 1),
            ("stride_blocks", 0),
            ("head_shift", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise UsageError(
                    f"SparsePattern {name} is {value!r}; give a whole number of at least {lowest}."
                )
        if self.head_shift and not self.stride_blocks:
            raise UsageError(
                f"head_shift is {self.head_shift} but stride_blocks is 0: only strided blocks move "
                "from head to head. Set stride_blocks or leave head_shift at 0."
            )

    @classmethod
    def attention_sink(
        cls, block_size: int = 64, sink_blocks: int = 1, local_blocks: int = 32
    ) -> SparsePattern:
        """Return the paper's "LongGen w/ AttnSink": the first block and the 32 most recent blocks
        of 64 tokens."""
        return cls(block_size=block_size, sink_blocks=sink_blocks, local_blocks=local_blocks)

    @classmethod
    def block_sparse(
        cls,
        block_size: int = 64,
        stride_blocks: int = 64,
        local_blocks: int = 1,
        sink_blocks: int = 0,
        head_shift: int = 1,
    ) -> SparsePattern:
        """Return the paper's "LongGen w/ BlockSparse": every 64th block of 64 tokens, shifted by
        head, and the own block.

        The paper does not say how many local blocks it keeps or how heads are shifted; one of each
        is the least that works.
        """
        return cls(
            block_size=block_size,
            sink_blocks=sink_blocks,
            local_blocks=local_blocks,
            stride_blocks=stride_blocks,
            head_shift=head_shift,
        )

    @classmethod
    def full(cls) -> SparsePattern:
        """Return plain causal attention as a pattern, so that full layers go through the same
        code."""
        return cls(block_size=128, sink_blocks=0, local_blocks=_EVERY_BLOCK)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SparsePattern:
        """Rebuild a pattern from `to_dict`, naming any field that this version does not know."""
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            raise UsageError(
                f"The pattern has fields {sorted(unknown)} that this version of longgen does not "
                "know. Update longgen, or remove them."
            )
        return cls(**fields)

    def to_dict(self) -> dict[str, int]:
        """Return the fields as plain numbers, for a checkpoint's config."""
        return asdict(self)

    def __str__(self) -> str:
        if self.is_full:
            return "full causal"
        parts = []
        if self.sink_blocks:
            parts.append(f"{self.sink_blocks} sink")
        parts.append(f"{self.local_blocks} local")
        if self.stride_blocks:
            shift = f" shifted by {self.head_shift} a head" if self.head_shift else ""
            parts.append(f"one in {self.stride_blocks}{shift}")
        return f"{' + '.join(parts)} of {self.block_size}-token blocks"

    def visible(self, q: Any, k: Any, head: Any = 0) -> Any:
        """Say whether query position `q` sees key position `k` in key/value head `head`.

        Works on ints, numpy arrays and torch tensors alike (with broadcasting): kernels' mask
        functions, the reference and the oracle all call this one method.
        """
        if self.is_full:
            return k <= q
        i, j = q // self.block_size, k // self.block_size
        seen = i - j < self.local_blocks
        if self.sink_blocks:
            seen = seen | (j < self.sink_blocks)
        if self.stride_blocks:
            # Reduced first: a large shift must not overflow in 32-bit kernels.
            shift = self.head_shift % self.stride_blocks
            seen = seen | ((j + head * shift) % self.stride_blocks == 0)
        return (k <= q) & seen

    @property
    def is_full(self) -> bool:
        """Whether this is plain causal attention."""
        return self.local_blocks >= _EVERY_BLOCK

    def covers(self, length: int) -> bool:
        """Whether a document of `length` tokens sees no difference to full causal attention.

        It is so if the last query sees everything: what an earlier one misses, no later one sees.
        """
        everything = ((0, length),)
        return length < 1 or all(
            self.key_ranges(length - 1, length, head) == everything
            for head in range(self.num_head_classes)
        )

    @property
    def num_head_classes(self) -> int:
        """Number of consecutive heads after which the pattern repeats (1: all heads see the
        same)."""
        if not self.stride_blocks or self.head_shift % self.stride_blocks == 0:
            return 1
        return self.stride_blocks // math.gcd(self.stride_blocks, self.head_shift)

    def residue(self, head: int) -> int:
        """Return r such that key block j is strided for `head` exactly if j % stride_blocks ==
        r."""
        return (-head * self.head_shift) % self.stride_blocks if self.stride_blocks else 0

    def key_ranges(self, q_start: int, q_stop: int, head: int = 0) -> tuple[Range, ...]:
        """Return the token ranges [start, stop) that queries in [q_start, q_stop) of one document
        see, in order.

        This is what a rank that holds those queries must have, and what a cache must keep for them.
        """
        return _key_ranges(self, q_start, q_stop, head % self.num_head_classes)

    def kept_ranges(self, length: int, head: int = 0) -> tuple[Range, ...]:
        """Return the token ranges that a cache still needs after `length` tokens of a document:
        exactly those that the next query sees, since nothing that is out of its sight ever comes
        back."""
        ranges = (
            (start, min(stop, length)) for start, stop in self.key_ranges(length, length + 1, head)
        )
        return tuple((start, stop) for start, stop in ranges if start < stop)

    def num_kept(self, length: int, head: int = 0) -> int:
        """Return how many tokens `kept_ranges` holds."""
        return sum(stop - start for start, stop in self.kept_ranges(length, head))

    def cache_length(self, length: int, num_key_value_heads: int) -> int:
        """Return the tokens per head that a layer's cache allocates after `length` tokens.

        Heads share one buffer, so it is as long as its fullest head (heads differ by less than two
        blocks).
        """
        heads = range(min(num_key_value_heads, self.num_head_classes))
        return max(self.num_kept(length, head) for head in heads)

    def visible_pairs(self, length: int, head: int = 0) -> int:
        """Return the number of (query, key) pairs that a document of `length` tokens computes in
        one head."""
        if self.is_full:
            return length * (length + 1) // 2
        size = self.block_size
        i = np.arange(-(-length // size), dtype=np.int64)
        rows = np.minimum(size, length - i * size)
        first_local = np.maximum(i - self.local_blocks + 1, 0)
        sinks = np.minimum(self.sink_blocks, first_local)
        blocks = (i - first_local) + sinks
        if self.stride_blocks:
            below = (sinks, first_local)
            upto = [(bound - 1 - self.residue(head)) // self.stride_blocks for bound in below]
            blocks += upto[1] - upto[0]
        return int((rows * blocks * size + rows * (rows + 1) // 2).sum())

    def mean_visible_pairs(self, length: int, num_key_value_heads: int) -> float:
        """Return `visible_pairs` averaged over the key/value heads."""
        classes = self.num_head_classes
        counts = [
            self.visible_pairs(length, head) for head in range(min(classes, num_key_value_heads))
        ]
        return (
            sum(counts[head % classes] for head in range(num_key_value_heads)) / num_key_value_heads
        )


@lru_cache(maxsize=4096)
def _key_ranges(pattern: SparsePattern, q_start: int, q_stop: int, head: int) -> tuple[Range, ...]:
    if q_start >= q_stop:
        return ()
    if pattern.is_full:
        return ((0, q_stop),)
    size = pattern.block_size
    first_local = max(q_start // size - pattern.local_blocks + 1, 0)
    blocks: list[Range] = [(0, min(pattern.sink_blocks, first_local))]
    if pattern.stride_blocks:
        stride = pattern.stride_blocks
        first = pattern.sink_blocks + (pattern.residue(head) - pattern.sink_blocks) % stride
        blocks += [(j, j + 1) for j in range(first, first_local, stride)]
    merged: list[Range] = []
    # The local range runs to the last query itself; everything before it is whole blocks.
    for start, stop in [*((a * size, b * size) for a, b in blocks), (first_local * size, q_stop)]:
        if start >= stop:
            continue
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return tuple(merged)
