"""A slot keeps exactly what the pattern still needs, in places that follow from the length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from longgen.engine.decode import slot_places
from longgen.engine.slots import SlotGeometry
from longgen.pattern import SparsePattern


@given(data=st.data(), pattern=st.from_type(SparsePattern))
def test_entries_hold_what_the_pattern_keeps(data: st.DataObject, pattern: SparsePattern) -> None:
    longest = data.draw(st.integers(1, 300))
    geometry = SlotGeometry(pattern, 4, longest)
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=4)))
    positions, visible = geometry.positions(lengths), geometry.visible(lengths)
    entries = geometry.entries(positions, lengths)
    for row, length in enumerate(lengths.tolist()):
        for head in range(geometry.num_maps):
            held = positions[row, head][positions[row, head] >= 0]
            assert len(set(held.tolist())) == len(held), "a token stands in two places"
            kept = {k for a, b in pattern.kept_ranges(length, head) for k in range(a, b)}
            assert kept <= set(held.tolist())
            seen = {k for k in range(length) if pattern.visible(length - 1, k, head)}
            assert set(positions[row, head][visible[row, head]].tolist()) == seen
            places = torch.arange(geometry.capacity)
            is_held = positions[row, head] >= 0
            assert torch.equal(entries[row, head][is_held], places[is_held])


@given(data=st.data(), pattern=st.from_type(SparsePattern))
def test_a_token_stays_where_it_is_until_it_leaves_the_ring(
    data: st.DataObject, pattern: SparsePattern
) -> None:
    """What a step moves is at most one token: the one whose place the new one takes."""
    length = data.draw(st.integers(2, 300))
    geometry = SlotGeometry(pattern, 3, 300)
    before, after = (geometry.positions(torch.tensor([n]))[0] for n in (length - 1, length))
    for head in range(geometry.num_maps):
        changed = (before[head] != after[head]).nonzero()[:, 0]
        new = (after[head] == length - 1).nonzero()[:, 0]
        assert len(new) == 1 and new[0] in changed
        others = changed[changed != new[0]]
        assert len(others) <= 1
        for entry in others.tolist():
            assert after[head, entry] == before[head, new[0]]
            assert pattern.visible(length + 10**6, int(after[head, entry]), head)


def test_a_slot_is_as_small_as_the_kept_tokens() -> None:
    """The paper's plan at 131,072 tokens: 2,112 entries, and no more than a block over for strides
    that differ between heads."""
    sink = SlotGeometry(SparsePattern.attention_sink(), 32, 131072)
    assert (sink.num_maps, sink.capacity) == (1, 2112)
    pattern = SparsePattern.block_sparse()
    strided = SlotGeometry(pattern, 32, 131072)
    assert strided.num_maps == 32
    assert strided.capacity <= pattern.cache_length(131072, 32) + 2 * pattern.block_size


@pytest.mark.parametrize("longest", [1, 2, 5])
def test_sequences_shorter_than_the_sinks(longest: int) -> None:
    geometry = SlotGeometry(SparsePattern(block_size=4, sink_blocks=2, local_blocks=1), 2, longest)
    assert geometry.capacity == longest
    held = geometry.positions(torch.tensor([longest]))[0, 0]
    assert held.tolist() == list(range(longest))


@pytest.mark.parametrize("stride", [0, 3])
def test_places_of_new_tokens_can_be_compiled_for_any_lengths(stride: int) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    pattern = SparsePattern(
        block_size=8, sink_blocks=1, local_blocks=2, stride_blocks=stride, head_shift=stride // 3
    )
    geometry = SlotGeometry(pattern, 4, 500)
    compiled = torch.compile(slot_places, dynamic=True, backend=counter, fullgraph=True)
    for number in (2, 3, 5):
        lengths = torch.randint(1, 500, (number,))
        for found, meant in zip(
            compiled(geometry, lengths), slot_places(geometry, lengths), strict=True
        ):
            assert (found is meant is None) or torch.equal(found, meant)
    assert counter.frame_count == 1


def test_a_row_that_is_no_sequences_writes_behind_a_slot_and_sees_nothing(
    pattern: SparsePattern,
) -> None:
    geometry = SlotGeometry(pattern, 2, 40)
    places = slot_places(geometry, torch.tensor([0, 7, 0]))
    assert (places.entries[[0, 2]] == geometry.capacity).all()
    assert (places.entries[1] < geometry.capacity).all()
    if places.moved is not None:
        assert torch.equal(places.moved[[0, 2]], places.entries[[0, 2]])
    assert not places.visible[[0, 2]].any() and places.visible[1].any()
