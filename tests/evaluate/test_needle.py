import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longgen.errors import UsageError
from longgen.evaluate import asking
from longgen.evaluate.asking import guess_answers, run_needle
from longgen.evaluate.needle import (
    NEEDLE,
    QUESTION,
    NeedleCell,
    NeedleExample,
    NeedleMiss,
    NeedleResult,
    NeedleTask,
)
from longgen.evaluate.results import Rows, wilson_interval

# Ids that no needle, question or answer holds, each one once: a slice tells where it was cut.
HAYSTACK = np.arange(10_000, 14_000)
KINDS = ["split-digits", "merged-digits", "bos", "word-starts", "across-words"]
Tokenizers = dict[str, PreTrainedTokenizerFast]


class CopyModel:
    """Continue with what followed the longest earlier copy of the last tokens; see no future.

    That answers every needle question rightly, and any model that does nothing else wrong.
    """

    def __init__(self, spoil: int | None = None) -> None:
        self.device = torch.device("cpu")
        self.config = LlamaConfig()
        self.training = True
        self.spoil = spoil  # which of the kept positions to get wrong
        self.calls: list[tuple[int, ...]] = []
        self.kept: set[int] = set()

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def __call__(
        self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int
    ) -> SimpleNamespace:
        assert not self.training and not use_cache and torch.is_inference_mode_enabled()
        self.calls.append(tuple(input_ids.shape))
        self.kept.add(logits_to_keep)
        size = input_ids.shape[1]
        logits = torch.zeros(len(input_ids), logits_to_keep, int(input_ids.max()) + 2)
        for row, ids in enumerate(input_ids.tolist()):
            for kept, position in enumerate(range(size - logits_to_keep, size)):
                guess = self.continuation(ids[: position + 1])
                logits[row, kept, guess + (kept == self.spoil)] = 1
        return SimpleNamespace(logits=logits)

    @staticmethod
    def continuation(seen: list[int]) -> int:
        def overlap(end: int) -> int:
            n = 0
            while n <= end and seen[end - n] == seen[-1 - n]:
                n += 1
            return n

        return seen[max(range(len(seen) - 1), key=overlap) + 1]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(150, 3000),
    depth=st.sampled_from(NeedleTask(lengths=(1,)).depths) | st.floats(0, 1),
    sample=st.integers(0, 5),
    seed=st.integers(0, 3),
)
def test_needle_sits_where_it_says(
    tokenizers: Tokenizers, kind: str, length: int, depth: float, sample: int, seed: int
) -> None:
    tokenizer = tokenizers[kind]
    task = NeedleTask(lengths=(length,), seed=seed)
    example = task.build(tokenizer, HAYSTACK, length, depth, sample)
    ids = list(example.input_ids)
    assert len(ids) == length
    bos = [tokenizer.bos_token_id] * (kind == "bos")
    assert ids[: len(bos)] == bos

    needle = ids[example.needle_start :][: example.needle_size]
    planted = NEEDLE.format(city=example.city, number=example.number)
    assert tokenizer.decode(needle).removeprefix(" ") in (planted, " " + planted)
    assert len(example.number) == 6 and set(example.number) <= set("123456789")

    question = tokenizer.encode(QUESTION.format(city=example.city), add_special_tokens=False)
    assert list(example.prompt_ids[-len(question) :]) == question
    assert list(example.prompt_ids + example.answer_ids) == ids
    assert tokenizer.decode(question + list(example.answer_ids)).endswith(f" is {example.number}")

    before = ids[len(bos) : example.needle_start]
    after = ids[
        example.needle_start + example.needle_size : length - example.answer_size - len(question)
    ]
    room = len(before) + len(after)
    assert len(before) == math.floor(depth * room)
    start = example.haystack_start
    assert before + after == HAYSTACK[start : start + room].tolist()


def test_merged_digits_are_really_merged(tokenizers: Tokenizers) -> None:
    task = NeedleTask(lengths=(200,))
    sizes = {
        kind: {task.build(t, HAYSTACK, 200, 0.5, s).answer_size for s in range(40)}
        for kind, t in tokenizers.items()
    }
    assert len(sizes["split-digits"]) == 1
    assert len(sizes["merged-digits"]) > 1


