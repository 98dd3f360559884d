from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longgen.errors import UsageError
from longgen.layout import (
    PADDING,
    Axis,
    Layout,
    Run,
    axis_length,
    cached,
    contiguous,
    from_position_ids,
    packed,
    padded,
)
from longgen.pattern import SparsePattern

DocumentMask = Callable[[SparsePattern, int, int], np.ndarray]
LayoutMask = Callable[..., torch.Tensor]

PATTERNS = st.one_of(st.just(SparsePattern.full()), st.from_type(SparsePattern))
LENGTHS = st.lists(st.integers(0, 150), min_size=1, max_size=5).filter(any)


def places(axis: Axis) -> list[tuple[int, int]]:
    return [(run.document, run.start + n) for run in axis for n in range(run.length)]


def bounds(lengths: list[int]) -> list[int]:
    return [0, *np.cumsum(lengths).tolist()]


@given(LENGTHS)
def test_packed_counts_each_document_from_its_start(lengths: list[int]) -> None:
    expected = [(i, n) for i, length in enumerate(lengths) for n in range(length)]
    axis = packed(bounds(lengths))
    assert places(axis) == expected
    assert axis_length(axis) == len(expected)
    assert all(run.length for run in axis)
    assert packed(torch.tensor(bounds(lengths))) == axis  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [[], [1, 4], [0, 5, 3]])
def test_wrong_cumulative_lengths_are_refused(wrong: list[int]) -> None:
    with pytest.raises(UsageError) as error:
        packed(wrong)
    assert str(error.value) == f"cu_seqlens is {wrong}; it must start at 0 and never fall."


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 60))
def test_padded_is_a_window_of_the_whole_row(length: int, start: int, padding: int) -> None:
    row = [PADDING] * padding + list(range(start + length))
    seen = places(padded(length, start, padding))
    assert [position if document != PADDING else PADDING for document, position in seen] == row[
        start : start + length
    ]
    assert all(document in (0, PADDING) for document, _ in seen)
    assert all(run.length for run in padded(length, start, padding))


def test_contiguous_is_one_run() -> None:
    assert places(contiguous(3, 5)) == [(0, 5), (0, 6), (0, 7)]
    assert contiguous(0) == ()


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=5))
def test_position_ids_split_where_they_do_not_count_on(runs: list[tuple[int, int]]) -> None:
    # A run that goes on where the one before it ended is no break.
    merged: list[list[int]] = []
    for start, length in runs:
        if merged and sum(merged[-1]) == start:
            merged[-1][1] += length
        else:
            merged.append([start, length])
    positions = np.concatenate([np.arange(a, a + n) for a, n in runs])
    expected = [(i, a + n) for i, (a, length) in enumerate(merged) for n in range(length)]
    assert places(from_position_ids(positions)) == expected
    assert len({run.document for run in from_position_ids(positions)}) == len(merged)


@given(PATTERNS, st.integers(1, 200), st.integers(0, 300), st.integers(1, 3))
def test_a_row_that_starts_within_a_document_keeps_its_blocks(
    document_mask: DocumentMask, pattern: SparsePattern, length: int, start: int, heads: int
) -> None:
    axis = from_position_ids(np.arange(start, start + length))
    mask = Layout.of_rows([axis]).dense_mask(pattern, heads)
    for head in range(heads):
        whole = document_mask(pattern, start + length, head)
        np.testing.assert_array_equal(mask[0, head % mask.shape[1]], whole[start:, start:])


@given(PATTERNS, LENGTHS, st.integers(1, 4), st.integers(0, 5))
def test_packed_documents_are_blind_to_each_other(
    document_mask: DocumentMask,
    pattern: SparsePattern,
    lengths: list[int],
    heads: int,
    head_offset: int,
) -> None:
    edges = bounds(lengths)
    expected = np.zeros((heads, edges[-1], edges[-1]), bool)
    for head in range(heads):
        for a, b in pairwise(edges):
            expected[head, a:b, a:b] = document_mask(pattern, b - a, head + head_offset)
    mask = Layout.packed(edges).dense_mask(pattern, heads, head_offset)
    np.testing.assert_array_equal(np.broadcast_to(mask, (1, *expected.shape))[0], expected)


@given(PATTERNS, st.integers(0, 400), st.integers(0, 30), st.integers(0, 7), st.integers(0, 80))
def test_a_cache_holds_what_its_pattern_keeps_and_then_padding(
    document_mask: DocumentMask,
    pattern: SparsePattern,
    seen: int,
    padding: int,
    head: int,
    spare: int,
) -> None:
    length = max(seen - padding, 0)
    later = document_mask(pattern, length + pattern.block_size + 1, head)[length:, :length].any(0)
    kept = [(0, int(n)) for n in np.flatnonzero(later)]
    assert places(cached(pattern, seen, padding, head)) == kept
    filled = places(cached(pattern, seen, padding, head, length=len(kept) + spare))
    assert filled[: len(kept)] == kept
    assert [document for document, _ in filled[len(kept) :]] == [PADDING] * spare
    # A buffer too short for its tokens is the caller's bug: none of them may quietly go.
    assert places(cached(pattern, seen, padding, head, length=0)) == kept


