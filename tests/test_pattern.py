from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from longgen.errors import UsageError
from longgen.pattern import SparsePattern

DocumentMask = Callable[[SparsePattern, int, int], np.ndarray]

PATTERNS = st.from_type(SparsePattern)
LENGTHS = st.integers(1, 700)
HEADS = st.integers(0, 11)


def tokens(ranges: Iterable[tuple[int, int]]) -> list[int]:
    return [token for start, stop in ranges for token in range(start, stop)]


def full_or(patterns: st.SearchStrategy[SparsePattern]) -> st.SearchStrategy[SparsePattern]:
    return st.one_of(st.just(SparsePattern.full()), patterns)


@given(full_or(PATTERNS), LENGTHS, HEADS)
def test_visible_is_the_rule_of_the_design(
    document_mask: DocumentMask, pattern: SparsePattern, length: int, head: int
) -> None:
    positions = np.arange(length)
    seen = pattern.visible(positions[:, None], positions[None], head)
    np.testing.assert_array_equal(seen, document_mask(pattern, length, head))


@given(full_or(PATTERNS), st.integers(0, 700), st.integers(0, 700), HEADS)
def test_visible_takes_numbers_arrays_and_tensors(
    document_mask: DocumentMask, pattern: SparsePattern, q: int, k: int, head: int
) -> None:
    expected = bool(document_mask(pattern, 701, head)[q, k])
    assert bool(pattern.visible(q, k, head)) is expected
    for dtype in (torch.int32, torch.int64):
        args = (torch.tensor([x], dtype=dtype) for x in (q, k, head))
        assert pattern.visible(*args).tolist() == [expected]


def test_visible_is_spelled_out_for_one_small_pattern() -> None:
    """Written by hand, so that the rule and its transcription cannot be wrong together."""
    pattern = SparsePattern(
        block_size=2, sink_blocks=1, local_blocks=1, stride_blocks=3, head_shift=1
    )
    # Twelve tokens are six blocks. Head 0 keeps blocks 0 and 3, head 1 2 and 5, head 2 1 and 4.
    rows = {
        (11, 0): "xx....xx..xx",
        (11, 1): "xx..xx....xx",
        (11, 2): "xxxx....xxxx",
        (11, 3): "xx....xx..xx",
        (8, 0): "xx....xxx...",
        (5, 1): "xx..xx......",
        (0, 0): "x...........",
    }
    for (q, head), row in rows.items():
        seen = "".join("x" if pattern.visible(q, k, head) else "." for k in range(12))
        assert seen == row, (q, head)


@given(full_or(PATTERNS), LENGTHS, st.data(), HEADS)
def test_key_ranges_are_what_the_queries_see(
    document_mask: DocumentMask,
    pattern: SparsePattern,
    length: int,
    data: st.DataObject,
    head: int,
) -> None:
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    seen = document_mask(pattern, length, head)[start:stop].any(0)
    ranges = pattern.key_ranges(start, stop, head)
    assert tokens(ranges) == np.flatnonzero(seen).tolist()
    # In order, none empty, none touching the next: each one costs a slice or a message.
    assert all(a < b for a, b in ranges)
    assert all(left[1] < right[0] for left, right in zip(ranges, ranges[1:], strict=False))


@given(full_or(PATTERNS), st.integers(0, 500), HEADS)
def test_kept_ranges_are_what_some_later_query_sees(
    document_mask: DocumentMask, pattern: SparsePattern, length: int, head: int
) -> None:
    horizon = length + 2 * pattern.block_size + 3
    later = document_mask(pattern, horizon, head)[length:, :length].any(0)
    assert tokens(pattern.kept_ranges(length, head)) == np.flatnonzero(later).tolist()
    assert pattern.num_kept(length, head) == later.sum()


@given(full_or(PATTERNS), st.integers(0, 500), st.integers(0, 300), HEADS)
def test_what_is_dropped_never_comes_back(
    document_mask: DocumentMask, pattern: SparsePattern, length: int, more: int, head: int
) -> None:
    dropped = set(range(length)) - set(tokens(pattern.kept_ranges(length, head)))
    assert not dropped & set(tokens(pattern.kept_ranges(length + more, head)))
    seen = document_mask(pattern, length + more + 1, head)[length:].any(0)
    assert not dropped & set(np.flatnonzero(seen).tolist())


@given(full_or(PATTERNS), st.integers(0, 3000), st.integers(1, 12))
def test_cache_length_is_that_of_the_fullest_head(
    pattern: SparsePattern, length: int, heads: int
) -> None:
    kept = [pattern.num_kept(length, head) for head in range(heads)]
    assert pattern.cache_length(length, heads) == max(kept)
    assert max(kept) - min(kept) < 2 * pattern.block_size


@given(full_or(PATTERNS), st.integers(0, 700), st.integers(1, 12))
def test_visible_pairs_count_the_mask(
    document_mask: DocumentMask, pattern: SparsePattern, length: int, heads: int
) -> None:
    counts = [int(document_mask(pattern, length, head).sum()) for head in range(heads)]
    assert [pattern.visible_pairs(length, head) for head in range(heads)] == counts
    assert pattern.mean_visible_pairs(length, heads) == pytest.approx(np.mean(counts), rel=1e-12)


def test_visible_pairs_of_a_long_document_do_not_overflow() -> None:
    length = 131072
    assert SparsePattern.full().visible_pairs(length) == length * (length + 1) // 2
    pattern = SparsePattern.attention_sink()
    # From block 33 on, a query sees 32 whole blocks and its own up to itself; before, everything.
    early = 33 * 64
    late = (length - early) * 32 * 64 + (length - early) // 64 * (64 * 65 // 2)
    assert pattern.visible_pairs(length) == early * (early + 1) // 2 + late


