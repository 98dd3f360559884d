"""Recall text: every lookup repeats its record, nothing overlaps, all distances are as likely."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longgen.data import RecallText
from longgen.data import recall as recall_module
from longgen.data.facts import draw_facts
from longgen.errors import UsageError

# The background: a token that no record holds, so that every planted token shows.
PLAIN = 1
SPAN = re.compile(r"\n(Record|Lookup: record) (\S+) has code (\d{6})\.\n")


@dataclass(frozen=True)
class Span:
    kind: str
    key: str
    code: str
    start: int
    tokens: int


def spans_in(ids: np.ndarray, tokenizer: Any) -> list[Span]:
    """Read back what was planted, failing on anything that is not whole records and lookups."""
    spans = []
    start = 0
    for planted, group in itertools.groupby(ids.tolist(), lambda token: token != PLAIN):
        run = list(group)
        if planted:
            text = tokenizer.decode(run)
            matches = list(SPAN.finditer(text))
            assert "".join(match.group() for match in matches) == text
            at = start
            for match in matches:
                size = len(tokenizer(match.group(), add_special_tokens=False)["input_ids"])
                spans.append(Span(*match.groups(), start=at, tokens=size))
                at += size
            assert at == start + len(run)
        start += len(run)
    return spans


def pairs_in(ids: np.ndarray, tokenizer: Any) -> list[tuple[Span, Span]]:
    """Return (record, lookup) of each key, failing unless each has just these two."""
    spans = spans_in(ids, tokenizer)
    records = {span.key: span for span in spans if span.kind == "Record"}
    lookups = {span.key: span for span in spans if span.kind != "Record"}
    assert len(records) == len(lookups) == len(spans) / 2
    assert records.keys() == lookups.keys()
    return [(record, lookups[key]) for key, record in records.items()]


def uniform_error(values: list[float]) -> float:
    """Return the Kolmogorov-Smirnov distance of values from the uniform distribution on [0, 1]."""
    ordered = np.sort(values)
    steps = np.arange(len(values) + 1) / len(values)
    return float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


def uniform_bound(number: int) -> float:
    """Return the distance that uniform values exceed with probability below 1e-6 (Massart)."""
    return math.sqrt(math.log(2 / 1e-6) / (2 * number))


def plant(
    recall: RecallText, number: int, rng: np.random.Generator, pairs: int | None = None
) -> np.ndarray:
    return recall.apply(np.full(number, PLAIN, dtype=np.int64), rng, pairs=pairs)


@given(st.integers(2, 3000), st.one_of(st.none(), st.integers(0, 60)), st.integers(0, 99))
def test_records_and_lookups_are_whole_and_match(
    tokenizer: Any, number: int, pairs: int | None, seed: int
) -> None:
    recall = RecallText(tokenizer, kinds="codes")
    ids = plant(recall, number, np.random.default_rng(seed), pairs)
    assert ids.shape == (number,)
    assert ids.dtype == np.int64
    assert ids[0] == ids[-1] == PLAIN
    found = pairs_in(ids, tokenizer)
    for record, lookup in found:
        assert record.code == lookup.code
        assert record.start < lookup.start
    asked = recall.num_pairs(number) if pairs is None else pairs
    assert len(found) <= asked
    if number >= recall.min_tokens and asked:
        assert found
    if number >= 4 * recall.min_tokens * asked:
        assert len(found) == asked
    if len(found) > 1:
        assert (ids != PLAIN).sum() <= number / 4


def test_default_density_is_a_pair_per_thousand_tokens(tokenizer: Any) -> None:
    recall = RecallText(tokenizer, kinds="codes")
    for number, pairs in ((300, 1), (1000, 1), (4000, 4), (32_768, 33)):
        assert len(pairs_in(plant(recall, number, np.random.default_rng(0)), tokenizer)) == pairs
    recall = RecallText(tokenizer, kinds="codes", records_per_sequence=3)
    assert len(pairs_in(plant(recall, 32_768, np.random.default_rng(0)), tokenizer)) == 3


def test_keys_are_drawn_without_repeating(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall_module, "NUM_KEYS", 300)
    found = pairs_in(
        plant(RecallText(tokenizer, kinds="codes"), 80_000, np.random.default_rng(0), 300),
        tokenizer,
    )
    assert len({record.key for record, _ in found}) == len(found) == 300


@pytest.mark.parametrize(("number", "draws"), [(150, 2000), (2000, 2000), (8000, 250)])
def test_distances_and_places_are_uniform(tokenizer: Any, number: int, draws: int) -> None:
    recall = RecallText(tokenizer, kinds="codes")
    rng = np.random.default_rng(number)
    distances, places = [], []
    for _ in range(draws):
        for record, lookup in pairs_in(plant(recall, number, rng), tokenizer):
            # The ranges that the docstring promises; adding a draw from [0, 1) to a whole number
            # makes a uniform one of 0 ... n - 1 uniform on [0, n).
            distance = lookup.start - record.start
            longest = number - 2 - lookup.tokens
            span = longest - record.tokens + 1
            distances.append((distance - record.tokens + rng.random()) / span)
            places.append((record.start - 1 + rng.random()) / (longest - distance + 1))
    assert uniform_error(distances) < uniform_bound(len(distances))
    assert uniform_error(places) < uniform_bound(len(places))
    # What is ruled out: two independent places, whose distances are mostly short.
    two = np.abs(rng.random(len(distances)) - rng.random(len(distances)))
    assert uniform_error(list(two)) > uniform_bound(len(distances))


def test_same_random_state_same_text(tokenizer: Any) -> None:
    recall = RecallText(tokenizer, kinds="codes")
    first, second, other = (plant(recall, 5000, np.random.default_rng(s)) for s in (3, 3, 4))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_input_is_left_as_it_was(tokenizer: Any) -> None:
    ids = np.full(500, PLAIN, dtype=np.uint16)
    planted = RecallText(tokenizer, kinds="codes").apply(ids, np.random.default_rng(0))
    assert (ids == PLAIN).all()
    assert planted.dtype == np.uint16
    assert (planted != PLAIN).any()


@pytest.mark.parametrize("asked", [0, -3, 10**9])
def test_numbers_of_records_that_are_refused(tokenizer: Any, asked: int) -> None:
    with pytest.raises(UsageError, match=f"records_per_sequence is {asked}"):
        RecallText(tokenizer, kinds="codes", records_per_sequence=asked)


def ramp(number: int) -> np.ndarray:
    """Return a text in which every token stands once."""
    return np.arange(number) + 1000


@given(st.integers(2, 3000), st.one_of(st.none(), st.integers(0, 60)), st.integers(0, 99))
def test_copies_repeat_what_stands_before_them(
    tokenizer: Any, number: int, pairs: int | None, seed: int
) -> None:
    recall = RecallText(tokenizer, kinds="copies")
    ids = ramp(number)
    after = recall.apply(ids, np.random.default_rng(seed), pairs=pairs)
    assert (after[0], after[-1]) == (ids[0], ids[-1])
    sources: list[int] = []
    copies: list[tuple[int, int]] = []
    at = 0
    while at < number:
        size = 0
        # A copy of the tokens right before it ends where another begins elsewhere.
        while at + size < number and after[at + size] - after[at] == size and after[at] != ids[at]:
            size += 1
        if size:
            copies.append((int(after[at]) - 1000, size))
            sources += range(copies[-1][0], copies[-1][0] + size)
            assert copies[-1][0] + size <= at
        at += size or 1
    # What is copied stays as it was, and is copied once.
    assert len(set(sources)) == len(sources)
    assert np.array_equal(after[sources], ids[sources])
    low, high = recall_module.COPIED_TOKENS
    assert all(low <= size <= 2 * high for _, size in copies)  # two may follow each other
    asked = recall.num_pairs(number) if pairs is None else pairs
    assert len(copies) <= asked
    if number >= recall.min_tokens and asked:
        assert copies


def test_distances_of_copies_are_uniform(tokenizer: Any) -> None:
    recall = RecallText(tokenizer, kinds="copies", records_per_sequence=1)
    rng = np.random.default_rng(0)
    number, values = 1000, []
    for _ in range(2000):
        after = recall.apply(ramp(number), rng)
        changed = np.flatnonzero(after != ramp(number))
        size, distance = len(changed), changed[0] - (after[changed[0]] - 1000)
        values.append((distance - size + rng.random()) / (number - 2 - 2 * size + 1))
    assert uniform_error(values) < uniform_bound(len(values))


def test_facts_are_told_before_they_are_asked_for(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: list[tuple[str, str]] = []

    def draw(number: int, rng: np.random.Generator) -> list[tuple[str, str]]:
        facts.extend(draw_facts(number, rng))
        return facts[-number:]

    monkeypatch.setattr(recall_module, "draw_facts", draw)
    recall = RecallText(tokenizer, kinds="facts")
    facts.clear()
    ids = plant(recall, 30_000, np.random.default_rng(0))
    told = tokenizer.decode(ids[ids != PLAIN])
    assert len(facts) == 30
    assert sum(len(text) for pair in facts for text in pair) == len(told)
    for statement, lookup in facts:
        assert 0 <= told.find(statement) < told.rfind(lookup)


def test_kinds_are_mixed_evenly(tokenizer: Any) -> None:
    recall = RecallText(tokenizer, kinds="codes,copies", records_per_sequence=1)
    assert recall.min_tokens == 2 * recall_module.COPIED_TOKENS[1] + 2
    rng = np.random.default_rng(0)
    copies = 0
    for _ in range(1000):
        after = recall.apply(ramp(500), rng)
        copies += after.max() <= 1499 and after[after != ramp(500)].min() >= 1000
    assert abs(copies - 500) < 5 * (1000 * 0.25) ** 0.5


@pytest.mark.parametrize("kinds", ["", "code", "codes,codes", "codes,", "codes;facts"])
def test_kinds_that_are_refused(tokenizer: Any, kinds: str) -> None:
    with pytest.raises(UsageError, match=r"recall_kinds is .*give one or more of codes, facts, co"):
        RecallText(tokenizer, kinds=kinds)


def test_the_kind_with_fewest_decides_how_many_there_can_be(tokenizer: Any) -> None:
    RecallText(tokenizer, kinds="codes", records_per_sequence=10_001)
    with pytest.raises(UsageError, match=r"from 1 to 10,000 \(there are no more different facts"):
        RecallText(tokenizer, kinds="codes,facts", records_per_sequence=10_001)
    RecallText(tokenizer, kinds="copies", records_per_sequence=10**6)
    with pytest.raises(UsageError, match="records_per_sequence is 0, but must be at least 1"):
        RecallText(tokenizer, kinds="copies", records_per_sequence=0)
    recall = RecallText(tokenizer, kinds="facts")
    assert recall.num_pairs(10**9) == 10_000
    for pairs in (-1, 10_001):
        with pytest.raises(UsageError, match=f"pairs is {pairs}, but must be from 0 to 10,000"):
            plant(recall, 1000, np.random.default_rng(0), pairs)


def test_the_order_in_which_kinds_are_named_means_nothing(tokenizer: Any) -> None:
    first, second = (RecallText(tokenizer, kinds=one) for one in ("facts,copies", "copies, facts"))
    assert first.min_tokens == second.min_tokens
    one, other = (recall.apply(ramp(9000), np.random.default_rng(0)) for recall in (first, second))
    assert np.array_equal(one, other)


def test_places_are_where_pairs_are(tokenizer: Any) -> None:
    recall = RecallText(tokenizer, kinds="codes,facts,copies", records_per_sequence=25)
    before = ramp(20_000)
    after, places = recall.plant(before, np.random.default_rng(3))
    assert np.array_equal(after, recall.apply(before, np.random.default_rng(3)))
    assert {place.kind for place in places} == {"codes", "facts", "copies"}
    assert len(places) == 25
    assert [place.distance for place in places] == sorted(
        (p.distance for p in places), reverse=True
    )
    touched = np.zeros(len(after), dtype=int)
    for place in places:
        first, second = after[list(place.first)], after[list(place.second)]
        touched[list(place.first)] += 1
        touched[list(place.second)] += 1
        assert place.distance == place.second[0] - place.first[0] > 0
        if place.kind == "copies":
            assert np.array_equal(first, second)
            assert np.array_equal(first, before[list(place.first)])
        elif place.kind == "codes":
            assert SPAN.fullmatch(tokenizer.decode(first))[1] == "Record"
            assert SPAN.fullmatch(tokenizer.decode(second))[1] != "Record"
        else:
            for ids in (first, second):
                text = tokenizer.decode(ids)
                assert text[0] == text[-1] == "\n" and "has code" not in text
    # Nothing else is changed, and nothing twice.
    assert touched.max() == 1
    assert np.array_equal(after[touched == 0], before[touched == 0])
