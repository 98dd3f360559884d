"""Decoding: one new token for each of many sequences, all layers' bookkeeping on the device.

Nothing here depends on how long a sequence is but through tensors, so that a captured CUDA graph
serves any lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch

from longgen.engine.cache import EngineCache
from longgen.engine.kernels import Places, store_tokens
from longgen.engine.linear import Rotary, Seen, rotate_and_attend
from longgen.engine.slots import SlotGeometry


class SlotPlaces(NamedTuple):
    """Hold where one new token of each of N sequences goes in sparse layers, and what it sees.

    Attributes:
        entries: the new tokens' entries in a slot, (N, maps).
        moved: where the tokens that stand there now go: elsewhere if a stride keeps them, or
            nowhere (the same entries); None where there are no strides.
        visible: which entries the new tokens see, bool (N, maps, C).
    """

    entries: torch.Tensor
    moved: torch.Tensor | None
    visible: torch.Tensor


def slot_places(geometry: SlotGeometry, lengths: torch.Tensor) -> SlotPlaces:
    """Find the places of new tokens; `lengths` (N,) count them, 0 where a row is no sequence's."""
    position = (lengths - 1)[:, None, None].expand(-1, geometry.num_maps, 1)
    entries = geometry.entries(position, lengths)
    # Behind what a slot holds: nobody looks there.
    entries = torch.where(position < 0, geometry.capacity, entries)
    moved = None
    if geometry.num_strided:
        leaving = position - geometry.num_ring
        kept = geometry.is_strided(leaving) & (leaving >= geometry.num_sinks)
        moved = torch.where(kept, geometry.entries(leaving, lengths), entries)[..., 0]
    return SlotPlaces(entries[..., 0], moved, geometry.visible(lengths))


class DecodeBatch:
    """Describe one new token of each of N sequences.

    Args:
        cache: where their keys and values are.
        lengths: tokens of each sequence, the new one included, (N,). A row of 0 only fills the
            batch up: it sees nothing, and writes to the last entry of its slot.
        slots: their slots, (N,).
        block_tables: their pages in order, (N, most); what stands behind a sequence's own doesn't
            matter.
        find_places: `slot_places`, or what a compiler made of its many small operations.
    """

    def __init__(
        self,
        cache: EngineCache,
        lengths: torch.Tensor,
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        find_places: Callable[[SlotGeometry, torch.Tensor], SlotPlaces] = slot_places,
    ) -> None:
        self.cache, self.lengths, self._find_places = cache, lengths, find_places
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

    def prepare(self) -> None:
        """Find all that layers share now, not when the first of them asks."""
        layers = self.cache.plan.layers
        for kind in set(layers):
            self._target(layers.index(kind))
            self._seen(layers.index(kind))

    @cached_property
    def _page_and_offset(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the new tokens go in full layers: page (N,) and place in it (N, 1)."""
        position, size = (self.lengths - 1).clamp(min=0), self.cache.page_size
        page = self.block_tables.gather(1, (position // size)[:, None]).long()
        return page[:, 0], (position % size)[:, None]

    @cached_property
    def _places(self) -> SlotPlaces:
        return self._find_places(self.cache.geometry, self.lengths)

    @cached_property
    def _arrivals(self) -> torch.Tensor:
        """Return what programs that share a sequence and head count themselves by, (N, Hkv).

        Made once a step: layers take turns, and each leaves zeros behind.
        """
        shape = len(self), self.cache.num_heads
        return torch.zeros(shape, dtype=torch.int32, device=self.cache.device)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store the new keys and values (N, Hkv, D) of a layer, and attend with q (N, H, D).

        Returns:
            (N, H, D).
        """
        cache = self.cache
        stores = cache.keys[layer], cache.values[layer]
        scales = None if cache.scales is None else cache.scales[layer]
        places = self._target(layer)._asdict()
        if scales is None or not cache._has_scales[layer]:
            # The first tokens of a layer set its scales.
            k, v = cache.encode(layer, k, v)
            store_tokens(*stores, k, v, **places)
        else:
            store_tokens(*stores, k, v, **places, scales=scales)
        return self._seen(layer).attend(q, *stores, scale=scale, scales=scales)

    def rotate_and_attend(
        self, layer: int, qkv: torch.Tensor, rotary: Rotary, scale: float
    ) -> torch.Tensor:
        """Do as `attend` does, of what a layer's first product gives.

        Args:
            layer: index of a layer; one of an 8 bit cache has its scales.
            qkv: queries, keys and values end to end, (N, (H + 2 Hkv) D).
            rotary: what queries and keys are turned by.
            scale: factor on the scores.

        Returns:
            (N, H, D).
        """
        cache = self.cache
        assert cache.scales is None or cache._has_scales[layer]
        return rotate_and_attend(
            cache.keys[layer],
            cache.values[layer],
            qkv,
            rotary,
            num_heads=qkv.shape[1] // cache.keys[layer].shape[3] - 2 * cache.num_heads,
            places=self._target(layer),
            seen=self._seen(layer),
            scale=scale,
            scales=None if cache.scales is None else cache.scales[layer],
        )

    def _target(self, layer: int) -> Places:
        """Return where the new tokens go in a layer."""
        if self.cache.plan.layers[layer] == "F":
            pages, entries = self._page_and_offset
            return Places(pages, entries)
        return Places(self.slots, self._places.entries, self._places.moved)

    def _seen(self, layer: int) -> Seen:
        """Return what the new tokens see in a layer."""
        if self.cache.plan.layers[layer] == "F":
            return Seen(self.block_tables, lengths=self.lengths)
        return Seen(
            self.slots[:, None],
            held=self.cache.geometry.capacity,
            visible=self._places.visible,
            arrivals=self._arrivals,
        )
