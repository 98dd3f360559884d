"""The engine's keys and values: pages for full layers, fixed slots for sparse ones."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
import torch

from longgen.engine.slots import SlotGeometry
from longgen.errors import UsageError
from longgen.hf.cache import cache_layout
from longgen.layout import PADDING, Layout
from longgen.plan import LayerPlan
from longgen.transfer import to_device

# How much larger than the first tokens' largest number later ones may be before they are clamped.
# It costs little: down to a 3,584th of that largest number, e4m3 still keeps three bits.
FP8_MARGIN = 8.0


def _to_eight_bits(new: torch.Tensor, scale: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Divide keys or values (T, Hkv, D) by a factor a head (Hkv,) and round them."""
    largest = torch.finfo(stored).max
    # Beyond the range PyTorch's conversion gives NaN on some devices.
    return (new / scale[:, None]).clamp(-largest, largest).to(stored)


def _from_eight_bits(held: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Undo it."""
    return (held.float() * scale[:, None]).to(dtype)


class Pool:
    """Hand out numbers 0 .. size - 1, lowest first, and take them back."""

    def __init__(self, size: int) -> None:
        self.size = size
        # A heap: pages in a row are read without gathering them.
        self._free = list(range(size))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """How many can still be handed out."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hand out `count` numbers; the caller has looked at `num_free`."""
        if count > len(self._free):
            raise RuntimeError(f"{count} asked for, {len(self._free)} are free")
        taken = [heappop(self._free) for _ in range(count)]
        self._used.update(taken)
        return taken

    def give_back(self, numbers: Sequence[int]) -> None:
        """Take numbers back."""
        for number in numbers:
            self._used.remove(number)
            heappush(self._free, number)


class EngineCache:
    """Hold the keys and values of all sequences that are running.

    Full layers keep tokens in pages that a sequence takes as it grows; its block table lists them.
    Sparse layers keep a slot of fixed length a sequence: what the pattern still needs, never more.

    Args:
        plan: which layers are full, and the others' pattern.
        num_key_value_heads: key/value heads Hkv.
        head_dim: head size D.
        num_pages: pages of a full layer.
        page_size: tokens a page.
        num_slots: sequences that can run at once.
        max_length: the longest sequence, in tokens.
        dtype: of keys and values; torch.float8_e4m3fn keeps them with a scale a layer and head, set
            by the first tokens that a layer sees.
        device: where they are.
    """

    def __init__(
        self,
        plan: LayerPlan,
        num_key_value_heads: int,
        head_dim: int,
        *,
        num_pages: int,
        page_size: int,
        num_slots: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.plan, self.page_size, self.max_length = plan, page_size, max_length
        self.num_heads = num_key_value_heads
        self.device = device
        self.pages, self.slots = Pool(num_pages), Pool(num_slots)
        self.geometry = SlotGeometry(plan.pattern, num_key_value_heads, max_length, device)
        # For pieces of prompts, whose lengths the host knows: nothing waits for the device.
        self.host_geometry = SlotGeometry(plan.pattern, num_key_value_heads, max_length)
        heads = (num_key_value_heads, head_dim)
        # For rows that only fill a batch up: what they write lands here and is never read. Slots
        # have one entry for it, the last.
        self.spare_page = num_pages
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for kind in plan.layers:
            if kind == "F":
                shape = (num_pages + 1, page_size, *heads)
            else:
                shape = (num_slots, self.geometry.capacity + 1, *heads)
            # Zeros, not whatever was there: what is masked out must still be a number.
            self.keys.append(torch.zeros(shape, dtype=dtype, device=device))
            self.values.append(torch.zeros(shape, dtype=dtype, device=device))
        # Factors (Hkv,) that turn what is stored into what was meant; None where they are the same.
        self.scales: list[torch.Tensor] | None = None
        if dtype == torch.float8_e4m3fn:
            self.scales = [torch.ones(2, num_key_value_heads, device=device) for _ in plan.layers]
        self._has_scales = [False] * len(plan.layers)
        self._to_eight_bits, self._from_eight_bits = _to_eight_bits, _from_eight_bits

    def encode(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn new keys and values (T, Hkv, D) into what a layer stores."""
        stored = self.keys[layer].dtype
        if self.scales is None:
            return k.to(stored), v.to(stored)
        largest = torch.finfo(stored).max
        if not self._has_scales[layer]:
            # The first tokens have the largest keys (attention sinks); the margin is for others.
            for scale, new in zip(self.scales[layer], (k, v), strict=True):
                # What is no number must not decide for all that follow.
                sizes = new.float().abs().nan_to_num(nan=0.0, posinf=0.0).amax((0, 2))
                scale.copy_(sizes.clamp(min=1e-4) * FP8_MARGIN / largest)
            self._has_scales[layer] = True
        to = self._to_eight_bits
        return to(k, self.scales[layer][0], stored), to(v, self.scales[layer][1], stored)

    def decode(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn stored keys and values (..., Hkv, D) of a layer into numbers of another dtype."""
        if self.scales is None:
            return k.to(dtype), v.to(dtype)
        back = self._from_eight_bits
        return back(k, self.scales[layer][0], dtype), back(v, self.scales[layer][1], dtype)

    def compile(self) -> None:
        """Have `torch.compile` make one kernel of each conversion to 8 bits and back, which takes
        several otherwise, over a whole prompt's keys and values."""
        if self.scales is not None:
            self._to_eight_bits = torch.compile(_to_eight_bits, dynamic=True)
            self._from_eight_bits = torch.compile(_from_eight_bits, dynamic=True)

    def clear_slot(self, slot: int) -> None:
        """Fill a slot with zeros: what is no number there would be none under a mask either."""
        for kind, *stores in zip(self.plan.layers, self.keys, self.values, strict=True):
            if kind != "F":
                for store in stores:
                    store[slot].zero_()

    @property
    def moves_tokens(self) -> bool:
        """Whether a new token moves others: strides in sparse layers keep what leaves the ring."""
        return "S" in self.plan.layers and self.geometry.num_strided > 0

    @property
    def num_bytes(self) -> int:
        """Bytes that all pages and slots hold, used or not, what is to spare too."""
        return sum(x.untyped_storage().nbytes() for x in (*self.keys, *self.values))

    def num_pages_for(self, length: int) -> int:
        """Return the pages that `length` tokens take in each full layer."""
        return -(-length // self.page_size) if "F" in self.plan.layers else 0

    def bytes_of(self, length: int) -> int:
        """Return the bytes that a sequence of `length` tokens takes, its whole slot counted."""
        total = 0
        for kind, keys in zip(self.plan.layers, self.keys, strict=True):
            token = 2 * keys.element_size() * keys.shape[2] * keys.shape[3]
            held = (
                self.num_pages_for(length) * self.page_size
                if kind == "F"
                else self.geometry.capacity + 1
            )
            total += held * token
        return total


class _Moves(NamedTuple):
    """Hold which entries of a slot take a token from where: maps, entries and sources, (n,)."""

    maps: torch.Tensor
    entries: torch.Tensor
    sources: torch.Tensor

    def apply(self, slot: torch.Tensor, source: torch.Tensor, by_head: bool) -> None:
        """Write from `source` (T, Hkv, D) into `slot` (C, Hkv, D); all is read before it."""
        if by_head:
            slot[self.entries, self.maps] = source[self.sources, self.maps]
        else:
            slot[self.entries] = source[self.sources]


class Span:
    """Describe the tokens of one sequence that go through the model in one step.

    Attributes:
        start: tokens of the sequence that the cache holds already.
        length: new tokens.
        slot: the sequence's slot.
        block_table: its pages, in order.
    """

    def __init__(
        self, cache: EngineCache, start: int, length: int, slot: int, block_table: Sequence[int]
    ) -> None:
        if length < 1 or start + length > cache.max_length:
            raise UsageError(
                f"A sequence of {start} tokens cannot grow by {length}: the engine was made for "
                f"1 to {cache.max_length} tokens."
            )
        self.cache, self.start, self.length, self.slot = cache, start, length, slot
        pattern, heads = cache.plan.pattern, cache.num_heads
        device = cache.device
        self.full_layout = Layout.causal(length, start + length)
        self.sparse_layout = cache_layout(pattern, start, length, (0,), heads)
        self.table = to_device(torch.tensor(list(block_table), dtype=torch.long), device)
        # Pages in a row need no gathering.
        first = block_table[0] if block_table else 0
        is_row = list(block_table) == list(range(first, first + len(block_table)))
        self.first_page = first if is_row else None
        self._places: slice | torch.Tensor
        if self.first_page is not None:
            begin = self.first_page * cache.page_size + start
            self._places = slice(begin, begin + length)
        else:
            places = torch.arange(start, start + length, device=device)
            page = places // cache.page_size
            self._places = self.table[page] * cache.page_size + places % cache.page_size
        self._held = self._held_entries()
        self._moves = self._entries_after()

    def _held_entries(self) -> torch.Tensor | None:
        """Return the entries that hold what the layout lists before the new keys, (num_maps, K)."""
        if not self.start:
            return None
        documents, positions = self.sparse_layout.key_places()
        old = self.sparse_layout.num_keys - self.length
        held = torch.from_numpy(np.where(documents != PADDING, positions, 0)[0, :, :old])
        entries = self.cache.host_geometry.entries(held[None].long(), torch.tensor([self.start]))
        return to_device(entries[0], self.cache.device)

    def _entries_after(self) -> tuple[_Moves | None, _Moves]:
        """Return what changes in the slot: entries that take another one's token, None if there are
        none, and those that take a new token."""
        geometry = self.cache.host_geometry
        before, after = (torch.tensor([n]) for n in (self.start, self.start + self.length))
        positions = geometry.positions(after)
        old_entries = geometry.entries(positions, before)
        entry = torch.arange(geometry.capacity)
        is_new = positions >= self.start
        moves = []
        for chosen, source in (
            ((positions >= 0) & ~is_new & (old_entries != entry), old_entries),
            (is_new, positions - self.start),
        ):
            maps, entries = chosen[0].nonzero(as_tuple=True)
            moves.append(
                _Moves(
                    *(
                        to_device(x, self.cache.device)
                        for x in (maps, entries, source[0][chosen[0]])
                    )
                )
            )
        kept, new = moves
        return (kept if len(kept.entries) else None), new

    def write_full(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store new keys and values (T, Hkv, D) in a full layer."""
        cache = self.cache
        stores = cache.keys[layer], cache.values[layer]
        for store, new in zip(stores, cache.encode(layer, k, v), strict=True):
            store.view(-1, *store.shape[2:])[self._places] = new

    def read_full(self, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values so far, (1, S, Hkv, D) each."""
        cache, length = self.cache, self.start + self.length
        count = cache.num_pages_for(length)
        pages: slice | torch.Tensor = self.table[:count]
        if self.first_page is not None:
            pages = slice(self.first_page, self.first_page + count)
        k, v = (
            store[pages].flatten(0, 1)[None, :length]
            for store in (cache.keys[layer], cache.values[layer])
        )
        return cache.decode(layer, k, v, dtype)

    def swap_sparse(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the new queries see, held and new, (1, S, Hkv, D) each; keep what later ones
        need.

        Args:
            layer: the sparse layer.
            k: new keys (T, Hkv, D).
            v: new values (T, Hkv, D).
        """
        cache, dtype = self.cache, k.dtype
        kept, fresh = self._moves
        seen = []
        stores = cache.keys[layer], cache.values[layer]
        for store, new in zip(stores, cache.encode(layer, k, v), strict=True):
            slot = store[self.slot]
            if self._held is None:
                seen.append(new[None])
            elif len(self._held) == 1:
                seen.append(torch.cat([slot[self._held[0]], new])[None])
            else:
                heads = torch.arange(cache.num_heads, device=cache.device)
                seen.append(torch.cat([slot[self._held.T, heads], new])[None])
            by_head = cache.geometry.num_maps > 1
            if kept is not None:
                kept.apply(slot, slot, by_head)
            fresh.apply(slot, new, by_head)
        return cache.decode(layer, seen[0], seen[1], dtype)
