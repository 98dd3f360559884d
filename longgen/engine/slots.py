"""Where a sparse layer's slot keeps which token.

A slot is a buffer of fixed length for one sequence: the sinks, then a ring of the most recent
tokens, then, for patterns with a stride, the strided blocks that have left the ring. Nothing is
stored about places: they follow from how many tokens the sequence has seen.
"""

from __future__ import annotations

import torch

from longgen.pattern import SparsePattern


class SlotGeometry:
    """Say which position stands in which entry of a slot, and the other way round.

    Attributes:
        pattern: the sparse layers' pattern.
        num_maps: key/value heads that keep tokens of their own: 1 if all keep the same.
        num_sinks: entries of sink tokens, at the start.
        num_ring: entries of the ring behind them.
        num_strided: entries of strided tokens behind those.
    """

    def __init__(
        self,
        pattern: SparsePattern,
        num_key_value_heads: int,
        max_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Lay out a slot.

        Args:
            pattern: the sparse layers' pattern.
            num_key_value_heads: key/value heads Hkv.
            max_length: the longest sequence, in tokens.
            device: where places are computed.
        """
        self.pattern = pattern
        self.num_maps = num_key_value_heads if pattern.num_head_classes > 1 else 1
        self.device = torch.device(device)
        size = pattern.block_size
        self.num_sinks = min(pattern.sink_blocks * size, max_length)
        self.num_ring = min(pattern.local_blocks * size, max_length - self.num_sinks)
        heads = range(self.num_maps)
        first = [self._first_strided(head) for head in heads]
        self.num_strided = 0
        if pattern.stride_blocks:
            # Tokens enter when the ring has gone round.
            left = max_length - self.num_ring
            held = [len(range(j * size, left, pattern.stride_blocks * size)) for j in first]
            self.num_strided = max(held) * size
        self._first = torch.tensor(first, device=self.device)
        self._heads = torch.arange(self.num_maps, device=self.device)
        # Which part each entry belongs to: bool (C,) for sinks, ring, strided.
        entry, ring = (
            torch.arange(self.capacity, device=self.device),
            self.num_sinks + self.num_ring,
        )
        self._parts = (
            entry < self.num_sinks,
            (entry >= self.num_sinks) & (entry < ring),
            entry >= ring,
        )

    def _first_strided(self, head: int) -> int:
        """Return the first strided block behind the sinks."""
        if not self.pattern.stride_blocks:
            return 0
        begin = self.pattern.sink_blocks
        return begin + (self.pattern.residue(head) - begin) % self.pattern.stride_blocks

    @property
    def capacity(self) -> int:
        """Entries of a slot, a head."""
        return self.num_sinks + self.num_ring + self.num_strided

    def positions(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return the position in every entry after so many tokens, -1 where there is none.

        Args:
            lengths: tokens seen by each sequence, (N,).

        Returns:
            (N, num_maps, C).
        """
        lengths = lengths.to(self.device)[:, None, None]
        entry = torch.arange(self.capacity, device=self.device)[None, None, :]
        sink, ring, strided = self._parts
        positions = torch.where(sink & (entry < lengths), entry, -1).expand(
            len(lengths), self.num_maps, -1
        )
        if self.num_ring:
            # The latest position before `lengths` that falls on this entry of the ring.
            offset = entry - self.num_sinks
            last = lengths - self.num_sinks - 1
            latest = last - (last - offset) % self.num_ring
            held = ring & (last >= 0) & (latest >= 0)
            positions = torch.where(held, latest + self.num_sinks, positions)
        if self.num_strided:
            size, stride = self.pattern.block_size, self.pattern.stride_blocks
            offset = (entry - self.num_sinks - self.num_ring).clamp(min=0)
            block = self._first[None, :, None] + offset // size * stride
            position = block * size + offset % size
            held = strided & (position < lengths - self.num_ring)
            positions = torch.where(held, position, positions)
        return positions

    def entries(self, positions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the entries that hold `positions` after so many tokens.

        Args:
            positions: (N, num_maps, K), each held by its head.
            lengths: tokens seen by each sequence, (N,).

        Returns:
            (N, num_maps, K); undefined for positions that aren't held.
        """
        lengths = lengths.to(self.device)[:, None, None]
        behind = positions - self.num_sinks
        entry = torch.where(behind < 0, positions, self.num_sinks)
        if self.num_ring:
            entry = torch.where(behind >= 0, self.num_sinks + behind % self.num_ring, entry)
        if self.num_strided:
            size, stride = self.pattern.block_size, self.pattern.stride_blocks
            order = (positions // size - self._first[None, :, None]) // stride
            strided = self.num_sinks + self.num_ring + order * size + positions % size
            left = (behind >= 0) & (positions < lengths - self.num_ring)
            entry = torch.where(left, strided, entry)
        return entry

    def is_strided(self, positions: torch.Tensor) -> torch.Tensor:
        """Return which positions (N, num_maps, K) stay for their heads after the ring: bool."""
        block = positions // self.pattern.block_size - self._first[None, :, None]
        return (block >= 0) & (block % self.pattern.stride_blocks == 0)

    def visible(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return which entries the last token of each sequence sees: bool (N, num_maps, C)."""
        positions = self.positions(lengths)
        query = lengths.to(self.device)[:, None, None] - 1
        seen = self.pattern.visible(query, positions, self._heads[None, :, None])
        return (positions >= 0) & seen