@given(
    PATTERNS,
    st.lists(st.integers(1, 120), min_size=1, max_size=6),
    st.lists(st.integers(0, 90), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_any_split_into_chunks_with_a_cache_sees_the_same_pairs(
    document_mask: DocumentMask,
    pattern: SparsePattern,
    chunks: list[int],
    paddings: list[int],
    heads: int,
    head_offset: int,
) -> None:
    """Chunked prefill and decode of left-padded rows, each head over what its own cache kept."""
    total = sum(chunks)
    seen = np.zeros((len(paddings), heads, total, total), int)
    start = 0
    for chunk in chunks:
        kept = [
            [cached(pattern, start, padding, head_offset + head) for head in range(heads)]
            for padding in paddings
        ]
        # All heads and rows share one buffer, so the shorter ones are filled up.
        room = max(axis_length(axis) for row in kept for axis in row)
        new = [padded(chunk, start, padding) for padding in paddings]
        layout = Layout(
            tuple(new),
            tuple(
                tuple(
                    cached(pattern, start, padding, head_offset + head, length=room) + new[row]
                    for head in range(heads)
                )
                for row, padding in enumerate(paddings)
            ),
        )
        assert (layout.num_queries, layout.num_keys) == (chunk, room + chunk)
        mask = layout.dense_mask(pattern, heads, head_offset)
        for row, padding in enumerate(paddings):
            for head in range(heads):
                columns = np.array(
                    [
                        n + padding if document != PADDING else -1
                        for document, n in places(layout.keys[row][head])
                    ]
                )
                pairs = mask[row, head]
                assert not pairs[:, columns < 0].any()
                for query in range(chunk):
                    np.add.at(seen[row, head, start + query], columns[pairs[query]], 1)
        start += chunk
    for row, padding in enumerate(paddings):
        length = max(total - padding, 0)
        for head in range(heads):
            whole = np.zeros((total, total), int)
            whole[total - length :, total - length :] = document_mask(
                pattern, length, head_offset + head
            )
            np.testing.assert_array_equal(seen[row, head], whole)


@given(PATTERNS, st.integers(1, 200), st.integers(0, 200), st.integers(1, 4))
def test_causal_layouts_put_the_queries_at_the_end(
    document_mask: DocumentMask, pattern: SparsePattern, queries: int, more: int, heads: int
) -> None:
    layout = Layout.causal(queries, queries + more)
    mask = np.broadcast_to(layout.dense_mask(pattern, heads), (1, heads, queries, queries + more))
    for head in range(heads):
        whole = document_mask(pattern, queries + more, head)
        np.testing.assert_array_equal(mask[0, head], whole[more:])
    assert layout.is_causal == (more == 0)


def test_fewer_keys_than_queries_are_refused() -> None:
    with pytest.raises(UsageError, match=r"5 queries but only 3 keys; give keys for every query"):
        Layout.causal(5, 3)


def test_rows_are_shared_where_they_are_equal() -> None:
    axis = padded(9, 0, 2)
    shared = Layout.of_rows([axis, axis, axis])
    assert shared == Layout((axis,), ((axis,),))
    assert (shared.num_rows, shared.num_key_heads) == (1, 1)
    mixed = Layout.of_rows([axis, contiguous(9), axis])
    assert mixed.num_rows == 3
    assert mixed.row(1) == (contiguous(9), (contiguous(9),))
    assert shared.row(2) == (axis, (axis,))
    assert hash(mixed) == hash(Layout.of_rows([axis, contiguous(9), axis]))


@pytest.mark.parametrize(
    ("layout", "causal"),
    [
        (Layout.causal(7), True),
        (Layout.of_rows([contiguous(7, 5)]), True),
        (Layout.packed([0, 7]), True),
        (Layout.packed([0, 3, 7]), False),
        (Layout.causal(7, 8), False),
        (Layout.of_rows([padded(7, 0, 2)]), False),
        (Layout.of_rows([padded(7, 0, 7)]), False),
        (Layout.of_rows([padded(7, 0, 1), padded(7, 0, 0)]), False),
        (Layout((contiguous(7),), ((contiguous(7), contiguous(7)),)), False),
        (Layout((contiguous(7, 1),), ((contiguous(7),),)), False),
        (Layout((contiguous(7),), (((Run(1, 0, 7),),),)), False),
    ],
)
def test_plain_training_is_told_apart(layout: Layout, causal: bool) -> None:
    assert layout.is_causal is causal


AXES = st.lists(
    st.builds(Run, st.sampled_from((PADDING, 0, 0, 0, 1)), st.integers(0, 300), st.integers(1, 40)),
    min_size=1,
    max_size=4,
).map(tuple)


@given(PATTERNS, st.data(), st.integers(1, 4), st.integers(0, 5))
def test_a_mask_is_left_out_only_where_it_hides_nothing(
    layout_mask: LayoutMask,
    pattern: SparsePattern,
    data: st.DataObject,
    heads: int,
    head_offset: int,
) -> None:
    """Some draws are random keys, some the keys that the query sees: decoding must tell."""
    position = data.draw(st.integers(0, 400))
    rows = data.draw(st.integers(1, 2))
    own = data.draw(st.booleans())
    axes: list[tuple[Axis, ...]] = []
    for _ in range(rows):
        if own:
            ranges = [
                pattern.key_ranges(position, position + 1, head_offset + h) for h in range(heads)
            ]
            axes.append(tuple(tuple(Run(0, a, b - a) for a, b in spans) for spans in ranges))
        else:
            axes.append((data.draw(AXES),))
    shortest = min(axis_length(axis) for row in axes for axis in row)
    if not own:  # Rows must be as long as each other: cut them all to the shortest.
        axes = [(cut(row[0], shortest),) for row in axes]
    elif len({axis_length(axis) for axis in axes[0]}) > 1:
        axes = [row[:1] for row in axes]
        heads = 1
    layout = Layout((contiguous(1, position),), tuple(axes))
    nothing_hidden = bool(layout_mask(pattern, layout, heads, head_offset).all())
    claimed = layout.sees_everything(pattern, head_offset)
    if claimed:
        assert nothing_hidden
    if own and (heads > 1 or pattern.num_head_classes == 1):
        assert claimed and nothing_hidden


def cut(axis: Axis, length: int) -> Axis:
    runs: list[Run] = []
    for run in axis:
        runs.append(run._replace(length=min(run.length, length)))
        length -= runs[-1].length
        if not length:
            break
    return tuple(runs)


def test_a_step_of_decoding_needs_no_mask() -> None:
    pattern = SparsePattern(block_size=4, sink_blocks=1, local_blocks=2)
    for seen in range(40):
        keys = cached(pattern, seen, 3, 0) + padded(1, seen, 3)
        decoding = Layout((padded(1, seen, 3),), ((keys,),))
        assert decoding.sees_everything(pattern) == (seen >= 3)
        assert decoding.sees_everything(SparsePattern.full()) == (seen >= 3)
    filled = cached(pattern, 20, 0, 0, length=30) + contiguous(1, 20)
    assert not Layout((contiguous(1, 20),), ((filled,),)).sees_everything(pattern)
    assert not Layout.causal(2).sees_everything(SparsePattern.full())


def test_each_head_is_held_to_its_own_pattern() -> None:
    """Caches of a shifted stride hold other tokens in each head, and no head needs a mask."""
    pattern = SparsePattern.block_sparse(block_size=4, stride_blocks=4)
    own = contiguous(1, 66)

    def decoding(*heads: int) -> Layout:
        return Layout((own,), (tuple(cached(pattern, 66, 0, head) + own for head in heads),))

    assert len({axis_length(axis) for axis in decoding(1, 2, 3, 4).keys[0]}) == 1
    assert len(set(decoding(1, 2, 3, 4).keys[0])) == 4
    assert decoding(1, 2, 3, 4).sees_everything(pattern, head_offset=1)
    assert decoding(1, 2, 3, 4).sees_everything(pattern, head_offset=5)
    assert not decoding(1, 2, 3, 4).sees_everything(pattern, head_offset=0)
    assert not decoding(1, 3, 2, 4).sees_everything(pattern, head_offset=1)


def test_heads_that_share_keys_but_not_a_pattern_need_a_mask() -> None:
    pattern = SparsePattern.block_sparse(block_size=4, stride_blocks=4)
    keys = tuple(Run(0, a, b - a) for a, b in pattern.key_ranges(50, 51, head=0))
    layout = Layout((contiguous(1, 50),), ((keys,),))
    assert not layout.sees_everything(pattern)
    # Unless the document is still so short that every head sees all of it.
    assert Layout.causal(1, 4).sees_everything(pattern)


@given(PATTERNS, st.lists(st.integers(0, 60), min_size=1, max_size=3), st.integers(1, 4))
def test_dense_mask_of_left_padded_rows(
    layout_mask: LayoutMask, pattern: SparsePattern, paddings: list[int], heads: int
) -> None:
    layout = Layout.of_rows(padded(60, 0, padding) for padding in paddings)
    mask = layout.dense_mask(pattern, heads)
    expected = layout_mask(pattern, layout, heads).numpy()
    np.testing.assert_array_equal(np.broadcast_to(mask, expected.shape), expected)
    for row, padding in enumerate(paddings[: len(mask)]):
        assert not mask[row, :, :padding].any()
        assert not mask[row, :, :, :padding].any()
