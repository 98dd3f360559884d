from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longgen.attention.tiles import tile_lists
from longgen.layout import (
    PADDING,
    Axis,
    Layout,
    Run,
    axis_length,
    cached,
    contiguous,
    packed,
    padded,
)
from longgen.pattern import SparsePattern

LayoutMask = Callable[..., torch.Tensor]

PATTERNS = st.one_of(st.just(SparsePattern.full()), st.from_type(SparsePattern))
TILES = st.sampled_from((1, 7, 16, 32, 48, 64, 100, 128, 256))
# Several heads at once, in any order, as a rank that holds the last ones would ask.
HEADS = st.lists(st.integers(0, 11), min_size=1, max_size=3)

# Anything goes: gaps, overlaps, documents out of order, padding in between, whole tiles.
AXES = st.lists(
    st.builds(
        Run, st.sampled_from((PADDING, 0, 0, 0, 1, 2)), st.integers(0, 300), st.integers(1, 200)
    ),
    min_size=1,
    max_size=5,
).map(tuple)


def by_counting(mask: torch.Tensor, tile_q: int, tile_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Classify the tiles of a dense mask (H, T, S) by cutting it into tiles."""
    heads, num_q, num_k = mask.shape
    tall, wide = -(-num_q // tile_q) * tile_q, -(-num_k // tile_k) * tile_k
    whole = torch.zeros(heads, tall, wide, dtype=torch.bool)
    whole[:, :num_q, :num_k] = mask
    tiles = whole.reshape(heads, tall // tile_q, tile_q, wide // tile_k, tile_k)
    return tiles.any(4).any(2), tiles.all(4).all(2)


def check(
    layout_mask: LayoutMask,
    pattern: SparsePattern,
    queries: Axis,
    keys: Axis,
    heads: list[int],
    tile_q: int,
    tile_k: int,
) -> None:
    layout = Layout((queries,), ((keys,),))
    mask = torch.cat([layout_mask(pattern, layout, 1, head)[0] for head in heads])
    some, whole = tile_lists(pattern, queries, keys, heads, tile_q=tile_q, tile_k=tile_k)
    expected_some, expected_whole = by_counting(mask, tile_q, tile_k)
    assert some.dtype == whole.dtype == torch.bool
    assert torch.equal(some, expected_some)
    assert torch.equal(whole, expected_whole)


@given(PATTERNS, st.integers(1, 600), st.integers(0, 300), HEADS, TILES, TILES)
def test_one_document(
    layout_mask: LayoutMask,
    pattern: SparsePattern,
    queries: int,
    earlier: int,
    heads: list[int],
    tile_q: int,
    tile_k: int,
) -> None:
    axis = contiguous(queries, earlier)
    check(layout_mask, pattern, axis, contiguous(queries + earlier), heads, tile_q, tile_k)


@given(PATTERNS, st.lists(st.integers(1, 300), min_size=1, max_size=5), HEADS, TILES, TILES)
def test_packed_documents(
    layout_mask: LayoutMask,
    pattern: SparsePattern,
    lengths: list[int],
    heads: list[int],
    tile_q: int,
    tile_k: int,
) -> None:
    axis = packed([sum(lengths[:n]) for n in range(len(lengths) + 1)])
    check(layout_mask, pattern, axis, axis, heads, tile_q, tile_k)


@given(PATTERNS, st.integers(1, 400), st.integers(0, 200), st.integers(0, 400), HEADS, TILES, TILES)
def test_left_padded_chunk_over_a_cache_with_gaps(
    layout_mask: LayoutMask,
    pattern: SparsePattern,
    chunk: int,
    padding: int,
    seen: int,
    heads: list[int],
    tile_q: int,
    tile_k: int,
) -> None:
    queries = padded(chunk, seen, padding)
    for head in heads:
        keys = cached(pattern, seen, padding, head, length=450) + queries
        check(layout_mask, pattern, queries, keys, [head], tile_q, tile_k)


@settings(max_examples=150)
@given(PATTERNS, AXES, AXES, HEADS, TILES, TILES)
def test_any_axes(
    layout_mask: LayoutMask,
    pattern: SparsePattern,
    queries: Axis,
    keys: Axis,
    heads: list[int],
    tile_q: int,
    tile_k: int,
) -> None:
    check(layout_mask, pattern, queries, keys, heads, tile_q, tile_k)


def test_tiles_are_128_tokens_unless_told_otherwise() -> None:
    axis = contiguous(300)
    some, whole = tile_lists(SparsePattern.full(), axis, axis, [0])
    assert some.tolist() == [[[True, False, False], [True, True, False], [True, True, True]]]
    # The last row of tiles has only 44 queries, so none of its tiles is whole.
    assert whole.tolist() == [[[False] * 3, [True, False, False], [False] * 3]]


@pytest.mark.parametrize("preset", [SparsePattern.attention_sink(), SparsePattern.block_sparse()])
def test_long_documents_have_few_tiles(preset: SparsePattern) -> None:
    """A million tokens: only closed forms can do this."""
    length = 1 << 20
    queries, keys = contiguous(128, length - 128), contiguous(length)
    some, whole = tile_lists(preset, queries, keys, [5])
    ranges = preset.key_ranges(length - 128, length, head=5)
    expected = {tile for a, b in ranges for tile in range(a // 128, (b - 1) // 128 + 1)}
    assert set(some[0, 0].nonzero()[:, 0].tolist()) == expected
    assert axis_length(keys) // 128 == some.shape[2]
    assert int((whole & ~some).sum()) == 0
    assert bool(whole[0, 0, -2]) == (preset.local_blocks > 3)
