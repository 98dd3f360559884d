"""Lists of tiles against the dense mask, tile by tile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from longgen.attention.flash.lists import (
    FULL_COUNT,
    FULL_LAST,
    FULL_TURN,
    HEAD,
    KEY_TILE,
    MASK_COUNT,
    MASK_START,
    ROW,
    WORK_FIELDS,
    BackwardWork,
    backward_work,
    forward_lists,
    tile_maps,
    without,
)
from longgen.layout import PADDING, Axis, Layout, Run, axis_length, cached, contiguous, padded
from longgen.pattern import SparsePattern

LayoutMask = Callable[..., torch.Tensor]
Maps = tuple[torch.Tensor, torch.Tensor]

PATTERNS = st.one_of(st.just(SparsePattern.full()), *[st.from_type(SparsePattern)] * 3)
TILES = st.sampled_from((16, 64, 128, 192))
RUNS = st.lists(
    st.builds(Run, st.sampled_from((PADDING, 0, 0, 1)), st.integers(0, 300), st.integers(1, 200)),
    min_size=1,
    max_size=5,
)


def resized(runs: list[Run], length: int) -> Axis:
    """Cut an axis, or fill it up with padding."""
    axis, left = [], length
    for document, start, size in runs:
        axis.append(Run(document, start, min(size, left)))
        left -= axis[-1].length
    return tuple(run for run in (*axis, Run(PADDING, 0, left)) if run.length)


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """Draw a layout of up to two rows, and its number of key/value heads."""
    heads, rows = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    num_q, num_k = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    own = draw(st.sampled_from((1, heads)))
    queries = tuple(resized(draw(RUNS), num_q) for _ in range(draw(st.sampled_from((1, rows)))))
    keys = tuple(tuple(resized(draw(RUNS), num_k) for _ in range(own)) for _ in range(rows))
    return Layout(queries, keys), heads


LAYOUTS = st.one_of(
    _layouts(),
    st.builds(lambda n, m: (Layout.causal(n, n + m), 3), st.integers(1, 500), RUNS.map(len)),
)


def cut(mask: torch.Tensor, tile_q: int, tile_k: int) -> Maps:
    """Classify the tiles of a dense mask (R, H, T, S): any pair visible, all pairs visible."""
    rows, heads, num_q, num_k = mask.shape
    nq, nk = -(-num_q // tile_q), -(-num_k // tile_k)
    padded_mask = torch.zeros(rows, heads, nq * tile_q, nk * tile_k, dtype=torch.bool)
    padded_mask[:, :, :num_q, :num_k] = mask
    tiles = padded_mask.view(rows, heads, nq, tile_q, nk, tile_k)
    return tiles.any(5).any(3), tiles.all(5).all(3)


@given(PATTERNS, LAYOUTS, st.integers(0, 6), TILES, TILES)
def test_maps_are_the_masks_tiles(
    layout_mask: LayoutMask,
    pattern: SparsePattern,
    layout_and_heads: tuple[Layout, int],
    head_offset: int,
    tile_q: int,
    tile_k: int,
) -> None:
    layout, heads = layout_and_heads
    maps = tile_maps(pattern, layout, heads, head_offset, tile_q, tile_k, "cpu")
    expected = cut(layout_mask(pattern, layout, heads, head_offset), tile_q, tile_k)
    number = maps[0].shape[1]
    for actual, exact in zip(maps, expected, strict=True):
        assert actual.shape[0] == layout.num_rows and actual.shape[1] == number
        assert torch.equal(actual[:, torch.arange(heads) % number], exact)


@given(PATTERNS, LAYOUTS, st.integers(1, 4), TILES, TILES)
def test_forward_lists_hold_each_tile_once(
    layout_mask: LayoutMask,
    pattern: SparsePattern,
    layout_and_heads: tuple[Layout, int],
    group: int,
    tile_q: int,
    tile_k: int,
) -> None:
    layout, heads = layout_and_heads
    some, whole = cut(layout_mask(pattern, layout, heads), tile_q, tile_k)
    made = forward_lists(
        *tile_maps(pattern, layout, heads, 0, tile_q, tile_k, "cpu"), heads * group, group
    )
    assert all(x.dtype == torch.int32 for x in made)
    for counts, index, tiles in (
        (made.mask_count, made.mask_index, some & ~whole),
        (made.full_count, made.full_index, whole),
    ):
        assert counts.shape[0] in (1, len(some)) and counts.shape[1] in (1, heads * group)
        counts, index = (x.expand(len(some), heads * group, *x.shape[2:]) for x in (counts, index))
        for row, head, i in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            listed = index[row, head, i, : counts[row, head, i]].tolist()
            # Ascending: kernels begin at the end, where alone they check for the last key.
            assert listed == tiles[row, head // group, i].nonzero()[:, 0].tolist()


CAUSAL_512 = (Layout.causal(512), 1)


def unpacked(work: BackwardWork, row: list[int]) -> tuple[list[int], list[int]]:
    """Return the query tiles of a program that need a mask and those that do not, in order."""
    masked = work.tiles[row[MASK_START] : row[MASK_START] + row[MASK_COUNT]]
    last = row[FULL_LAST]
    return masked.tolist(), list(range(last, last - row[FULL_COUNT], -1))


@example(SparsePattern(block_size=128, sink_blocks=1, local_blocks=1), CAUSAL_512, 1, 1, 16)
@given(PATTERNS, LAYOUTS, st.integers(1, 4), st.integers(1, 2), TILES)
def test_each_program_has_the_query_tiles_of_its_key_tile(
    layout_mask: LayoutMask,
    pattern: SparsePattern,
    layout_and_heads: tuple[Layout, int],
    group: int,
    repeats: int,
    tile_q: int,
) -> None:
    layout, heads = layout_and_heads
    batch = layout.num_rows if layout.num_rows > 1 else repeats
    some, whole = cut(layout_mask(pattern, layout, heads), tile_q, 128)
    maps = tile_maps(pattern, layout, heads, 0, tile_q, 128, "cpu")
    work = backward_work(*maps, batch, heads * group, group)
    assert work.table.dtype == work.tiles.dtype == torch.int32
    assert work.table.shape[1] == WORK_FIELDS and work.table.is_contiguous()
    programs = [tuple(row[:3]) for row in work.table.tolist()]
    places = (range(some.shape[3]), range(heads * group), range(batch))
    assert (KEY_TILE, HEAD, ROW) == (0, 1, 2)
    assert sorted(programs) == [(j, h, b) for j in places[0] for h in places[1] for b in places[2]]
    for row in work.table.tolist():
        r, h, j = row[ROW] % len(some), row[HEAD] // group, row[KEY_TILE]
        visible, full = (x[r, h, :, j].nonzero()[:, 0].tolist() for x in (some, whole))
        masked, unmasked = unpacked(work, row)
        assert sorted(masked + unmasked) == visible
        # All without mask, where they are consecutive, and none where they are not.
        consecutive = full == list(range(full[0], full[-1] + 1)) if full else True
        assert unmasked == (full[::-1] if consecutive else [])
        # Only the order of those without mask may be turned, in programs that run long.
        assert masked == sorted(masked) and 0 <= row[FULL_TURN] < max(row[FULL_COUNT], 1)


def test_scattered_tiles_all_get_a_mask() -> None:
    whole = torch.tensor([1, 0, 1, 1], dtype=torch.bool).view(1, 1, 4, 1)
    some = torch.ones_like(whole)
    work = backward_work(some, whole, 1, 1, 1)
    assert unpacked(work, work.table[0].tolist()) == ([0, 1, 2, 3], [])
    whole[0, 0, 0] = False
    work = backward_work(some, whole, 1, 1, 1)
    assert unpacked(work, work.table[0].tolist()) == ([0, 1], [3, 2])


def test_tiles_that_many_queries_see_come_first_head_by_head() -> None:
    """Sinks are the first key tile; all others are seen by few."""
    pattern = SparsePattern(block_size=128, sink_blocks=1, local_blocks=2)
    maps = tile_maps(pattern, Layout.causal(4096), 2, 0, 64, 128, "cpu")
    table = backward_work(*maps, batch=2, num_heads=4, group=2).table
    first, rest = table[:8, :3].tolist(), table[8:, :3].tolist()
    assert first == [[0, h, b] for b in range(2) for h in range(4)]
    assert rest == [[j, h, b] for b in range(2) for h in range(4) for j in range(1, 32)]


def test_programs_with_nothing_to_do_are_kept() -> None:
    """They store zeros: nobody else writes the gradients of their keys."""
    layout = Layout((contiguous(100),), (((Run(PADDING, 0, 300), Run(0, 0, 100)),),))
    maps = tile_maps(SparsePattern.full(), layout, 1, 0, 64, 128, "cpu")
    table = backward_work(*maps, batch=1, num_heads=1, group=1).table
    assert sorted(table[:, KEY_TILE].tolist()) == [0, 1, 2, 3]
    empty = table[table[:, KEY_TILE] < 2]
    assert not empty[:, [MASK_COUNT, FULL_COUNT]].any()


@pytest.mark.parametrize("stride", [2, 4])
def test_without_leaves_pairs_that_are_not_taken(layout_mask: LayoutMask, stride: int) -> None:
    """A tile stays if some of its pairs may, and needs no mask only if all of them do."""
    rest = SparsePattern(block_size=64, sink_blocks=1, local_blocks=2)
    pattern = SparsePattern(
        block_size=64, sink_blocks=1, local_blocks=2, stride_blocks=stride, head_shift=1
    )
    layout = Layout.of_rows(padded(900, 0, n) for n in (0, 100))
    left = without(*(tile_maps(part, layout, 2, 0, 64, 128, "cpu") for part in (pattern, rest)))
    mask = layout_mask(pattern, layout, 2) & ~layout_mask(rest, layout, 2)
    some, whole = cut(mask, 64, 128)
    assert not (some & ~left[0]).any()
    assert torch.equal(left[1], whole)
    assert (left[0] & ~left[1]).any()


def test_heads_with_their_own_keys_have_their_own_maps(layout_mask: LayoutMask) -> None:
    pattern = SparsePattern.block_sparse(block_size=16, stride_blocks=5)
    kept = [cached(pattern, 300, 0, head) for head in range(3)]
    room = max(axis_length(axis) for axis in kept)
    keys = tuple(cached(pattern, 300, 0, head, room) + contiguous(50, 300) for head in range(3))
    layout = Layout((contiguous(50, 300),), (keys,))
    some, whole = tile_maps(pattern, layout, 3, 0, 64, 64, "cpu")
    assert some.shape[1] == 3
    assert torch.equal(some, cut(layout_mask(pattern, layout, 3), 64, 64)[0])
    assert not whole.any()
