"""Decoding: one new token for each of many sequences, all layers' bookkeeping on the device.

Nothing here depends on how long a sequence is but through tensors, so that a captured CUDA graph
serves any lengths.
"""

from __future__ import annotations

from functools import cached_property

import torch

from longgen.engine.cache import EngineCache
from longgen.engine.kernels import decode_attention


class DecodeBatch:
    """Describe one new token of each of N sequences.

    Args:
        cache: where their keys and values are.
        lengths: tokens of each sequence, the new one included, (N,).
        slots: their slots, (N,).
        block_tables: their pages in order, (N, most); what stands behind a sequence's own doesn't
            matter.
    """

    def __init__(
        self,
        cache: EngineCache,
        lengths: torch.Tensor,
        slots: torch.Tensor,
        block_tables: torch.Tensor,
    ) -> None:
        self.cache, self.lengths = cache, lengths
        self.slots, self.block_tables = slots, block_tables

    @classmethod
    def of(
        cls, cache: EngineCache, lengths: list[int], slots: list[int], tables: list[list[int]]
    ) -> DecodeBatch:
        """Make a batch from lists."""
        most = max((len(table) for table in tables), default=0)
        rows = [[*table, *[0] * (most - len(table))] for table in tables]
        device = cache.device
        return cls(
            cache,
            torch.tensor(lengths, device=device),
            torch.tensor(slots, device=device),
            torch.tensor(rows, device=device, dtype=torch.int32).view(len(rows), most),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def _page_and_offset(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the new tokens go in full layers: page and place in it, (N,) each."""
        position, size = self.lengths - 1, self.cache.page_size
        page = self.block_tables.gather(1, (position // size)[:, None]).long()
        return page[:, 0], position % size

    @cached_property
    def _entries(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the entries of the new tokens in a slot, (N, maps), and where the tokens that
        stand there now go: elsewhere if a stride keeps them, or nowhere (the same entries)."""
        geometry = self.cache.geometry
        position = (self.lengths - 1)[:, None, None].expand(-1, geometry.num_maps, 1)
        entries = geometry.entries(position, self.lengths)
        if not geometry.num_strided:
            return entries[..., 0], None
        leaving = position - geometry.num_ring
        kept = geometry.is_strided(leaving) & (leaving >= geometry.num_sinks)
        moved = torch.where(kept, geometry.entries(leaving, self.lengths), entries)
        return entries[..., 0], moved[..., 0]

    @cached_property
    def _visible(self) -> torch.Tensor:
        """Return which entries of their slots the new tokens see: bool (N, maps, C)."""
        return self.cache.geometry.visible(self.lengths)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store the new keys and values (N, Hkv, D) of a layer, and attend with q (N, H, D).

        Returns:
            (N, H, D).
        """
        cache = self.cache
        keys, values = cache.keys[layer], cache.values[layer]
        k, v = cache.encode(layer, k, v)
        out_scale = None
        if cache.scales is not None:
            # The stored keys' factor goes into the queries, the values' into the result.
            group = q.shape[1] // cache.num_heads
            key_scale, out_scale = cache.scales[layer].repeat_interleave(group, 1)[..., None]
            q, out_scale = (q * key_scale).to(q.dtype), out_scale.to(q.dtype)
        if cache.plan.layers[layer] == "F":
            page, offset = self._page_and_offset
            keys[page, offset], values[page, offset] = k, v
            out = decode_attention(
                q, keys, values, self.block_tables, scale=scale, lengths=self.lengths
            )
        else:
            self._store(keys, k)
            self._store(values, v)
            out = decode_attention(
                q, keys, values, self.slots[:, None], scale=scale, visible=self._visible
            )
        return out if out_scale is None else out * out_scale

    def _store(self, store: torch.Tensor, new: torch.Tensor) -> None:
        """Put new keys or values (N, Hkv, D) into their slots of a sparse layer."""
        cache, slots = self.cache, self.slots[:, None]
        entries, moved = self._entries
        heads = torch.arange(cache.num_heads, device=cache.device)[None]
        entries = entries.expand(-1, cache.num_heads)
        if moved is not None:
            places = moved.expand(-1, cache.num_heads)
            store[slots, places, heads] = store[slots, entries, heads]
        store[slots, entries, heads] = new