def test_answer_follows_the_question_as_in_running_text(tokenizers: Tokenizers) -> None:
    """A tokenizer that marks word starts would put a second space before an answer taken alone."""
    tokenizer = tokenizers["word-starts"]
    example = NeedleTask(lengths=(200,)).build(tokenizer, HAYSTACK, 200, 0.5, 0)
    alone = tokenizer.encode(f" {example.number}", add_special_tokens=False)
    together = tokenizer.encode(
        f"{QUESTION.format(city=example.city)} {example.number}", add_special_tokens=False
    )
    assert list(example.answer_ids) == together[-example.answer_size :] != alone


def test_fused_border_leaves_the_prompt_alone(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["across-words"]
    example = NeedleTask(lengths=(200,)).build(tokenizer, HAYSTACK, 200, 0.5, 0)
    question = QUESTION.format(city=example.city)
    ids = tokenizer.encode(question)
    together = tokenizer.encode(f"{question} {example.number}")
    assert together[: len(ids)] != ids
    assert list(example.prompt_ids[-len(ids) :]) == ids
    assert list(example.answer_ids) == tokenizer.encode(f" {example.number}")


def test_examples_depend_on_their_own_cell_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    small = NeedleTask(lengths=(256,), samples=1, seed=5)
    large = NeedleTask(lengths=(128, 256), samples=20, num_depths=21, seed=5)
    assert small.depths[5] == large.depths[10] == 0.5
    built = [task.build(tokenizer, HAYSTACK, 256, 0.5, 3) for task in (small, large)]
    assert built[0] == built[1]
    others = [
        large.build(tokenizer, HAYSTACK, 256, 0.5, 4),
        large.build(tokenizer, HAYSTACK, 256, 0.55, 3),
        dataclasses.replace(large, seed=6).build(tokenizer, HAYSTACK, 256, 0.5, 3),
    ]
    assert len({example.number for example in [built[0], *others]}) == 4
    assert len({example.haystack_start for example in [built[0], *others]}) == 4


def test_text_comes_from_all_over_the_haystack(tokenizer: PreTrainedTokenizerFast) -> None:
    task = NeedleTask(lengths=(200,))
    built = [task.build(tokenizer, HAYSTACK, 200, 0.5, s) for s in range(200)]
    used = np.concatenate([[i for i in b.input_ids if i >= 10_000] for b in built])
    # 200 draws of some 100 tokens among 4000 leave a twentieth of the text out with a chance of
    # exp(-200 * (0.05 + 0.025)) or so at either end.
    assert used.min() < 10_200 and used.max() >= 13_800
    few = HAYSTACK[:200]
    starts = {task.build(tokenizer, few, 200, 0.5, s).haystack_start for s in range(600)}
    rooms = {sum(i >= 10_000 for i in b.input_ids) for b in built}
    assert min(starts) == 0 and max(starts) in {200 - room for room in rooms}


def test_same_question_for_every_tokenizer(tokenizers: Tokenizers) -> None:
    task = NeedleTask(lengths=(200,))
    built = [task.build(t, HAYSTACK, 200, 0.3, 7) for t in tokenizers.values()]
    assert len({(example.city, example.number) for example in built}) == 1


def test_haystack_types_agree(tokenizer: PreTrainedTokenizerFast) -> None:
    task = NeedleTask(lengths=(200,))
    kinds = (HAYSTACK, HAYSTACK.tolist(), torch.from_numpy(HAYSTACK), HAYSTACK.astype(np.uint16))
    built = [task.build(tokenizer, haystack, 200, 0.3, 0) for haystack in kinds]
    assert all(example == built[0] for example in built)


@pytest.mark.parametrize("kind", ["split-digits", "merged-digits", "word-starts"])
def test_guesses_are_those_of_greedy_generation_up_to_the_first_wrong_token(
    model: LlamaForCausalLM, tokenizers: Tokenizers, kind: str
) -> None:
    """After the first wrong token they follow the right answer, which generate() does not know."""
    tokenizer = tokenizers[kind]
    haystack = np.random.default_rng(0).integers(2, 600, 1000)
    task = NeedleTask(lengths=(160,))
    for sample in range(2):
        example = task.build(tokenizer, haystack, 160, 0.5, sample)
        prompt = torch.tensor([example.prompt_ids])
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=example.answer_size,
            do_sample=False,
            pad_token_id=0,
        )[0, prompt.shape[1] :].tolist()
        (guess,) = guess_answers(model, [example])
        assert len(guess) == example.answer_size and guess[0] == written[0]
        assert (guess == example.answer_ids) == (written == list(example.answer_ids))

        hit = with_answer(example, written)
        misses = []
        for place in range(len(written)):
            other = list(written)
            other[place] = (other[place] + 1) % 600
            misses.append(with_answer(example, other))
        first, *rest = guess_answers(model, [hit, *misses])
        assert first == hit.answer_ids
        for place, (guess, miss) in enumerate(zip(rest, misses, strict=True)):
            assert guess != miss.answer_ids
            assert list(guess[: place + 1]) == written[: place + 1]


