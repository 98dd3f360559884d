"""The hybrid cache of a transformers model: full layers keep every token, sparse layers only what
the pattern still needs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from longgen.errors import UsageError
from longgen.layout import PADDING, Axis, Layout, axis_length, cached, contiguous, padded
from longgen.pattern import SparsePattern
from longgen.plan import SPARSE_LAYER, LayerPlan

# What models' calls and outputs name the cache: transformers 5.24 renamed it.
CACHE_NAME = (
    "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
)


class _Rows:
    """Hold what all layers of one cache share: how many columns at the start of each batch row are
    padding."""

    def __init__(self) -> None:
        self.paddings: tuple[int, ...] = (0,)


def _distinct(paddings: tuple[int, ...]) -> tuple[int, ...]:
    """Shrink equal rows to one, so that they share their arithmetic and their block lists."""
    return paddings[:1] if len(set(paddings)) == 1 else paddings


@lru_cache(maxsize=256)
def _held(
    pattern: SparsePattern, seen: int, paddings: tuple[int, ...], num_heads: int
) -> tuple[tuple[Axis, ...], ...]:
    """Return what a sparse layer's buffers hold after `seen` columns: an axis a row and head, all
    equally long."""
    heads = range(num_heads if pattern.num_head_classes > 1 else 1)
    length = max(
        axis_length(cached(pattern, seen, padding, head)) for padding in paddings for head in heads
    )
    return tuple(
        tuple(cached(pattern, seen, padding, head, length) for head in heads)
        for padding in paddings
    )


def cache_layout(
    pattern: SparsePattern, seen: int, new: int, paddings: tuple[int, ...], num_heads: int
) -> Layout:
    """Return the layout of `new` query columns against a layer's cache of `seen` columns followed
    by the new keys.

    Args:
        pattern: the layer's pattern; a full one gives the layout of a cache that kept everything.
        seen: columns that went through the cache before.
        new: columns of this step.
        paddings: for each batch row the number of padding columns at its start.
        num_heads: key/value heads.
    """
    paddings = _distinct(paddings)
    queries = tuple(padded(new, seen, padding) for padding in paddings)
    if pattern.is_full or not seen:
        return Layout(queries, tuple((padded(seen + new, 0, padding),) for padding in paddings))
    held = _held(pattern, seen, paddings, num_heads)
    return Layout(
        queries,
        tuple(
            tuple(_join(axis, query) for axis in heads)
            for heads, query in zip(held, queries, strict=True)
        ),
    )


def _join(first: Axis, second: Axis) -> Axis:
    """Concatenate two axes, merging runs that continue one another so that equal layouts compare
    equal."""
    if first and second:
        a, b = first[-1], second[0]
        if a.document == b.document != PADDING and a.start + a.length == b.start:
            return (*first[:-1], a._replace(length=a.length + b.length), *second[1:])
    return first + second


@lru_cache(maxsize=16)
def _retained(
    pattern: SparsePattern,
    before: int,
    after: int,
    paddings: tuple[int, ...],
    num_heads: int,
    device: torch.device,
) -> torch.Tensor | None:
    """Return which columns of [held before | new] are held after: (rows, heads, S) indices, or None
    if all stay as they are."""
    source = cache_layout(pattern, before, after - before, paddings, num_heads)
    target = _held(pattern, after, paddings, num_heads)
    documents, positions = source.key_places()
    index = []
    for row, heads in enumerate(target):
        for head, axis in enumerate(heads):
            source_head = min(head, documents.shape[1] - 1)
            columns = np.flatnonzero(documents[row, source_head] != PADDING)
            wanted = Layout((contiguous(0),), ((axis,),)).key_places()
            is_token = wanted[0][0, 0] != PADDING
            chosen = np.zeros(len(is_token), np.int64)
            places = np.searchsorted(
                positions[row, source_head, columns], wanted[1][0, 0, is_token]
            )
            chosen[is_token] = columns[places]
            index.append(chosen)
    stacked = np.stack(index).reshape(len(target), len(target[0]), -1)
    if stacked.shape[2] == source.num_keys and (stacked == np.arange(source.num_keys)).all():
        return None
    # Shared by training and inference: inference tensors could not be saved for a backward pass.
    with torch.inference_mode(False):
        return torch.from_numpy(stacked).to(device)


class SparseLayer(DynamicLayer):
    """Cache one sparse layer: keys and values (B, Hkv, S, D) of exactly the tokens that later
    queries still see.

    `update` returns what this step's queries attend to (held tokens, then the new ones) and keeps
    only what the pattern needs after them. Positions follow from the pattern (`cache_layout`), so
    none are stored. With per-head strides each head keeps its own blocks.
    """

    _layer_type = SPARSE_LAYER
    keys: torch.Tensor | None
    values: torch.Tensor | None
    is_initialized: bool
    # Marks the layer as one that does not grow with the sequence for transformers' offloading.
    is_sliding = True
    is_croppable = False

    def __init__(
        self, pattern: SparsePattern | None = None, rows: _Rows | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if pattern is None:
            raise UsageError(
                "A LongGen model's cache needs the model's pattern: build it with "
                "longgen.hf.HybridCache(model.config) instead of transformers' DynamicCache."
            )
        self.pattern = pattern
        self.rows = rows or _Rows()
        self.seen = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add key and value states (B, Hkv, T, D); return those that the new queries attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, self.seen = self.seen, self.seen + key_states.shape[-2]
        keys, values = key_states, value_states
        if self.keys is not None and self.values is not None and before:
            keys = torch.cat([self.keys, keys], dim=-2)
            values = torch.cat([self.values, values], dim=-2)
        index = _retained(
            self.pattern,
            before,
            self.seen,
            _distinct(self.rows.paddings),
            keys.shape[1],
            keys.device,
        )
        self.keys, self.values = _take(keys, index), _take(values, index)
        return keys, values

    def get_seq_length(self) -> int:
        """Return the tokens seen (not the tokens held): positions count on from here."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the key length and offset that a mask over all seen tokens would have."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: the tokens that would come back into sight are gone."""
        if tokens_to_remove:
            raise UsageError(
                "A LongGen cache cannot be cropped: its sparse layers have freed what lies before "
                "their window. Start from a new cache (or a copy made earlier) instead."
            )


def _take(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    if index is None:
        return states
    rows, heads, length = index.shape
    if rows == heads == 1:
        return states.index_select(2, index[0, 0])
    shape = (states.shape[0], states.shape[1], length, states.shape[3])
    return states.gather(2, index[..., None].expand(shape))


class HybridCache(Cache):
    """Cache a LongGen model: `DynamicLayer` for full layers, `SparseLayer` for the others.

    Args:
        config: the model's config, or its `LayerPlan`.
    """

    def __init__(self, config: Any) -> None:
        plan = config if isinstance(config, LayerPlan) else config.layer_plan
        self.rows = _Rows()
        super().__init__(
            layers=[
                DynamicLayer() if kind == "F" else SparseLayer(plan.pattern, self.rows)
                for kind in plan.layers
            ]
        )

    @property
    def paddings(self) -> tuple[int, ...]:
        """Padding columns at the start of each batch row (one entry when all rows agree)."""
        return self.rows.paddings

    def set_paddings(self, paddings: Iterable[int]) -> None:
        """Say how many columns at the start of each row are padding.

        A row's padding is settled by its first token; until then it may grow from chunk to chunk.
        """
        new = tuple(paddings)
        seen = self.get_seq_length()
        old = self._spread(len(new))
        if any(a != b and min(a, b) < seen for a, b in zip(old, new, strict=True)):
            raise UsageError(
                f"The attention mask now says that the rows begin after {list(new)} columns of "
                f"padding, but the cache was filled with {list(self.rows.paddings)}. Masked "
                "columns may stand only at the start of a row, and must stay the same while a "
                "cache is in use."
            )
        self.rows.paddings = new

    def reset(self) -> None:
        """Forget everything, padding included."""
        super().reset()
        for layer in self.layers:
            # Older transformers zeroes a full layer's states but leaves them at their length.
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.rows.paddings = (0,)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse, before any layer gives tokens up: see `SparseLayer.crop`."""
        for layer in self.layers:
            if isinstance(layer, SparseLayer):
                layer.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def _spread(self, batch_size: int) -> tuple[int, ...]:
        paddings = self.rows.paddings
        return paddings * batch_size if len(paddings) == 1 else paddings

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch rows for beam search."""
        super().reorder_cache(beam_idx)
        paddings = self._spread(len(beam_idx))
        self.rows.paddings = tuple(paddings[i] for i in beam_idx.tolist())
        self._trim()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.rows.paddings = tuple(p for p in self.rows.paddings for _ in range(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the batch rows `indices`."""
        super().batch_select_indices(indices)
        if len(self.rows.paddings) > 1:
            self.rows.paddings = tuple(np.array(self.rows.paddings)[indices.cpu().numpy()].tolist())
            self._trim()

    def _trim(self) -> None:
        """Give up the columns that only rows which are gone had filled."""
        paddings = _distinct(self.rows.paddings)
        for layer in self.layers:
            if not isinstance(layer, SparseLayer) or layer.keys is None or layer.values is None:
                continue
            held = _held(layer.pattern, layer.seen, paddings, layer.keys.shape[1])
            columns = slice(axis_length(held[0][0]))
            layer.keys = layer.keys[:, :, columns].contiguous()
            layer.values = layer.values[:, :, columns].contiguous()


def cache_bytes(past_key_values: Cache) -> int:
    """Return the bytes of memory that a cache's keys and values hold (whole allocations, not just
    the views of them)."""
    storages = {}
    for layer in past_key_values.layers:
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if states is not None and states.numel():
                storage = states.untyped_storage()
                storages[(states.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())
