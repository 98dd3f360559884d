"""The needle grid: does a model find one fact in a long text, at every length and every depth?

A short sentence with a six-digit number is planted in held-out text and asked for at the end. The
examples depend on the seed, the length, the depth and the sample alone, so every model sees the
same ones and a cell gives the same answer whichever other cells run.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from longgen.errors import UsageError
from longgen.evaluate.results import Row, Rows, wilson_interval
from longgen.runtime import TRANSFORMERS

MIN_DEPTHS = 10
CITIES = (
    "Paris London Tokyo Cairo Lima Oslo Rome Delhi Quito Accra Hanoi Dublin Prague Vienna Athens"
    " Madrid Berlin Warsaw"
)
NEEDLE = "\nThe special magic number for {city} is {number}. Remember it.\n"
QUESTION = (
    "\nQuestion: What is the special magic number for {city}?"
    " Answer: The special magic number for {city} is"
)
ANSWER = " {number}"

Tokens = Sequence[int] | np.ndarray | torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleExample:
    """Hold one prompt with its answer, in tokens.

    Attributes:
        input_ids: the whole sequence: bos where the tokenizer uses one, held-out text with the
            needle in it, question, answer.
        needle_start: index of the needle's first token.
        needle_size: tokens in the needle.
        answer_size: tokens in the answer; they are the last of `input_ids`.
        haystack_start: index, in the held-out tokens, of the first one used.
        city: the city asked for.
        number: the six digits expected.
    """

    input_ids: tuple[int, ...]
    needle_start: int
    needle_size: int
    answer_size: int
    haystack_start: int
    city: str
    number: str

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Give what a user would hand to `generate()`: everything but the answer."""
        return self.input_ids[: -self.answer_size]

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """Give the tokens the model must write next."""
        return self.input_ids[-self.answer_size :]


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleMiss:
    """Hold what a model wrote in place of an answer.

    The engine's tokens are those it generated. Of a transformers model they are the likeliest at
    every place of the answer, given the right answer's tokens before it, so after the first wrong
    one they are not what it would have gone on to write: "982913" for 482913 says that the first
    digit was lost, not that the others were found.

    Attributes:
        sample: number of the example within its cell.
        city: the city asked for.
        expected: the six digits expected.
        answer: the text of the tokens written, as many as the right answer has; that one would read
            " 482913", with the space. The right text in other tokens is a miss too.
    """

    sample: int
    city: str
    expected: str
    answer: str


