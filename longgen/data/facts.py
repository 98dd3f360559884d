"""Invent facts and later questions for them, in many wordings.

One wording, however often practised, teaches a model to look up that wording. Here what is asked
about, what is asked and how both are put all vary, so that little but looking back helps.

    The badge number of Ada Fenwick is 40718.
    ...
    What is the badge number of Ada Fenwick? It is 40718.

The needle evaluation's sentence, its question and its cities are not among them.
"""

from __future__ import annotations

import numpy as np

_WORDS = """amber anvil aspen badger basil birch bronze candle canyon cedar clover cobalt comet
    copper coral crimson dahlia ember fennel fjord garnet ginger glacier harbor hazel heron indigo
    ivory jasmine juniper kettle lantern lichen linen magnet maple meadow nutmeg olive onyx orchid
    otter pebble pepper plume quarry quartz raven saffron silver spruce sunset thistle timber topaz
    tulip umber velvet walnut willow yarrow zephyr"""
WORDS = tuple(_WORDS.split())
_NAMES = """Ada Agnes Albert Alice Amos Anna Arthur Basil Bertha Clara Cyril Daniel Edith Edwin
    Eleanor Emma Ernest Fanny Felix Frank George Grace Harriet Helen Henry Hugh Isabel Jacob James
    Jane John Laura Lewis Lucy Mabel Martin Mary Maud Miles Nora Oliver Oscar Peter Rachel Ralph
    Robert Rose Ruth Samuel Sarah Simon Stella Susan Thomas Victor Walter"""
NAMES = tuple(_NAMES.split())
_BEGINNINGS = """Ash Bar Bram Brook Carl Clay Craw Dun Ed El Fen Fox Gar Hal Har Holm Kel Lang Lin
    Mar Mid Nor Oak Pem Rad Row Sel Stan Thorn Wal West Whit"""
_ENDINGS = "bridge brook bury by church combe cott dale don field ford ham hurst ley low mere more"
_ENDINGS += " mouth stead stock stone thorpe ton wick wood worth"
PLACES = tuple(first + last for first in _BEGINNINGS.split() for last in _ENDINGS.split())
ATTRIBUTES = (
    "account number",
    "badge number",
    "call sign",
    "catalogue number",
    "depth in feet",
    "door code",
    "file index",
    "key number",
    "ledger entry",
    "length in yards",
    "licence",
    "lot number",
    "order number",
    "parcel number",
    "password",
    "price in pence",
    "registration",
    "room number",
    "seal",
    "serial number",
    "shelf mark",
    "telephone number",
    "ticket",
    "time stamp",
    "watchword",
    "weight in grams",
)
STATEMENTS = (
    "The {attribute} of {subject} is {value}.",
    "{subject} has the {attribute} {value}.",
    "{subject}: {attribute} {value}.",
    "For {subject}, the {attribute} is {value}.",
    "They wrote down {value} for the {attribute} of {subject}.",
    "{value} is the {attribute} of {subject}.",
    "- {attribute} of {subject} = {value}",
    '{{"name": "{subject}", "{attribute}": "{value}"}}',
    "It is known to all that the {attribute} of {subject} is {value}.",
    "# {subject}, {attribute}: {value}",
)
LOOKUPS = (
    "The {attribute} of {subject} is {value}.",
    "{subject} has the {attribute} {value}.",
    "What is the {attribute} of {subject}? It is {value}.",
    "Q: the {attribute} of {subject}? A: {value}.",
    "As was said before, the {attribute} of {subject} is {value}.",
    "Asked for the {attribute} of {subject}, she said: {value}.",
    "- {attribute} of {subject} = {value}",
    '{{"name": "{subject}", "{attribute}": "{value}"}}',
    "# {subject}, {attribute}: {value}",
    "As to {subject}, the {attribute} was {value}.",
    # The subject is there twice: what stands nearer and leads nowhere has to be passed over.
    "Ask for {subject} and the {attribute}. {subject} has the {attribute} {value}.",
    "Who knows of {subject}? The {attribute} is wanted. As to {subject}, it is {value}.",
)
_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
MOST_FACTS = 10_000  # at once: of some 60,000 subjects, among which some kinds are few


def draw_facts(number: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    r"""Draw facts, each as (statement, lookup), with different subjects.

    Both begin and end with a line break. The value stands in each of them, spelled alike, and in
    the lookup after subject and attribute, so that it can be told from the statement alone.

    Args:
        number: how many.
        rng: the source of all choices.

    Raises:
        ValueError: they are more than `MOST_FACTS`.
    """
    if number > MOST_FACTS:
        raise ValueError(f"{number:,} facts were asked for, of {MOST_FACTS:,} at most.")
    facts: list[tuple[str, str]] = []
    subjects: set[str] = set()
    while len(facts) < number:
        subject = _subject(rng)
        if subject in subjects:
            continue
        subjects.add(subject)
        words = {
            "subject": subject,
            "attribute": _one(ATTRIBUTES, rng),
            "value": _value(rng),
        }
        statement, lookup = (_one(forms, rng) for forms in (STATEMENTS, LOOKUPS))
        facts.append((_line(statement, words), _line(lookup, words)))
    return facts


def _line(form: str, words: dict[str, str]) -> str:
    """Fill in a form as a line; a subject that begins it gets a capital."""
    line = form.format(**words)
    return f"\n{line[0].upper() + line[1:] if form.startswith('{subject}') else line}\n"


def _one(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[rng.integers(len(choices))]


def _subject(rng: np.random.Generator) -> str:
    """Draw a person, a place, a thing of one word or two, or a numbered entry."""
    kind = rng.integers(5)
    if kind == 0:
        return f"{_one(NAMES, rng)} {_one(PLACES, rng)}"
    if kind == 1:
        return _one(PLACES, rng)
    if kind == 2:
        return f"the {_one(WORDS, rng)} {_one(WORDS, rng)}"
    if kind == 3:
        return _one(WORDS, rng).capitalize()
    return f"entry {rng.integers(1000, 10_000)}"


def _value(rng: np.random.Generator) -> str:
    """Draw a number of 3 to 8 digits (half of the time), two words, or letters with a number."""
    kind = rng.integers(4)
    if kind < 2:
        digits = int(rng.integers(3, 9))
        return str(rng.integers(10 ** (digits - 1), 10**digits))
    if kind == 2:
        return f"{_one(WORDS, rng)} {_one(WORDS, rng)}"
    letters = "".join(_LETTERS[i] for i in rng.integers(len(_LETTERS), size=2))
    return f"{letters}-{rng.integers(1000, 10_000)}"
