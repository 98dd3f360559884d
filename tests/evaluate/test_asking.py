"""A hybrid's needle questions through the engine: the answers of `generate()`, however many run."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from longgen.engine import engine as engine_module
from longgen.errors import UsageError
from longgen.evaluate import asking
from longgen.evaluate.asking import answer_examples, guess_answers, run_needle
from longgen.evaluate.needle import NeedleCell, NeedleExample, NeedleMiss, NeedleTask

HAYSTACK = np.random.default_rng(0).integers(2, 600, 1000)
# The second length is beyond the hybrid's context.
LENGTHS = (160, 250)


def written(model: Any, example: NeedleExample) -> tuple[int, ...]:
    """Return what transformers' generate() writes after the question."""
    prompt = torch.tensor([example.prompt_ids])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=example.answer_size,
        do_sample=False,
        pad_token_id=0,
    )
    return tuple(out[0, prompt.shape[1] :].tolist())


def answers(model: Any, examples: list[NeedleExample], **settings: Any) -> list[tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}

    def on_answer(number: int, example: NeedleExample, tokens: tuple[int, ...]) -> None:
        assert example is examples[number]
        found[number] = tokens

    settings = {"most": len(examples)} | settings
    answer_examples(model, iter(examples), on_answer, **settings)
    assert sorted(found) == list(range(len(examples)))
    return [found[number] for number in range(len(examples))]


def right(examples: list[NeedleExample], found: list[tuple[int, ...]]) -> list[bool]:
    return [one.answer_ids == tokens for one, tokens in zip(examples, found, strict=True)]


@pytest.fixture(scope="module", params=LENGTHS)
def examples(
    request: pytest.FixtureRequest, hybrid: Any, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> list[NeedleExample]:
    """Questions whose answers are what the hybrid writes, or differ from that in one token."""
    task = NeedleTask(lengths=(request.param,))
    found = []
    for sample in range(8):
        example = task.build(tokenizers["merged-digits"], HAYSTACK, request.param, 0.5, sample)
        answer = list(written(hybrid, example))
        if sample % 2:
            place = sample % len(answer)
            answer[place] = (answer[place] + 1) % 600
        ids = (*example.prompt_ids, *answer)
        found.append(dataclasses.replace(example, input_ids=ids))
    assert len({example.answer_size for example in found}) > 1
    return found


@pytest.mark.parametrize("batch_size", [None, 1, 3, 100])
def test_answers_are_those_of_generate(
    hybrid: Any, examples: list[NeedleExample], batch_size: int | None
) -> None:
    by_generate = [written(hybrid, example) for example in examples]
    assert right(examples, by_generate) == [True, False] * 4
    assert answers(hybrid, examples, batch_size=batch_size) == by_generate
    # One at a time: their answers differ in length.
    guessed = [guess_answers(hybrid, [example])[0] for example in examples]
    assert right(examples, guessed) == [True, False] * 4


def test_a_prompt_is_read_in_pieces(
    hybrid: Any, examples: list[NeedleExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "STEP_TOKENS", 64)
    real, sizes = engine_module.run, []

    def run(model: Any, step: Any, tokens: Any, rows: Any) -> torch.Tensor:
        sizes.append(len(tokens))
        return real(model, step, tokens, rows)

    monkeypatch.setattr(engine_module, "run", run)
    assert right(examples, answers(hybrid, examples)) == [True, False] * 4
    assert max(sizes) == 64


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_grid_goes_through_the_engine_and_goes_on(
    hybrid: Any,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int | None,
) -> None:
    task = NeedleTask(lengths=(250, 160), num_depths=10, samples=3)
    build, asked = NeedleTask.build, []

    def answered(self: NeedleTask, *args: Any) -> NeedleExample:
        """Every other sample asks for what the hybrid writes."""
        example = build(self, *args)
        *_, length, depth, sample = args
        asked.append((length, depth, sample))
        answer = written(hybrid, example) if sample % 2 else example.answer_ids
        return dataclasses.replace(example, input_ids=(*example.prompt_ids, *answer))

    monkeypatch.setattr(NeedleTask, "build", answered)
    seen: list[tuple[int, int]] = []
    cells: list[NeedleCell] = []
    hybrid.train()
    try:
        result = run_needle(
            hybrid,
            tokenizer,
            HAYSTACK,
            task,
            batch_size=batch_size,
            progress=lambda a, b: seen.append((a, b)),
            on_cell=cells.append,
        )
        assert hybrid.training
    finally:
        hybrid.eval()
    grid = [(length, depth) for length in (160, 250) for depth in task.depths]
    assert asked == [(*place, sample) for place in grid for sample in range(3)]
    assert seen == [(i, 20) for i in range(1, 21)]
    assert [(cell.length, cell.depth) for cell in result.cells] == grid
    assert {cell.hits for cell in result.cells} == {(False, True, False)}
    for cell in result.cells:
        planted = {s: build(task, tokenizer, HAYSTACK, *grid_place(cell), s) for s in (0, 2)}
        assert cell.misses == tuple(
            NeedleMiss(
                sample=s,
                city=example.city,
                expected=example.number,
                answer=tokenizer.decode(written(hybrid, example)),
            )
            for s, example in planted.items()
        )
    assert [len(row["misses"]) for row in result.rows("hybrid")] == [20, 20]
    assert sorted(cells, key=grid_place) == list(result.cells)
    assert {row["runtime"] for row in result.rows("hybrid")} == {"longgen.engine"}

    asked.clear()
    again = run_needle(hybrid, tokenizer, HAYSTACK, task, finished=cells[:13])
    assert again == result
    left = [(cell.length, cell.depth) for cell in cells[13:]]
    assert asked == [(*place, sample) for place in sorted(left) for sample in range(3)]


def grid_place(cell: NeedleCell) -> tuple[int, float]:
    return cell.length, cell.depth


def test_the_batch_is_what_is_of_use_and_fits(
    hybrid: Any, examples: list[NeedleExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    class Watched(asking.Engine):  # type: ignore[name-defined]
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            sizes.append(self.cache.slots.size)
            self.each = self.cache.bytes_of(self.max_length)

    monkeypatch.setattr(asking, "Engine", Watched)
    monkeypatch.setattr(asking, "STEP_TOKENS", 1000)
    (alone,) = [Watched(hybrid, max_length=len(examples[0].input_ids), beyond_context=True).each]
    length, answer = len(examples[0].input_ids), examples[0].answer_size
    for free, wanted in ((0, 1), (6 * alone, 4), (10**12, (answer + 1) * 1000 // length + 2)):
        monkeypatch.setattr(asking, "free_bytes", lambda device, free=free: free)
        answers(hybrid, examples[:1], most=1000)
        assert sizes[-1] == wanted, free
    answers(hybrid, examples[:2])
    assert sizes[-1] == 2


def test_what_the_engine_cannot_answer_is_a_sentence(
    hybrid: Any, examples: list[NeedleExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    length = len(examples[0].input_ids)

    def full(*args: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "run", full)
        with pytest.raises(UsageError, match=f"question of {length} tokens on cpu: Not enough mem"):
            answers(hybrid, examples)
    with monkeypatch.context() as patch:
        patch.setattr(asking, "Engine", full)
        with pytest.raises(UsageError, match=f"needle test of 5 x {length} tokens; use a smaller"):
            answers(hybrid, examples, batch_size=5)
    real = engine_module.run
    monkeypatch.setattr(engine_module, "run", lambda *args: real(*args) * torch.nan)
    with pytest.raises(UsageError, match=r"could not answer .* are NaN"):
        answers(hybrid, examples)
