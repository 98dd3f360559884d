"""Put the questions of a needle grid to a model: which does it answer with the expected tokens, and
what does it write in place of the others?

The engine writes the answers of a hybrid, many at once. Other models are judged by one forward pass
over prompt and answer, which finds the same ones right.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longgen.engine import Engine, SamplingParams
from longgen.errors import UsageError
from longgen.evaluate.needle import (
    NeedleCell,
    NeedleExample,
    NeedleMiss,
    NeedleResult,
    NeedleTask,
    Tokens,
)
from longgen.memory import clear, free_bytes
from longgen.runtime import ENGINE, runtime_of

# Tokens of prompts that the engine reads in a step.
STEP_TOKENS = 8192
# Of the memory that is free, what keys and values may take; the rest is for the work itself.
_CACHE_SHARE = 0.5


def run_needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack_tokens: Tokens,
    task: NeedleTask,
    *,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int | None = None,
    finished: Sequence[NeedleCell] = (),
    on_cell: Callable[[NeedleCell], None] | None = None,
    kv_dtype: str | None = None,
) -> NeedleResult:
    """Run the grid on a model, shortest length first.

    The engine answers for a hybrid, all questions of a length in one go; a transformers model is
    asked cell by cell.

    Args:
        model: a causal language model, on its device and in its dtype.
        tokenizer: the tokenizer the model was trained with.
        haystack_tokens: held-out text as token ids, shape (tokens,).
        task: the grid.
        progress: called with (cells done, cells in the grid) after every cell.
        batch_size: questions at once; None is one for transformers, and for the engine as many as
            are of use and fit.
        finished: cells of an earlier, interrupted run, taken over as they are (see
            `NeedleTask.finished_cells`).
        on_cell: called with every cell that was run, so that the caller can save it.
        kv_dtype: of the engine's keys and values, as `Engine` takes it; only for hybrids.

    Raises:
        UsageError: before anything runs, if the held-out text is too short for one of the lengths;
            later, if the device runs out of memory.
    """
    haystack = np.asarray(haystack_tokens)
    for length in task.lengths:
        task.check_haystack(len(haystack), length)
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"The batch size must be at least 1, not {batch_size}.")
    runtime = runtime_of(model)
    ask = partial(_ask_engine, kv_dtype=kv_dtype) if runtime == ENGINE else _ask_transformers
    if kv_dtype is not None and runtime != ENGINE:
        raise UsageError(
            f"Keys and values in {kv_dtype} are for hybrids, which the engine runs, and "
            f"{type(model).__name__} isn't one."
        )
    known = {(cell.length, cell.depth): cell for cell in finished}
    grid = [(length, depth) for length in sorted(task.lengths) for depth in task.depths]
    num_done = 0

    def done() -> None:
        nonlocal num_done
        num_done += 1
        if progress:
            progress(num_done, len(grid))

    def measured(cell: NeedleCell) -> None:
        known[cell.length, cell.depth] = cell
        if on_cell:
            on_cell(cell)
        done()

    for length in sorted(task.lengths):
        missing = [depth for depth in task.depths if (length, depth) not in known]
        for _ in range(task.num_depths - len(missing)):
            done()
        if missing:
            questions = _Questions(task, tokenizer, haystack, length, missing)
            ask(model, questions, measured, batch_size)
    return NeedleResult(task, tuple(known[place] for place in grid), len(haystack), runtime)


@dataclass(frozen=True, slots=True)
class _Questions:
    """Build the questions of one length, at some depths."""

    task: NeedleTask
    tokenizer: PreTrainedTokenizerBase
    haystack: np.ndarray
    length: int
    depths: Sequence[float]

    def at(self, depth: float) -> Iterator[NeedleExample]:
        """Give the questions of one cell."""
        for sample in range(self.task.samples):
            yield self.task.build(self.tokenizer, self.haystack, self.length, depth, sample)

    def miss(
        self, sample: int, example: NeedleExample, written: tuple[int, ...]
    ) -> NeedleMiss | None:
        """Say what was written in place of a question's answer; None if it is the answer."""
        if written == example.answer_ids:
            return None
        # Some tokenizers drop the space that a text begins with; here a token stands before it.
        before = example.input_ids[-example.answer_size - 1]
        answer = self._text(before, *written).removeprefix(self._text(before))
        return NeedleMiss(sample=sample, city=example.city, expected=example.number, answer=answer)

    def cell(self, depth: float, outcomes: Sequence[NeedleMiss | None]) -> NeedleCell:
        """Give the cell of a depth from what `miss` says of its samples, in their order."""
        hits = tuple(miss is None for miss in outcomes)
        return NeedleCell(self.length, depth, hits, tuple(filter(None, outcomes)))

    def _text(self, *ids: int) -> str:
        # Tidying would hide which tokens they are: " ." would read ".".
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _ask_transformers(
    model: PreTrainedModel,
    questions: _Questions,
    on_cell: Callable[[NeedleCell], None],
    batch_size: int | None,
) -> None:
    for depth in questions.depths:
        cell = questions.at(depth)
        outcomes: list[NeedleMiss | None] = []
        while batch := list(islice(cell, batch_size or 1)):
            for example, guess in zip(batch, guess_answers(model, batch), strict=True):
                outcomes.append(questions.miss(len(outcomes), example, guess))
        on_cell(questions.cell(depth, outcomes))