def with_answer(example: NeedleExample, answer: list[int]) -> NeedleExample:
    return dataclasses.replace(example, input_ids=(*example.prompt_ids, *answer))


# Not "across-words": there the needle's own tokens differ from the answer's.
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_model_that_copies_scores_one(tokenizers: Tokenizers, kind: str) -> None:
    task = NeedleTask(lengths=(160, 250), num_depths=10, samples=3)
    result = run_needle(CopyModel(), tokenizers[kind], HAYSTACK, task, batch_size=2)
    assert set(result.accuracy.values()) == {1.0}
    assert set(result.accuracy) == {(n, d) for n in (160, 250) for d in task.depths}
    assert not any(cell.misses for cell in result.cells)
    assert [row["misses"] for row in result.rows("hybrid")] == [[], []]
    for score in result.by_length():
        assert (score.accuracy, score.n) == (1.0, 30)
        assert (score.low, score.high) == wilson_interval(30, 30)


@pytest.mark.parametrize("spoil", range(6))
def test_one_wrong_digit_scores_zero(tokenizer: PreTrainedTokenizerFast, spoil: int) -> None:
    task = NeedleTask(lengths=(160,), num_depths=10, samples=1)
    wrong = CopyModel(spoil=-1)
    answer = task.build(tokenizer, HAYSTACK, 160, 0, 0).answer_size
    wrong.spoil = answer - 6 + spoil
    result = run_needle(wrong, tokenizer, HAYSTACK, task)
    assert set(result.accuracy.values()) == {0.0}
    (row,) = result.rows("hybrid")
    assert [miss["depth"] for miss in row["misses"]] == list(task.depths)
    for miss in row["misses"]:
        example = task.build(tokenizer, HAYSTACK, 160, miss["depth"], 0)
        # The spoilt model writes the token after the right one; the others are right.
        tokens = list(example.answer_ids)
        tokens[wrong.spoil] += 1
        assert (miss["sample"], miss["city"]) == (0, example.city)
        assert miss["expected"] == example.number
        assert miss["answer"] == tokenizer.decode(tokens) != f" {example.number}"
        assert miss["answer"].startswith(f" {example.number[:spoil]}")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_say_what_was_written_instead(
    tokenizers: Tokenizers, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Samples 0 and 2 of three get their number backwards, with the space before it."""
    tokenizer = tokenizers[kind]
    task = NeedleTask(lengths=(160,), num_depths=10, samples=3)
    built = {
        (depth, s): task.build(tokenizer, HAYSTACK, 160, depth, s)
        for depth in task.depths
        for s in range(3)
    }
    right = {built[depth, 1].input_ids for depth in task.depths}

    def guess(model: CopyModel, examples: list[NeedleExample]) -> list[tuple[int, ...]]:
        return [
            one.answer_ids if one.input_ids in right else backwards(tokenizer, one)
            for one in examples
        ]

    monkeypatch.setattr(asking, "guess_answers", guess)
    result = run_needle(CopyModel(), tokenizer, HAYSTACK, task, batch_size=2)
    (row,) = result.rows("hybrid")
    assert row["hits"] == [[0, 1, 0]] * 10
    assert row["misses"] == [
        {
            "depth": depth,
            "sample": s,
            "city": built[depth, s].city,
            "expected": built[depth, s].number,
            "answer": f" {built[depth, s].number[::-1]}",
        }
        for depth in task.depths
        for s in (0, 2)
    ]


def backwards(tokenizer: PreTrainedTokenizerFast, example: NeedleExample) -> tuple[int, ...]:
    """Give the tokens that follow the question when it is answered with its number backwards."""
    question = QUESTION.format(city=example.city)
    number = example.number[::-1]
    asked, answered = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in (question, f"{question} {number}")
    )
    if answered[: len(asked)] != asked:
        return tuple(tokenizer.encode(f" {number}", add_special_tokens=False))
    return tuple(answered[len(asked) :])


def test_batches_and_progress(tokenizer: PreTrainedTokenizerFast) -> None:
    task = NeedleTask(lengths=(200, 160), num_depths=10, samples=5)
    model = CopyModel()
    seen: list[tuple[int, int]] = []
    run_needle(
        model, tokenizer, HAYSTACK, task, batch_size=2, progress=lambda a, b: seen.append((a, b))
    )
    assert seen == [(i, 20) for i in range(1, 21)]
    assert model.calls == [(2, 160), (2, 160), (1, 160)] * 10 + [(2, 200), (2, 200), (1, 200)] * 10
    assert model.training
    answer = task.build(tokenizer, HAYSTACK, 160, 0, 0).answer_size
    assert model.kept == {answer + 1}  # what predicts the answer, and the answer's last token


@pytest.mark.parametrize("spoil", [None, 4])
def test_interrupted_run_goes_on(tokenizer: PreTrainedTokenizerFast, spoil: int | None) -> None:
    task = NeedleTask(lengths=(160,), num_depths=10, samples=2)
    whole = run_needle(CopyModel(spoil), tokenizer, HAYSTACK, task)
    assert {len(cell.misses) for cell in whole.cells} == {0 if spoil is None else 2}
    saved: list[NeedleCell] = []

    def save(cell: NeedleCell) -> None:
        saved.append(cell)
        if len(saved) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_needle(CopyModel(spoil), tokenizer, HAYSTACK, task, on_cell=save)
    written = NeedleResult(task, tuple(saved), len(HAYSTACK)).rows("hybrid")
    rows: Rows = json.loads(json.dumps(written))
    assert task.finished_cells(rows) == saved
    assert dataclasses.replace(task, seed=1).finished_cells(rows) == []
    assert dataclasses.replace(task, samples=3).finished_cells(rows) == []
    assert len(dataclasses.replace(task, num_depths=19).finished_cells(rows)) == 4
    rest = CopyModel(spoil)
    result = run_needle(rest, tokenizer, HAYSTACK, task, finished=task.finished_cells(rows))
    assert result == whole
    assert len(rest.calls) == (10 - 4) * 2


def test_rows_from_before_misses_were_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    task = NeedleTask(lengths=(160,), num_depths=10, samples=2)
    whole = run_needle(CopyModel(spoil=4), tokenizer, HAYSTACK, task)
    (row,) = NeedleResult(task, whole.cells[:3], len(HAYSTACK)).rows("hybrid")
    del row["misses"]
    old = [NeedleCell(160, depth, (False, False)) for depth in task.depths[:3]]
    assert task.finished_cells([row]) == old
    model = CopyModel(spoil=4)
    result = run_needle(model, tokenizer, HAYSTACK, task, finished=old)
    assert len(model.calls) == (10 - 3) * 2
    (row,) = result.rows("hybrid")
    assert row["hits"] == [[0, 0]] * 10
    # Those that were measured now have their text.
    assert [miss["depth"] for miss in row["misses"]] == [d for d in task.depths[3:] for _ in "ab"]


def test_rows_hold_cells_and_interval(tokenizer: PreTrainedTokenizerFast) -> None:
    task = NeedleTask(lengths=(160,), num_depths=10, samples=4, seed=3)
    miss = NeedleMiss(sample=3, city="Oslo", expected="482913", answer=" 482193")
    cells = tuple(NeedleCell(160, d, (True, d > 0.5, True, False), (miss,)) for d in task.depths)
    (row,) = NeedleResult(task, cells, 4000).rows("hybrid")
    assert row["case"] == "needle.hybrid" and row["unit"] == "accuracy" and row["n"] == 40
    assert row["value"] == 25 / 40
    assert row["interval"] == list(wilson_interval(25, 40))
    assert row["accuracy_by_depth"] == [0.5] * 5 + [0.75] * 5
    assert row["hits"] == [[1, 0, 1, 0]] * 5 + [[1, 1, 1, 0]] * 5
    assert row["misses"][2] == {
        "depth": task.depths[2],
        "sample": 3,
        "city": "Oslo",
        "expected": "482913",
        "answer": " 482193",
    }
    assert len(row["misses"]) == 10
    assert row["haystack_repeated"] is False and row["runtime"] == "transformers"


def test_short_haystack(tokenizer: PreTrainedTokenizerFast) -> None:
    task = NeedleTask(lengths=(160, 4096), num_depths=10, samples=1)
    model = CopyModel()
    with pytest.raises(UsageError, match=r"1,500 tokens.*4,096"):
        run_needle(model, tokenizer, HAYSTACK[:1500], task)
    assert not model.calls

    wrap = dataclasses.replace(task, lengths=(160, 400), wrap_haystack=True)
    result = run_needle(model, tokenizer, HAYSTACK[:200], wrap)
    assert [row["haystack_repeated"] for row in result.rows("full")] == [False, True]
    example = wrap.build(tokenizer, HAYSTACK[:200], 400, 0, 0)
    text = [i for i in example.input_ids if i >= 10_000]
    assert text == [10_000 + (example.haystack_start + i) % 200 for i in range(len(text))]
    with pytest.raises(UsageError, match="0 tokens"):
        wrap.build(tokenizer, [], 160, 0, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": ()}, r"\[\]"),
        ({"lengths": (0,)}, r"\[0\]"),
        ({"lengths": (512, 512)}, r"\[512, 512\]"),
        ({"num_depths": 9}, "not 9"),
        ({"samples": 0}, "not 0"),
    ],
)
def test_senseless_tasks_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        NeedleTask(**{"lengths": (512,), **change})


def test_length_too_small_for_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    task = NeedleTask(lengths=(30,))
    with pytest.raises(UsageError, match=r"length of 30 tokens cannot hold .* take (\d+)") as info:
        task.build(tokenizer, HAYSTACK, 30, 0, 0)
    needed = int(str(info.value).split("take ")[1].split(";")[0])
    assert needed > 30  # for this city and number; the same text fits exactly
    fixed = len(tokenizer.encode(NEEDLE.format(city="Rome", number="111111")))
    assert needed > fixed


def test_tokenizer_that_cannot_write_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    class Forgetful(PreTrainedTokenizerFast):
        def decode(self, *args: object, **kwargs: object) -> str:
            return super().decode(*args, **kwargs).replace(" ", "")

    lossy = Forgetful(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    with pytest.raises(UsageError, match="Forgetful cannot write"):
        NeedleTask(lengths=(200,)).build(lossy, HAYSTACK, 200, 0, 0)


def test_out_of_memory_is_a_sentence(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = model.register_forward_pre_hook(full)
    task = NeedleTask(lengths=(160,), num_depths=10, samples=2)
    haystack = np.arange(1000) % 600
    try:
        with pytest.raises(UsageError, match="2 x 160 tokens; use a smaller batch"):
            run_needle(model, tokenizer, haystack, task, batch_size=2)
    finally:
        hook.remove()
