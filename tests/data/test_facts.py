"""Facts: told whole, asked for whole, each of another subject, and nothing of the needle test."""

from __future__ import annotations

import re

import numpy as np
import pytest

from longgen.data.facts import ATTRIBUTES, LOOKUPS, MOST_FACTS, STATEMENTS, draw_facts
from longgen.evaluate.needle import ANSWER, CITIES, NEEDLE, QUESTION

PLACES = {"subject": ".+?", "attribute": "|".join(map(re.escape, ATTRIBUTES)), "value": ".+?"}


def matched(forms: tuple[str, ...], text: str) -> list[dict[str, str]]:
    """Return what stands in a text's places, for each form that it may have."""
    found = []
    for form in forms:
        marks = {name: f"@{name}@" for name in PLACES}
        pattern = re.escape(form.format(**marks))
        for name, mark in marks.items():
            pattern = pattern.replace(mark, f"(?P<{name}>{PLACES[name]})", 1)
            pattern = pattern.replace(mark, f"(?i:(?P={name}))")
        if match := re.fullmatch(f"\n{pattern}\n", text):
            found.append(match.groupdict())
    return found


def alike(found: dict[str, str]) -> tuple[str, str, str]:
    """Return subject, attribute and value; the first may have got a capital."""
    return found["subject"].lower(), found["attribute"], found["value"]


def test_lookups_ask_for_what_was_told() -> None:
    facts = draw_facts(2000, np.random.default_rng(0))
    subjects = set()
    for statement, lookup in facts:
        told, asked = (
            {alike(one) for one in matched(forms, text)}
            for forms, text in ((STATEMENTS, statement), (LOOKUPS, lookup))
        )
        same = told & asked
        assert same, (statement, lookup)
        subjects.add(same.pop()[0])
    assert len(subjects) == len(facts)


def test_in_lookups_the_value_comes_last() -> None:
    for form in LOOKUPS:
        places = [form.rindex(f"{{{name}}}") for name in ("subject", "attribute", "value")]
        assert max(places) == places[2]


def test_wordings_and_kinds_all_occur() -> None:
    facts = draw_facts(2000, np.random.default_rng(0))
    for forms, texts in zip((STATEMENTS, LOOKUPS), zip(*facts, strict=True), strict=True):
        for form in forms:
            assert sum(bool(matched((form,), text)) for text in texts) > 2000 / len(forms) / 2
    digits = {len(number) for pair in facts for number in re.findall(r"(?<![-\w])\d+", pair[1])}
    assert digits >= set(range(3, 9))


def test_nothing_is_worded_as_the_needle_evaluation_is() -> None:
    said = " ".join(text for pair in draw_facts(5000, np.random.default_rng(1)) for text in pair)
    words = set(re.findall(r"\w+", said))
    assert not words & set(CITIES.split())
    own = {"Question", "Answer", "magic", "special", "Remember", "Paris"}
    assert own <= set(
        re.findall(r"\w+", (NEEDLE + QUESTION + ANSWER).format(city="Paris", number=1))
    )
    assert not words & own
    # Its question says the same twice, before the answer; no lookup does.
    assert QUESTION.lower().count("the special magic number for {city}") == 2
    assert all(form.count("{attribute} of {subject}") < 2 for form in LOOKUPS)


def test_same_state_same_facts() -> None:
    first, again, other = (draw_facts(50, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_too_many_are_refused() -> None:
    assert len(draw_facts(MOST_FACTS, np.random.default_rng(0))) == MOST_FACTS
    with pytest.raises(ValueError, match="10,001 facts were asked for, of 10,000 at most"):
        draw_facts(MOST_FACTS + 1, np.random.default_rng(0))
