"""What tables are made from: kinds of layout, gathered blocks, masks as text, and the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longgen.attention.flash import plan
from longgen.attention.flash.plan import (
    TILE_K,
    Mask,
    Tables,
    _gather,
    documents_alone,
    is_plain,
    tables,
)
from longgen.layout import PADDING, Axis, Layout, Run, axis_length, contiguous, packed, padded
from longgen.pattern import SparsePattern

LayoutMask = Callable[..., torch.Tensor]

STRIDED = SparsePattern.block_sparse(block_size=16, stride_blocks=3)
SINK = SparsePattern(block_size=16, sink_blocks=1, local_blocks=2)
# Aligned with key tiles, so that strides stay where they are.
ALIGNED = SparsePattern.block_sparse(block_size=TILE_K, stride_blocks=3)


def layout_of(queries: Sequence[Axis], *keys: Sequence[Axis]) -> Layout:
    return Layout(tuple(queries), tuple(tuple(row) for row in keys))


ONE = contiguous(50)
PLAIN = {
    "causal": (Layout.causal(50), True),
    "offset": (Layout.causal(50, 80), True),
    "equal rows": (Layout.of_rows([ONE, ONE]), True),
    "another document's number": (Layout.of_rows([(Run(7, 0, 50),)]), True),
    "queries before the end": (layout_of([contiguous(50, 20)], [contiguous(80)]), False),
    "queries behind the end": (layout_of([contiguous(50, 40)], [contiguous(80)]), False),
    "mid-document": (Layout.of_rows([contiguous(50, 7)]), False),
    "two documents": (Layout.packed([0, 20, 50]), False),
    "another document": (layout_of([(Run(0, 0, 50),)], [(Run(1, 0, 50),)]), False),
    "two rows": (Layout.of_rows([ONE, padded(50, 0, 3)]), False),
    "rows of keys": (layout_of([ONE], [ONE], [contiguous(50)]), False),
    "heads of keys": (layout_of([ONE], [ONE, ONE]), False),
    "padding": (Layout.of_rows([padded(50, 0, 50)]), False),
    "left-padded": (Layout.of_rows([padded(50, 0, 9)]), False),
    "keys with a gap": (layout_of([contiguous(30, 40)], [(Run(0, 0, 20), Run(0, 40, 30))]), False),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_layouts(name: str) -> None:
    layout, expected = PLAIN[name]
    assert is_plain(layout) is expected


ALONE = {
    "causal": (Layout.causal(50), [0, 50]),
    "packed": (Layout.packed([0, 20, 50]), [0, 20, 50]),
    "rows that share an axis": (Layout.of_rows([packed([0, 20, 50])] * 2), [0, 20, 50]),
    "two rows": (Layout.of_rows([packed([0, 20, 50]), ONE]), [0, 20, 50, 100]),
    "the same document in two rows": (
        Layout.of_rows([(Run(0, 0, 50),), (Run(0, 0, 20), Run(1, 0, 30))]),
        [0, 50, 70, 100],
    ),
    "shared queries, rows of equal keys": (layout_of([ONE], [ONE], [ONE]), [0, 50, 100]),
    "offset": (Layout.causal(50, 80), None),
    "mid-document": (Layout.of_rows([contiguous(50, 7)]), None),
    "second document from its middle": (Layout.of_rows([(Run(0, 0, 20), Run(1, 5, 30))]), None),
    "second row from its middle": (Layout.of_rows([ONE, contiguous(50, 7)]), None),
    "left-padded": (Layout.of_rows([padded(50, 0, 9)]), None),
    "padding behind": (Layout.of_rows([(Run(0, 0, 40), Run(PADDING, 0, 10))]), None),
    "a document in two pieces": (
        Layout.of_rows([(Run(0, 0, 20), Run(1, 0, 10), Run(0, 0, 20))]),
        None,
    ),
    "other keys": (layout_of([(Run(0, 0, 50),)], [(Run(1, 0, 50),)]), None),
    "heads of keys": (layout_of([ONE], [ONE, ONE]), None),
}


@pytest.mark.parametrize("name", ALONE)
def test_documents_alone(layout_mask: LayoutMask, name: str) -> None:
    layout, expected = ALONE[name]
    assert documents_alone(layout) == expected
    if expected is None:
        return
    # What kernels make of cumulative lengths is what the layout says.
    mask = layout_mask(SparsePattern.full(), layout, 1)[:, 0]
    bounds = torch.tensor(expected)
    token = torch.arange(layout.num_rows * 50)
    document = torch.bucketize(token, bounds, right=True)
    seen = ((document[:, None] == document) & (token[:, None] >= token)).view(-1, 50, *token.shape)
    for row in range(layout.num_rows):
        assert torch.equal(seen[row, :, row * 50 : (row + 1) * 50], mask[row])
        assert seen[row].sum() == mask[row].sum()


RUNS = st.lists(
    st.builds(Run, st.sampled_from((PADDING, 0, 1, 2)), st.integers(0, 200), st.integers(1, 150)),
    min_size=1,
    max_size=4,
    unique_by=lambda run: run.document,
).map(tuple)
WITH_STRIDE = st.from_type(SparsePattern).filter(lambda pattern: pattern.stride_blocks > 1)


@given(WITH_STRIDE, st.lists(RUNS, min_size=1, max_size=3), st.booleans(), st.integers(0, 5))
def test_gathered_columns_are_the_strided_blocks(
    pattern: SparsePattern, axes: list[Axis], by_head: bool, head_offset: int
) -> None:
    """Of each head, document by document, in order, without the sinks, and nothing else."""
    length = max(axis_length(axis) for axis in axes)
    axes = [
        axis
        + ((Run(PADDING, 0, length - axis_length(axis)),) if axis_length(axis) < length else ())
        for axis in axes
    ]
    heads = len(axes) if by_head else 2
    keys = (tuple(axes),) if by_head else tuple((axis,) for axis in axes)
    layout = Layout((contiguous(5),), keys)
    gathered, columns = _gather(pattern, layout, heads, head_offset)
    assert columns.shape[:2] == (len(keys), heads) and columns.dtype == np.int64
    assert columns.shape[2] == gathered.num_keys and gathered.num_keys % TILE_K == 0
    assert gathered.queries == layout.queries and gathered.num_key_heads == heads
    documents, positions = layout.key_places()
    found_documents, found_positions = gathered.key_places()
    longest = 0
    for row in range(len(keys)):
        for head in range(heads):
            own = head if by_head else 0
            document, position = documents[row, own], positions[row, own]
            block = position // pattern.block_size
            shifted = block + (head + head_offset) * pattern.head_shift
            strided = (shifted % pattern.stride_blocks == 0) & (block >= pattern.sink_blocks)
            expected = np.flatnonzero(strided & (document != PADDING))
            held = len(expected)
            longest = max(longest, held)
            assert columns[row, head, :held].tolist() == expected.tolist()
            # The rest adds nothing to the column that it points at.
            assert not columns[row, head, held:].any()
            assert (found_documents[row, head, held:] == PADDING).all()
            assert (found_documents[row, head, :held] == document[expected]).all()
            assert (found_positions[row, head, :held] == position[expected]).all()
    assert gathered.num_keys - max(longest, 1) < TILE_K


MASKS = st.builds(
    Mask,
    st.one_of(st.just(SparsePattern.full()), st.from_type(SparsePattern)),
    st.booleans(),
    st.integers(1, 8),
    st.integers(0, 9),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 8),
)


@given(MASKS, MASKS)
def test_masks_survive_as_text(mask: Mask, other: Mask) -> None:
    assert Mask.decode(mask.encode()) == mask
    assert (mask.encode() == other.encode()) == (mask == other)


def make(
    pattern: SparsePattern = STRIDED,
    layout: Layout | None = None,
    gradients: bool = True,
    head_offset: int = 0,
) -> Tables:
    layout = layout or Layout.packed([0, 80, 300])
    return tables(pattern, layout, 1, 4, 2, head_offset, (128, 64), torch.device("cpu"), gradients)


def tensors(made: Tables) -> list[torch.Tensor]:
    return [*made.forward, *made.backward, *made.strided]


def test_layers_share_tables() -> None:
    """Layouts are made anew in every forward pass; equal ones are the same."""
    made = make()
    assert make(layout=Layout.packed([0, 80, 300])) is made
    assert make(layout=Layout.packed([0, 81, 300])) is not made
    assert make(SINK) is not made
    assert make(gradients=False) is not made


def test_few_tables_are_kept() -> None:
    limit = plan.tables.cache_info().maxsize
    assert limit is not None and limit <= 16
    for length in range(100, 100 + 2 * limit):
        make(layout=Layout.causal(length))
    assert plan.tables.cache_info().currsize == limit


@pytest.mark.parametrize("pattern", [SINK, STRIDED, ALIGNED], ids=["sink", "strided", "aligned"])
def test_tables_made_in_inference_mode_are_usable_in_training(pattern: SparsePattern) -> None:
    with torch.inference_mode():
        made = make(pattern)
    assert make(pattern) is made
    assert not any(x.is_inference() or x.requires_grad for x in tensors(made))


def test_without_gradients_there_is_no_backward_table() -> None:
    made, trained = make(gradients=False), make()
    assert made.backward == made.strided == [] and made.strided_mask is None
    assert len(made.forward) == len(trained.forward) == 8
    assert all(torch.equal(a, b) for a, b in zip(made.forward, trained.forward, strict=True))


AFTER_A_GAP = Layout(((Run(0, 1280, 200),),), (((Run(0, 0, 128), Run(0, 1024, 456)),),))


@pytest.mark.parametrize(
    ("pattern", "layout", "by_places", "gathers", "tile_k"),
    [
        (SparsePattern.full(), Layout.causal(300), False, False, 128),
        (SparsePattern.full(), Layout.causal(300, 400), False, False, 128),
        (SparsePattern.full(), Layout.packed([0, 80, 300]), True, False, 128),
        (SINK, Layout.causal(300), False, False, 64),
        (SINK, Layout.packed([0, 80, 300]), True, False, 64),
        (STRIDED, Layout.causal(300), False, True, 64),
        (STRIDED, Layout.packed([0, 80, 300]), True, True, 64),
        (ALIGNED, Layout.causal(300), False, False, 128),
        (ALIGNED, Layout.packed([0, 80, 300]), True, True, 64),
        (ALIGNED, Layout.packed([0, 128, 300]), True, False, 128),
        # A sink, then the window of a prompt's later piece.
        (ALIGNED, AFTER_A_GAP, True, False, 128),
    ],
)
def test_kinds_of_tables(
    pattern: SparsePattern, layout: Layout, by_places: bool, gathers: bool, tile_k: int
) -> None:
    """Places are read where no formula gives them, strides gathered where they would cut tiles."""
    made = make(pattern, layout)
    assert (made.mask.by_places, made.tile_k) == (by_places, tile_k)
    assert made.backward_mask.by_places == by_places
    assert (len(made.forward), len(made.backward)) == ((8, 6) if by_places else (4, 2))
    assert (made.strided_mask is not None) == bool(made.strided) == gathers
    rest = made.backward_mask.pattern
    if gathers:
        assert made.strided_mask is not None
        assert made.strided_mask.only_strided and made.strided_mask.by_places
        assert made.strided_mask.pattern == pattern and rest.stride_blocks == 0
        assert len(made.strided) == 7
    else:
        only_diagonal = pattern == ALIGNED and not by_places
        assert rest == (SparsePattern.full() if only_diagonal else pattern)


@pytest.mark.parametrize(
    ("tiles_q", "seen", "forward", "backward"),
    [
        ((128, 64), 0, True, True),
        ((192, 64), 0, False, True),
        ((192, 128), 0, False, True),
        ((128, 128), 64, False, False),
        ((128, 64), 64, False, True),
        ((128, 64), 100, False, False),
        ((128, 64), 256, True, True),
    ],
)
def test_only_the_diagonal_cuts_tiles_within_blocks(
    tiles_q: tuple[int, int], seen: int, forward: bool, backward: bool
) -> None:
    """Then patterns share the kernel of the cheapest mask."""
    layout = Layout.causal(300, 300 + seen)
    made = tables(ALIGNED, layout, 1, 4, 2, 3, tiles_q, torch.device("cpu"), True)
    causal = Mask(SparsePattern.full(), group=2)
    assert (made.mask == causal, made.backward_mask == causal) == (forward, backward)


@pytest.mark.parametrize(
    ("layout", "heads", "where"),
    [
        (AFTER_A_GAP, 2, "cpu"),
        (AFTER_A_GAP, 1000, "cpu"),
        (Layout.causal(1000, 8000), 2, "cuda"),
        (Layout.packed([0, 30_000, 131_072]), 2, "cuda"),
    ],
)
def test_the_host_makes_small_lists_that_triton_does_not(
    layout: Layout, heads: int, where: str
) -> None:
    assert plan._where(ALIGNED, layout, heads, torch.device("cuda")).type == where
    assert plan._where(ALIGNED, layout, heads, torch.device("cpu")).type == "cpu"


def test_heads_that_repeat_share_a_mask() -> None:
    """A kernel is compiled for each mask."""
    assert make(head_offset=1).mask == make(head_offset=4).mask != make(head_offset=2).mask
    assert make(SINK, head_offset=1).mask == make(SINK, head_offset=2).mask


def test_places_go_on_behind_the_end() -> None:
    """Kernels read them for whole tiles."""
    layout = Layout.of_rows(padded(300, 0, n) for n in (0, 80))
    made = tables(STRIDED, layout, 2, 4, 2, 0, (192, 64), torch.device("cpu"), True)
    for places in (made.forward[4:], made.backward[2:]):
        assert [len(x) for x in places] == [856] * 4
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in places)
