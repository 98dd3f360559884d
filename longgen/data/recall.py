"""Plant records and later lookups of them into text, as training matter for recall."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from longgen.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "\nRecord {key} has code {code}.\n"
LOOKUP = "\nLookup: record {key} has code {code}.\n"
TOKENS_PER_PAIR = 1000  # the default density

_WORDS = """amber anvil aspen badger basil birch bronze candle canyon cedar clover cobalt comet
    copper coral crimson dahlia ember fennel fjord garnet ginger glacier harbor hazel heron indigo
    ivory jasmine juniper kettle lantern lichen linen magnet maple meadow nutmeg olive onyx orchid
    otter pebble pepper plume quarry quartz raven saffron silver spruce sunset thistle timber topaz
    tulip umber velvet walnut willow yarrow zephyr"""
WORDS = tuple(_WORDS.split())
NUM_KEYS = len(WORDS) ** 2 * 90  # word-word-NN, NN from 10 to 99
_TRIES = 32


@dataclass(frozen=True, eq=False)
class RecallText:
    r"""Plant pairs of a record and its lookup into a sequence of tokens, keeping its length.

    A pair overwrites two spans of tokens with its own:

        ... quick brown\nRecord amber-cedar-42 has code 918273.\n over the lazy dog ...
        ... lorem ipsum\nLookup: record amber-cedar-42 has code 918273.\n sit amet ...

    so that the six digits in the lookup can be predicted only from the record, which may be
    almost the whole sequence away. The wording is unlike that of the needle evaluation.

    What holds for n tokens:

    - Keys are unique in the sequence; spans never overlap; the first and the last token
      (beginning and end of a document, if it is whole) stay.
    - The distance from record to lookup, first token to first token, is drawn uniformly from
      [tokens of the record, n - 2 - tokens of the lookup], before any place is. Then, the longest
      first, each pair gets a place drawn uniformly from those where both of its spans are free.
      A distance that has no free place is drawn again; only distances within a few pairs'
      tokens of the longest possible are ever concerned, unless the sequence is crowded.
    - At most a quarter of the tokens is overwritten (if there is more than one pair): of more
      pairs asked for, only so many are planted, and none if not even one fits.

    Example: n = 1000, a record of 20 tokens, a lookup of 23. The distance is uniform over
    20 ... 975; say 600. The record then starts anywhere in 1 ... 376, say at 50, where tokens
    50 ... 69 are replaced; the lookup replaces tokens 650 ... 672.

    Attributes:
        tokenizer: spells the text; each record and lookup is tokenized by itself.
        records_per_sequence: pairs in a sequence; by default one per 1,000 tokens, at least one.
        min_tokens: a sequence at least this long holds a pair of usual spelling.

    Raises:
        UsageError: `records_per_sequence` is below 1 or above the number of keys.
    """

    tokenizer: PreTrainedTokenizerBase
    records_per_sequence: int | None = field(default=None, kw_only=True)
    min_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        asked = self.records_per_sequence
        if asked is not None and not 1 <= asked <= NUM_KEYS:
            raise UsageError(
                f"records_per_sequence is {asked}, but must be from 1 to {NUM_KEYS:,} (the number "
                "of keys). Leave it out for one record per 1,000 tokens."
            )
        sample = self._draw(256, np.random.default_rng(0))
        longest = max(len(record) + len(lookup) for record, lookup in sample)
        object.__setattr__(self, "min_tokens", longest + 2)

    def num_pairs(self, num_tokens: int) -> int:
        """Return how many pairs a sequence of so many tokens should hold."""
        if self.records_per_sequence is not None:
            return self.records_per_sequence
        return min(max(1, round(num_tokens / TOKENS_PER_PAIR)), NUM_KEYS)

    def apply(
        self, input_ids: np.ndarray, rng: np.random.Generator, *, pairs: int | None = None
    ) -> np.ndarray:
        """Return a copy of one document's tokens with records and lookups planted in it.

        Args:
            input_ids: token ids, [n], of one document or a piece of one.
            rng: the source of keys, codes, distances and places.
            pairs: how many pairs to plant; `num_pairs(n)` by default.

        Returns:
            Token ids, [n], of the same dtype.
        """
        planted = input_ids.copy()
        room = len(input_ids) - 2
        drawn = self._draw(self.num_pairs(len(input_ids)) if pairs is None else pairs, rng)
        longest = max((len(record) + len(lookup) for record, lookup in drawn), default=1)
        # With three quarters of the room free, some gap always holds one pair more.
        drawn = drawn[: max(1, room // (4 * longest))]
        drawn = [pair for pair in drawn if len(pair[0]) + len(pair[1]) <= room]

        def distance(record: np.ndarray, lookup: np.ndarray) -> int:
            return int(rng.integers(len(record), room - len(lookup) + 1))

        free = np.ones(len(input_ids), dtype=bool)
        queue = [(distance(*pair), pair) for pair in drawn]
        # The longest have the fewest places, so they choose first.
        queue.sort(key=lambda item: -item[0])
        for apart, (record, lookup) in queue:
            at = _place(free, apart, len(record), len(lookup), rng)
            while at is None:
                apart = distance(record, lookup)
                at = _place(free, apart, len(record), len(lookup), rng)
            for start, text in ((at, record), (at + apart, lookup)):
                planted[start : start + len(text)] = text
                free[start : start + len(text)] = False
        return planted

    def _draw(self, num: int, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """Draw pairs with different keys, as token ids ([tokens of record], [of lookup])."""
        texts: list[str] = []
        for key in rng.choice(NUM_KEYS, size=num, replace=False).tolist():
            words, number = divmod(key, 90)
            first, second = divmod(words, len(WORDS))
            name = f"{WORDS[first]}-{WORDS[second]}-{number + 10}"
            code = int(rng.integers(100_000, 1_000_000))
            texts += [text.format(key=name, code=code) for text in (RECORD, LOOKUP)]
        if not texts:
            return []
        # One call for all: tokenizers do not spell "amber-cedar" as "amber" + "-" + "cedar", so
        # the ids can't be put together from ids of words, and a call costs more than its texts.
        ids = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        arrays = [np.asarray(one) for one in ids]
        return list(zip(arrays[::2], arrays[1::2], strict=True))


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