def _ask_engine(
    model: PreTrainedModel,
    questions: _Questions,
    on_cell: Callable[[NeedleCell], None],
    batch_size: int | None,
    *,
    kv_dtype: str | None,
) -> None:
    samples = questions.task.samples
    outcomes: list[dict[int, NeedleMiss | None]] = [{} for _ in questions.depths]

    def on_answer(number: int, example: NeedleExample, written: tuple[int, ...]) -> None:
        place, sample = divmod(number, samples)
        outcomes[place][sample] = questions.miss(sample, example, written)
        if len(outcomes[place]) == samples:
            in_order = [outcomes[place][s] for s in range(samples)]
            on_cell(questions.cell(questions.depths[place], in_order))

    examples = chain.from_iterable(map(questions.at, questions.depths))
    most = samples * len(questions.depths)
    answer_examples(model, examples, on_answer, batch_size, most=most, kv_dtype=kv_dtype)


def guess_answers(
    model: PreTrainedModel, examples: Sequence[NeedleExample]
) -> list[tuple[int, ...]]:
    """Give for each example the most likely token at every place of its answer.

    They come from one forward pass over prompt and answer, each given the true answer so far. If
    they are the answer's tokens, then greedy decoding writes those same tokens one after the other;
    if greedy decoding writes the answer's tokens, each was the most likely one given the true
    answer so far. So comparing them with the answer equals comparing the tokens of
    `generate(do_sample=False)`, up to rounding between a cached and an uncached forward, at a
    fraction of the cost. A model that writes the digits with other tokens than its tokenizer would
    counts as wrong. Up to the first wrong token they are also what greedy decoding writes, but not
    after it: there they still follow the true answer.

    Args:
        model: a causal language model.
        examples: examples of one length; their answers may differ in tokens.

    Returns:
        as many tokens for each example as its answer has.

    Raises:
        UsageError: the device runs out of memory.
    """
    ids = torch.tensor([example.input_ids for example in examples], device=model.device)
    keep = max(example.answer_size for example in examples) + 1
    try:
        with evaluating(model):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
            guesses = logits[:, :-1].argmax(-1).cpu()  # (B, keep - 1), ending with the answers
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(model, *ids.shape) from error
    return [
        tuple(guess[-example.answer_size :].tolist())
        for guess, example in zip(guesses, examples, strict=True)
    ]


def answer_examples(
    model: PreTrainedModel,
    examples: Iterator[NeedleExample],
    on_answer: Callable[[int, NeedleExample, tuple[int, ...]], None],
    batch_size: int | None = None,
    *,
    most: int,
    kv_dtype: str | None = None,
) -> None:
    """Have the engine write the answers of a hybrid, and hand over each with its question.

    Questions come and go by continuous batching, the likeliest token every time; no more of them
    are built than run at once.

    Args:
        model: a hybrid; the examples may go beyond its context.
        examples: of one length, at least one.
        on_answer: called with an example's number, counted from 0, the example, and the tokens
            written, as many as its answer has. The first to be asked are the first to be answered,
            or nearly so.
        batch_size: sequences that run at once; None is as many as are of use and fit.
        most: how many examples there are.
        kv_dtype: of keys and values, as `Engine` takes it.

    Raises:
        UsageError: the device runs out of memory, or the engine cannot answer a question.
    """
    first = next(examples)
    length = len(first.input_ids)
    waiting = enumerate(chain([first], examples))
    asked: dict[str, tuple[int, NeedleExample, list[int]]] = {}
    clear(model.device)
    with evaluating(model):
        engine = _engine(model, first, batch_size, most, kv_dtype)
        while True:
            while len(asked) < engine.cache.slots.size and (item := next(waiting, None)):
                number, example = item
                params = SamplingParams(max_tokens=example.answer_size, ignore_eos=True)
                name = engine.add_request(example.prompt_ids, params)
                asked[name] = (number, example, [])
            if not asked:
                return
            for out in engine.step():
                number, example, written = asked[out.id]
                written += out.token_ids
                if out.finish_reason == "error":
                    raise UsageError(
                        f"The engine could not answer a needle question of {length:,} tokens on "
                        f"{model.device}: {out.error}"
                    )
                if out.finish_reason is not None:
                    del asked[out.id]
                    on_answer(number, example, tuple(written))


def _engine(
    model: PreTrainedModel,
    example: NeedleExample,
    batch_size: int | None,
    most: int,
    kv_dtype: str | None,
) -> Engine:
    """Return an engine for questions as long as an example."""
    length = len(example.input_ids)

    def make(size: int) -> Engine:
        try:
            return Engine(
                model,
                max_length=length,
                beyond_context=True,
                max_sequences=size,
                max_batched_tokens=max(size, STEP_TOKENS),
                kv_dtype=kv_dtype,
                # A few tokens each: what compiling takes would not come back.
                enforce_eager=True,
            )
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(model, size, length) from error

    if batch_size is not None:
        return make(batch_size)
    engine = make(1)
    # While the next prompts are read, those before them write: more than this would only wait.
    useful = (example.answer_size + 1) * STEP_TOKENS // length + 2
    room = int(_CACHE_SHARE * free_bytes(model.device)) // engine.cache.bytes_of(length)
    size = min(useful, 1 + room, most)
    if size == 1:
        return engine
    del engine
    return make(size)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Run a block with the model in eval mode and without autograd, then put its mode back."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _out_of_memory(model: PreTrainedModel, number: int, length: int) -> UsageError:
    return UsageError(
        f"{model.device} ran out of memory on a needle test of {number} x {length:,} tokens; use a "
        "smaller batch, shorter lengths or a larger device."
    )