@dataclass(frozen=True, slots=True)
class NeedleCell:
    """Hold one cell of the grid: a length, a depth, and a hit or a miss for every sample.

    Attributes:
        length: tokens of the sequences, answer included.
        depth: 0 to 1, where the needle was.
        hits: whether the answer was right, for each of the samples.
        misses: what was written where it was not, in order of the samples; empty in cells taken
            over from older files, which did not keep it.
    """

    length: int
    depth: float
    hits: tuple[bool, ...]
    misses: tuple[NeedleMiss, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleTask:
    """Describe a needle grid and build its examples.

    Attributes:
        lengths: sequence lengths in tokens, answer included.
        num_depths: evenly spaced depths from 0 (the very start) to 1 (right before the question),
            ten or more.
        samples: examples per cell.
        seed: changes every city, number and piece of text.
        wrap_haystack: repeat held-out text that is shorter than a length instead of refusing.
            Results record it.
    """

    lengths: tuple[int, ...]
    num_depths: int = 11
    samples: int = 10
    seed: int = 0
    wrap_haystack: bool = False

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise UsageError(
                f"Needle lengths must be different positive numbers, not {list(self.lengths)}."
            )
        if self.num_depths < MIN_DEPTHS:
            raise UsageError(
                f"A needle grid needs at least {MIN_DEPTHS} depths to step over no blind spot, not"
                f" {self.num_depths}; ask for fewer samples per cell to save time."
            )
        if self.samples < 1:
            raise UsageError(f"A needle grid needs a sample or more per cell, not {self.samples}.")

    @property
    def depths(self) -> tuple[float, ...]:
        """Give the depths of the grid, 0 and 1 included."""
        return tuple(i / (self.num_depths - 1) for i in range(self.num_depths))

    def build(
        self,
        tokenizer: PreTrainedTokenizerBase,
        haystack_tokens: Tokens,
        length: int,
        depth: float,
        sample: int,
    ) -> NeedleExample:
        """Build one example of exactly `length` tokens.

        With length 96, depth 0.5 and a tokenizer that writes every digit as one token, the sequence
        reads

            [bos] ... half of the held-out text ...
            The special magic number for Paris is 482913. Remember it.
            ... the other half of the held-out text ...
            Question: What is the special magic number for Paris? Answer: The special magic number
                for Paris is 482913

        The last tokens, ` 482913`, are the answer. `room` tokens of held-out text are left after
        bos, needle, question and answer have taken their share, and the needle follows the first
        floor(depth * room) of them. bos stands at the start only where the tokenizer puts one there
        itself.

        The pieces are tokenised one by one, so the prompt is what a user who cuts held-out text at
        a token would pass to `generate()`. The answer's tokens are those that follow the question's
        when both are tokenised together, which is how the model saw numbers in training, also with
        tokenizers that merge digits or mark word starts. (Where the tokenizer would fuse the two
        across the border, the prompt stays as it is and the answer is tokenised alone.)

        Args:
            tokenizer: a Hugging Face tokenizer.
            haystack_tokens: held-out text as token ids, shape (tokens,), without special tokens.
            length: tokens in the whole sequence, answer included.
            depth: 0 to 1, where in the text the needle goes.
            sample: number of the example within its cell.

        Raises:
            UsageError: the text is shorter than `length`, `length` cannot hold needle and question,
                or the tokenizer cannot write the number.
        """
        haystack = np.asarray(haystack_tokens)
        self.check_haystack(len(haystack), length)
        # A string seeds through SHA-512: the same on every machine, a stream for every cell.
        rng = random.Random(f"{self.seed}/{length}/{depth:.6f}/{sample}")
        city = rng.choice(CITIES.split())
        number = "".join(rng.choice("123456789") for _ in range(6))
        needle = _encode(tokenizer, NEEDLE.format(city=city, number=number))
        question = _encode(tokenizer, QUESTION.format(city=city))
        answer = _answer_ids(tokenizer, city, question, ANSWER.format(number=number))
        bos = _bos(tokenizer)
        room = length - len(bos) - len(needle) - len(question) - len(answer)
        if room < 0:
            raise UsageError(
                f"A length of {length} tokens cannot hold the needle and its question, which take"
                f" {length - room}; ask for a greater length."
            )
        if self.wrap_haystack and len(haystack) < length:
            start = int(rng.random() * len(haystack))
            text = haystack[np.arange(start, start + room) % len(haystack)].tolist()
        else:
            start = int(rng.random() * (len(haystack) - room + 1))
            text = haystack[start : start + room].tolist()
        cut = math.floor(depth * room)
        return NeedleExample(
            input_ids=(*bos, *text[:cut], *needle, *text[cut:], *question, *answer),
            needle_start=len(bos) + cut,
            needle_size=len(needle),
            answer_size=len(answer),
            haystack_start=start,
            city=city,
            number=number,
        )

    def check_haystack(self, haystack_size: int, length: int) -> None:
        """Raise a `UsageError` unless `haystack_size` tokens of text are enough for `length`."""
        if haystack_size < 1 or (haystack_size < length and not self.wrap_haystack):
            raise UsageError(
                f"The held-out text has {haystack_size:,} tokens, and a needle test at a length of"
                f" {length:,} needs {length:,}; give more text, ask for shorter lengths, or allow"
                " the text to be repeated."
            )

    def finished_cells(self, rows: Rows) -> list[NeedleCell]:
        """Take from saved rows of one model the cells this task need not run again.

        Rows of another seed, another number of samples or repeated text do not count. The caller
        answers for model and held-out text being the same. Rows from before misses were kept give
        cells without them.
        """
        wanted = {(length, depth) for length in self.lengths for depth in self.depths}
        setting = (self.seed, self.samples, self.wrap_haystack)
        return [
            NeedleCell(row["length"], depth, tuple(map(bool, hits)), _misses(row, depth))
            for row in rows
            if (row.get("seed"), row.get("samples"), row.get("wrap_haystack")) == setting
            for depth, hits in zip(row["depths"], row["hits"], strict=True)
            if (row["length"], depth) in wanted
        ]


@dataclass(frozen=True, slots=True)
class LengthScore:
    """Hold the accuracy over all depths of one length, and the Wilson 95 % interval around it."""

    length: int
    accuracy: float
    n: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class NeedleResult:
    """Hold the cells of a grid, all of them or those that ran before an interruption.

    Attributes:
        task: what was asked.
        cells: one outcome per length and depth.
        haystack_size: tokens of held-out text.
        runtime: what ran the model, `longgen.runtime`'s name of it.
    """

    task: NeedleTask
    cells: tuple[NeedleCell, ...]
    haystack_size: int
    runtime: str = TRANSFORMERS

    @property
    def accuracy(self) -> dict[tuple[int, float], float]:
        """Give the share of hits by (length, depth)."""
        return {(cell.length, cell.depth): sum(cell.hits) / len(cell.hits) for cell in self.cells}

    def by_length(self) -> list[LengthScore]:
        """Give one score per length that has cells."""
        scores = []
        for length in self.task.lengths:
            hits = [hit for cell in self.cells if cell.length == length for hit in cell.hits]
            if hits:
                low, high = wilson_interval(sum(hits), len(hits))
                scores.append(LengthScore(length, sum(hits) / len(hits), len(hits), low, high))
        return scores

    def rows(self, variant: str) -> list[dict[str, object]]:
        """Give one results row per length, case `needle.<variant>`.

        `hits` has a list for every depth, a 1 or 0 for every sample. `misses` lists the zeros with
        depth, sample, city, the digits expected and the text written; `runtime` tells what the text
        means (see `NeedleMiss`). A zero taken over from an older file, which kept no text, is not
        in it.
        """
        rows: list[dict[str, object]] = []
        for score in self.by_length():
            cells = [cell for cell in self.cells if cell.length == score.length]
            cells.sort(key=lambda cell: cell.depth)
            rows.append(
                {
                    "case": f"needle.{variant}",
                    "length": score.length,
                    "value": score.accuracy,
                    "unit": "accuracy",
                    "n": score.n,
                    "interval": [score.low, score.high],
                    "depths": [cell.depth for cell in cells],
                    "accuracy_by_depth": [self.accuracy[cell.length, cell.depth] for cell in cells],
                    "hits": [[int(hit) for hit in cell.hits] for cell in cells],
                    "misses": [
                        {"depth": cell.depth, **asdict(miss)}
                        for cell in cells
                        for miss in cell.misses
                    ],
                    "samples": self.task.samples,
                    "seed": self.task.seed,
                    "runtime": self.runtime,
                    "wrap_haystack": self.task.wrap_haystack,
                    "haystack_repeated": self.haystack_size < score.length,
                }
            )
        return rows


def _misses(row: Row, depth: float) -> tuple[NeedleMiss, ...]:
    return tuple(
        NeedleMiss(**{name: value for name, value in miss.items() if name != "depth"})
        for miss in row.get("misses", ())
        if miss["depth"] == depth
    )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give [bos] if the tokenizer itself starts a sequence with it, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a")[0] == bos else []


def _answer_ids(
    tokenizer: PreTrainedTokenizerBase, city: str, question: list[int], answer: str
) -> list[int]:
    ids = _encode(tokenizer, QUESTION.format(city=city) + answer)
    fused = ids[: len(question)] != question
    ids = _encode(tokenizer, answer) if fused else ids[len(question) :]
    if not tokenizer.decode(question + ids).endswith(answer):
        raise UsageError(
            f"The tokenizer {type(tokenizer).__name__} cannot write the answer {answer!r} after the"
            " question; a needle test needs one that keeps digits and spaces."
        )
    return ids