@given(full_or(PATTERNS), LENGTHS)
def test_covers_says_whether_all_heads_see_everything(
    document_mask: DocumentMask, pattern: SparsePattern, length: int
) -> None:
    causal = np.tril(np.ones((length, length), bool))
    same = all((document_mask(pattern, length, head) == causal).all() for head in range(9))
    assert pattern.covers(length) == same


@given(PATTERNS, HEADS)
def test_heads_repeat_after_their_classes_and_not_before(
    document_mask: DocumentMask, pattern: SparsePattern, head: int
) -> None:
    # One token a block, no sinks and one local block: all that differs between heads shows.
    bare = replace(pattern, block_size=1, sink_blocks=0, local_blocks=1)
    length = 2 * max(bare.stride_blocks, 1) + 2

    def same(shift: int) -> bool:
        return all(
            (document_mask(bare, length, h) == document_mask(bare, length, h + shift)).all()
            for h in range(9)
        )

    assert bare.num_head_classes == next(n for n in range(1, 10) if same(n))
    assert pattern.num_head_classes == bare.num_head_classes
    assert pattern.key_ranges(300, 310, head) == pattern.key_ranges(
        300, 310, head + pattern.num_head_classes
    )


@given(PATTERNS, HEADS)
def test_residue_names_the_strided_blocks(
    document_mask: DocumentMask, pattern: SparsePattern, head: int
) -> None:
    assume(pattern.stride_blocks)
    bare = replace(pattern, block_size=1, sink_blocks=0, local_blocks=1)
    length = 3 * bare.stride_blocks + 1
    expected = range(bare.residue(head), length - 1, bare.stride_blocks)
    assert np.flatnonzero(document_mask(bare, length, head)[-1, :-1]).tolist() == list(expected)


@given(full_or(PATTERNS))
def test_patterns_survive_a_checkpoint(pattern: SparsePattern) -> None:
    again = SparsePattern.from_dict(json.loads(json.dumps(pattern.to_dict())))
    assert again == pattern and hash(again) == hash(pattern)
    assert again.is_full == pattern.is_full


def test_missing_fields_take_the_defaults() -> None:
    assert SparsePattern.from_dict({"block_size": 64}) == SparsePattern(block_size=64)


def test_patterns_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SparsePattern().block_size = 64  # type: ignore[misc]


@pytest.mark.parametrize("bad", [-1, 1.5, "8", True, None])
@pytest.mark.parametrize(
    ("field", "lowest"),
    [
        ("block_size", 1),
        ("sink_blocks", 0),
        ("local_blocks", 1),
        ("stride_blocks", 0),
        ("head_shift", 0),
    ],
)
def test_a_bad_number_is_refused_by_name(field: str, lowest: int, bad: Any) -> None:
    with pytest.raises(UsageError) as error:
        SparsePattern(**{field: bad})
    assert str(error.value) == (
        f"SparsePattern {field} is {bad!r}; give a whole number of at least {lowest}."
    )


@pytest.mark.parametrize("field", ["block_size", "local_blocks"])
def test_zero_is_refused_where_nothing_would_be_seen(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field} is 0; give a whole number of at least 1"):
        SparsePattern(**{field: 0})


def test_a_shift_without_a_stride_is_refused() -> None:
    with pytest.raises(UsageError, match=r"head_shift is 2 but stride_blocks is 0: .* Set"):
        SparsePattern(head_shift=2)


def test_an_unknown_field_is_refused_by_name() -> None:
    fields = {**SparsePattern().to_dict(), "dilation": 2}
    with pytest.raises(UsageError, match=r"fields \['dilation'\] .* does not know"):
        SparsePattern.from_dict(fields)


def test_the_sink_preset_is_the_papers() -> None:
    pattern = SparsePattern.attention_sink()
    assert pattern == SparsePattern(block_size=64, sink_blocks=1, local_blocks=32)
    # The last token of 128K sees the first block and the 32 most recent, its own included.
    seen = pattern.key_ranges(131071, 131072)
    assert seen == ((0, 64), (131072 - 32 * 64, 131072))
    assert len(tokens(seen)) == (1 + 32) * 64 == 2112
    # The next one opens a block, so the oldest of the 32 is gone from the cache by then.
    assert pattern.cache_length(131072, 32) == 2112 - 64 == 2048
    assert max(pattern.num_kept(n) for n in range(131072, 131072 + 64)) == 2111


def test_the_block_sparse_preset_is_the_papers() -> None:
    pattern = SparsePattern.block_sparse()
    assert (pattern.block_size, pattern.stride_blocks, pattern.head_shift) == (64, 64, 1)
    assert pattern.num_head_classes == 64
    for head in range(64):
        # 2048 blocks, every 64th: 32 of them, and the query's own, which is one of them in head 1.
        seen = tokens(pattern.key_ranges(131071, 131072, head))
        assert len(seen) == (2048 if head == 1 else 2112)
        assert pattern.num_kept(131072, head) == 2048
    assert pattern.cache_length(131072, 32) == 2048


def test_the_full_pattern_is_causal_attention() -> None:
    pattern = SparsePattern.full()
    assert pattern.is_full and pattern.covers(10**9) and pattern.num_head_classes == 1
    assert pattern.kept_ranges(1000) == ((0, 1000),)
    assert str(pattern) == "full causal"
    assert not SparsePattern().is_full


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (SparsePattern.attention_sink(), "1 sink + 32 local of 64-token blocks"),
        (
            SparsePattern.block_sparse(),
            "1 local + one in 64 shifted by 1 a head of 64-token blocks",
        ),
    ],
)
def test_patterns_print_as_what_they_see(pattern: SparsePattern, text: str) -> None:
    assert str(pattern) == text
