"""Plant what is best told from far back into text, as training matter for recall."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from longgen.data.facts import MOST_FACTS, WORDS, draw_facts
from longgen.errors import UsageError
from longgen.recall_kinds import DEFAULT_KINDS, split_kinds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "\nRecord {key} has code {code}.\n"
LOOKUP = "\nLookup: record {key} has code {code}.\n"
TOKENS_PER_PAIR = 1000  # the default density

NUM_KEYS = len(WORDS) ** 2 * 90  # word-word-NN, NN from 10 to 99
COPIED_TOKENS = (16, 48)  # in a copied passage, at least and at most
# How many different ones a sequence can have of a kind; of copies any number.
_MOST = {"codes": NUM_KEYS, "facts": MOST_FACTS}
_TRIES = 32


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """Hold what is planted in two places; for a copy, how long the passage is.

    Attributes:
        kind: one of `longgen.recall_kinds.KINDS`.
        first, second: token ids of the earlier and the later place; None in a copy, where the
            second becomes what stands in the first.
        sizes: tokens in each.
    """

    kind: str
    first: np.ndarray | None
    second: np.ndarray | None
    sizes: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Planted:
    """Say where a pair was planted.

    Attributes:
        kind: one of `longgen.recall_kinds.KINDS`.
        first, second: the tokens of the earlier and the later place, as half-open ranges.
    """

    kind: str
    first: range
    second: range

    @property
    def distance(self) -> int:
        """Give the tokens from the beginning of one to that of the other."""
        return self.second.start - self.first.start


@dataclass(frozen=True, eq=False)
class RecallText:
    r"""Plant pairs of something and its later repetition into tokens, keeping their number.

    A pair of the kind "codes" overwrites two spans of tokens with its own:

        ... quick brown\nRecord amber-cedar-42 has code 918273.\n over the lazy dog ...
        ... lorem ipsum\nLookup: record amber-cedar-42 has code 918273.\n sit amet ...

    so that the six digits in the lookup can be predicted only from the record, which may be
    almost the whole sequence away. "facts" are the same in many wordings (`longgen.data.facts`).
    "copies" repeat a passage of the text itself, from its first tokens on, in one span:

        ... she had laid the old brass lamp on the sill and ...
        ... lorem ipsum laid the old brass lamp on the sill sit amet ...

    The needle evaluation's sentence and question are not among them; facts come nearest.

    What holds for n tokens:

    - Codes' keys are unique in the sequence, and facts' subjects; spans never overlap, those that
      are copied included; the first and the last token (beginning and end of a document, if it is
      whole) stay.
    - The distance between a pair's spans, first token to first token, is drawn uniformly from
      [tokens of the first, n - 2 - tokens of the second], before any place is. Then, the longest
      first, each pair gets a place drawn uniformly from those where both of its spans are free.
      A distance that has no free place is drawn again; only distances within a few pairs'
      tokens of the longest possible are ever concerned, unless the sequence is crowded.
    - At most a quarter of the tokens is overwritten or copied (if there is more than one pair):
      of more pairs asked for, only so many are planted, and none if not even one fits.

    Example: n = 1000, a record of 20 tokens, a lookup of 23. The distance is uniform over
    20 ... 975; say 600. The record then starts anywhere in 1 ... 376, say at 50, where tokens
    50 ... 69 are replaced; the lookup replaces tokens 650 ... 672.

    Attributes:
        tokenizer: spells the text; each record and lookup is tokenized by itself.
        records_per_sequence: pairs in a sequence; by default one per 1,000 tokens, at least one.
        kinds: of pairs, one or more of `KINDS` with commas between; each pair's is drawn.
        min_tokens: a sequence at least this long holds a pair of usual spelling.

    Raises:
        UsageError: `records_per_sequence` is below 1 or above what a kind has, or `kinds` has an
            unknown one.
    """

    tokenizer: PreTrainedTokenizerBase
    records_per_sequence: int | None = field(default=None, kw_only=True)
    kinds: str = field(default=DEFAULT_KINDS, kw_only=True)
    min_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        if self.records_per_sequence is not None:
            self._check("records_per_sequence", self.records_per_sequence, at_least=1)
        sample = self._draw(256, np.random.default_rng(0))
        object.__setattr__(self, "min_tokens", max(sum(pair.sizes) for pair in sample) + 2)

    def num_pairs(self, num_tokens: int) -> int:
        """Return how many pairs a sequence of so many tokens should hold."""
        if self.records_per_sequence is not None:
            return self.records_per_sequence
        number = max(1, round(num_tokens / TOKENS_PER_PAIR))
        return min(number, *(_MOST.get(kind, number) for kind in split_kinds(self.kinds)))

    def apply(
        self, input_ids: np.ndarray, rng: np.random.Generator, *, pairs: int | None = None
    ) -> np.ndarray:
        """Return a copy of one document's tokens with pairs planted in it.

        Args:
            input_ids: token ids, [n], of one document or a piece of one.
            rng: the source of keys, codes, distances and places.
            pairs: how many pairs to plant; `num_pairs(n)` by default.

        Returns:
            Token ids, [n], of the same dtype.

        Raises:
            UsageError: `pairs` is negative or above what a kind has.
        """
        return self.plant(input_ids, rng, pairs=pairs)[0]

    def plant(
        self, input_ids: np.ndarray, rng: np.random.Generator, *, pairs: int | None = None
    ) -> tuple[np.ndarray, list[Planted]]:
        """Do what `apply` does, and return with the tokens where the pairs are, the farthest
        first."""
        if pairs is not None:
            self._check("pairs", pairs, at_least=0)
        planted, places = input_ids.copy(), []
        room = len(input_ids) - 2
        drawn = self._draw(self.num_pairs(len(input_ids)) if pairs is None else pairs, rng)
        longest = max((sum(pair.sizes) for pair in drawn), default=1)
        # With three quarters of the room free, some gap always holds one pair more.
        drawn = drawn[: max(1, room // (4 * longest))]
        drawn = [pair for pair in drawn if sum(pair.sizes) <= room]

        def distance(first: int, second: int) -> int:
            return int(rng.integers(first, room - second + 1))

        free = np.ones(len(input_ids), dtype=bool)
        queue = [(distance(*pair.sizes), pair) for pair in drawn]
        # The longest have the fewest places, so they choose first.
        queue.sort(key=lambda item: -item[0])
        for apart, pair in queue:
            first, second = pair.sizes
            at = _place(free, apart, first, second, rng)
            while at is None:
                apart = distance(first, second)
                at = _place(free, apart, first, second, rng)
            here, there = slice(at, at + first), slice(at + apart, at + apart + second)
            if pair.first is not None:
                planted[here] = pair.first
            planted[there] = planted[here] if pair.second is None else pair.second
            free[here] = free[there] = False
            places.append(
                Planted(pair.kind, range(here.start, here.stop), range(there.start, there.stop))
            )
        return planted, places

    def _check(self, name: str, number: int, at_least: int) -> None:
        """Refuse a number of pairs that is too low, or above what one of the kinds has."""
        limits = [(_MOST[kind], kind) for kind in split_kinds(self.kinds) if kind in _MOST]
        most, kind = min(limits, default=(number, ""))
        if not at_least <= number <= most:
            allowed = f"at least {at_least}"
            if limits:
                allowed = f"from {at_least} to {most:,} (there are no more different {kind})"
            raise UsageError(
                f"{name} is {number}, but must be {allowed}. Leave it out for one pair per "
                f"{TOKENS_PER_PAIR:,} tokens."
            )

    def _draw(self, num: int, rng: np.random.Generator) -> list[_Pair]:
        """Draw pairs with different keys."""
        kinds = split_kinds(self.kinds)
        if len(kinds) == 1:  # what seeds gave before there was a choice, they still give
            return self._draw_kind(kinds[0], num, rng)
        chosen = rng.integers(len(kinds), size=num)
        found = [
            iter(self._draw_kind(kind, int((chosen == i).sum()), rng))
            for i, kind in enumerate(kinds)
        ]
        return [next(found[i]) for i in chosen]

    def _draw_kind(self, kind: str, num: int, rng: np.random.Generator) -> list[_Pair]:
        if kind == "copies":
            low, high = COPIED_TOKENS
            sizes = rng.integers(low, high + 1, size=num).tolist()
            return [_Pair(kind, None, None, (size, size)) for size in sizes]
        draw = draw_facts if kind == "facts" else _draw_codes
        texts = [text for pair in draw(num, rng) for text in pair]
        if not texts:
            return []
        # One call for all: tokenizers do not spell "amber-cedar" as "amber" + "-" + "cedar", so
        # the ids can't be put together from ids of words, and a call costs more than its texts.
        ids = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        arrays = [np.asarray(one) for one in ids]
        return [
            _Pair(kind, first, second, (len(first), len(second)))
            for first, second in zip(arrays[::2], arrays[1::2], strict=True)
        ]


def _draw_codes(num: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Draw records of codes, each as (record, lookup), with different keys."""
    texts = []
    for key in rng.choice(NUM_KEYS, size=num, replace=False).tolist():
        words, number = divmod(key, 90)
        first, second = divmod(words, len(WORDS))
        name = f"{WORDS[first]}-{WORDS[second]}-{number + 10}"
        code = int(rng.integers(100_000, 1_000_000))
        texts.append((RECORD.format(key=name, code=code), LOOKUP.format(key=name, code=code)))
    return texts


def _place(
    free: np.ndarray, apart: int, first: int, second: int, rng: np.random.Generator
) -> int | None:
    """Draw a start uniformly from those that leave both spans free, None if there is none.

    Args:
        free: bool [n], the tokens not yet overwritten; the first and the last stay anyhow.
        apart: distance between the starts of the two spans.
        first, second: tokens in the spans.
        rng: the source of the draw.
    """
    starts = len(free) - 1 - second - apart  # starts are 1 ... this
    # Drawing until it fits is uniform over what fits, and mostly done after one draw; listing
    # everything that fits is for crowded sequences.
    for at in rng.integers(1, starts + 1, size=_TRIES).tolist():
        if free[at : at + first].all() and free[at + apart : at + apart + second].all():
            return int(at)
    taken = np.concatenate([[0], np.cumsum(~free)])
    fits = (taken[first:] == taken[:-first])[1 : starts + 1]
    fits &= (taken[second:] == taken[:-second])[apart + 1 : apart + starts + 1]
    places = np.flatnonzero(fits) + 1
    return int(rng.choice(places)) if len(places) else None
