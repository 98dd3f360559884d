"""Whole requests: the tokens of `generate`, whatever else runs; and what goes wrong stays small."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from longgen.engine import Engine, SamplingParams
from longgen.engine import engine as engine_module
from longgen.engine.runner import DecodeRunner
from longgen.errors import UsageError
from longgen.pattern import SparsePattern

Tokens = Callable[..., torch.Tensor]


def expected_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    """Continue a prompt greedily in transformers."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def small_engine(model: Any, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {
        "max_length": 150,
        "max_sequences": 4,
        "page_size": 7,
        "max_batched_tokens": 40,
        "prefill_chunk": 16,
    }
    return Engine(model, **(defaults | settings))


@pytest.fixture(scope="session")
def requests(model: Any, tokens: Tokens) -> list[tuple[list[int], list[int]]]:
    """Prompts of mixed lengths and their continuations: some 500 tokens a pattern."""
    lengths = [(3, 60), (47, 40), (1, 70), (90, 45), (20, 50), (64, 60), (33, 80), (12, 90)]
    return [
        (prompt, expected_tokens(model, prompt, count))
        for seed, (length, count) in enumerate(lengths)
        for prompt in [tokens(length, seed=seed).tolist()]
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_sequences": 1},
        {"prefill_chunk": 1, "page_size": 1},
        {"prefill_chunk": 5, "max_batched_tokens": 9, "max_sequences": 8},
        # So few pages that sequences keep losing theirs.
        {"num_pages": 22, "max_sequences": 8},
    ],
    ids=["plain", "alone", "token by token", "small pieces", "few pages"],
)
def test_tokens_are_those_of_generate(
    model: Any, requests: list[tuple[list[int], list[int]]], settings: dict[str, Any]
) -> None:
    engine = small_engine(model, **settings)
    done = engine.generate(
        [prompt for prompt, _ in requests],
        [SamplingParams(max_tokens=len(new), ignore_eos=True) for _, new in requests],
    )
    for request, (prompt, new) in zip(done, requests, strict=True):
        assert request.prompt == prompt
        assert request.output == new
        assert request.finish_reason == "length"
    assert any(request.num_preempted for request in done) == ("num_pages" in settings)
    assert engine.cache.pages.num_free == engine.cache.pages.size
    assert engine.cache.slots.num_free == engine.cache.slots.size


def test_batches_of_fixed_shape_write_the_same(
    model: Any, requests: list[tuple[list[int], list[int]]]
) -> None:
    """What CUDA graphs record, run without recording: filled up to a few sizes, spare rows last."""
    engine = small_engine(model, num_pages=40, max_sequences=6)
    engine.decode_runner = DecodeRunner(model, engine.cache, capture=False)
    assert engine.decode_runner.sizes == (1, 2, 4, 6)
    done = engine.generate(
        [prompt for prompt, _ in requests],
        [SamplingParams(max_tokens=len(new), ignore_eos=True) for _, new in requests],
    )
    assert [request.output for request in done] == [new for _, new in requests]
    assert len(engine.decode_runner._buffers) > 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("settings", [{"prefill_chunk": 1}, {"max_batched_tokens": 2}])
def test_prompts_that_are_read_token_by_token(
    model: Any, requests: list[Any], settings: dict[str, int], temperature: float
) -> None:
    """A step of single tokens may still bring none."""
    outputs = []
    for fixed in (False, True):
        engine = small_engine(model, max_sequences=2, **settings)
        if fixed:
            engine.decode_runner = DecodeRunner(model, engine.cache, capture=False)
        done = engine.generate(
            [prompt[:9] for prompt, _ in requests[:4]],
            SamplingParams(max_tokens=6, ignore_eos=True, temperature=temperature, seed=1),
        )
        outputs.append([request.output for request in done])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(("stride", "total", "fixed"), [(2, 2000, False), (0, 700, True)])
def test_a_soak_of_random_requests_leaks_nothing(
    build: Callable[..., Any], tokens: Tokens, stride: int, total: int, fixed: bool
) -> None:
    """Thousands of requests that come, are cancelled and finish at random under too few pages: each
    that finishes has its own tokens, nothing waits for ever, and all pages come back."""
    model = build(
        pattern=SparsePattern(
            block_size=3,
            sink_blocks=1,
            local_blocks=2,
            stride_blocks=stride,
            head_shift=1 if stride else 0,
        ),
        layers="FS",
    )
    prompts = [tokens(length, seed=length).tolist() for length in range(1, 31)]
    continuations = [expected_tokens(model, prompt, 12) for prompt in prompts]
    engine = small_engine(
        model, max_length=60, num_pages=16, page_size=5, max_sequences=6, max_batched_tokens=64
    )
    if fixed:
        engine.decode_runner = DecodeRunner(model, engine.cache, capture=False)
    chance = random.Random(0)
    asked: dict[str, tuple[int, int]] = {}
    got: dict[str, list[int]] = {}
    since: dict[str, int] = {}
    reasons: dict[str, int] = {}
    num_preempted = steps = num_asked = 0
    while num_asked < total or engine.has_unfinished:
        steps += 1
        assert steps < 40_000
        while num_asked < total and len(asked) < 12 and chance.random() < 0.7:
            which, count = chance.randrange(len(prompts)), chance.randint(1, 12)
            name = engine.add_request(prompts[which], SamplingParams(max_tokens=count))
            asked[name], got[name], since[name] = (which, count), [], steps
            num_asked += 1
        if asked and chance.random() < 0.05:
            engine.cancel(chance.choice(list(asked)))
        num_preempted = max(
            [num_preempted, *(request.num_preempted for request in engine.requests.values())]
        )
        for out in engine.step():
            got[out.id] += out.token_ids
            if out.finish_reason is None:
                continue
            which, count = asked.pop(out.id)
            assert got[out.id] == continuations[which][: len(got[out.id])]
            if out.finish_reason == "length":
                assert len(got[out.id]) == count
            else:
                assert out.finish_reason == "cancelled"
            reasons[out.finish_reason] = reasons.get(out.finish_reason, 0) + 1
            assert steps - since[out.id] < 500, "it starved"
        held = {page for request in engine.requests.values() for page in request.block_table}
        assert len(held) + engine.cache.pages.num_free == engine.cache.pages.size
    assert not asked and sum(reasons.values()) == total
    assert reasons["cancelled"] > total // 40 and num_preempted > 0
    assert engine.cache.pages.num_free == 16 and engine.cache.slots.num_free == 6


def test_draws_do_not_depend_on_who_else_is_there(model: Any, tokens: Tokens) -> None:
    prompt = tokens(20, seed=1).tolist()
    params = SamplingParams(max_tokens=25, temperature=1.5, seed=7, top_k=40)
    (alone,) = small_engine(model).generate([prompt], params)
    others = [tokens(n, seed=n).tolist() for n in (5, 60, 33)]
    crowd = small_engine(model, num_pages=23, prefill_chunk=3).generate(
        [*others, prompt], [SamplingParams(max_tokens=40, temperature=1.0)] * 3 + [params]
    )
    assert crowd[-1].output == alone.output
    assert len(set(alone.output)) > 5


def test_streams_and_cancels(model: Any, tokens: Tokens) -> None:
    engine = small_engine(model)
    prompt = tokens(30, seed=3).tolist()
    new = expected_tokens(model, prompt, 10)
    outs = list(engine.stream(prompt, SamplingParams(max_tokens=10)))
    assert [token for out in outs for token in out.token_ids] == new
    assert [out.finish_reason for out in outs] == [None] * 9 + ["length"]
    stream = engine.stream(prompt, SamplingParams(max_tokens=50))
    next(stream)
    assert engine.cache.slots.num_free == 3
    stream.close()
    assert engine.cache.slots.num_free == 4 and not engine.requests
    assert engine.cache.pages.num_free == engine.cache.pages.size


def test_text_stops_where_it_should(tiny_tokenizer: Any, build: Callable[..., Any]) -> None:
    model = build(layers="SF", vocab_size=len(tiny_tokenizer))
    engine = small_engine(model, tokenizer=tiny_tokenizer)
    with pytest.raises(UsageError, match=r"character 1 is '\\udcff', a half of one"):
        engine.add_request("a\udcff")
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    (whole,) = engine.generate(["hello"], params)
    text = whole.text
    assert text == tiny_tokenizer.decode(whole.output, skip_special_tokens=True)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    outs = list(
        engine.stream("hello", SamplingParams(max_tokens=40, ignore_eos=True, stop=(stop,)))
    )
    assert "".join(out.text for out in outs) == text[: text.index(stop)]
    assert outs[-1].finish_reason == "stop"
    # A stop string at the very end, which one more character could have made a longer one.
    (last,) = engine.generate(
        ["hello"],
        SamplingParams(
            max_tokens=40, ignore_eos=True, stop=(text[-2:] + "?" + text[-1], text[-1:])
        ),
    )
    assert last.text == text[: text.index(text[-1])] and last.finish_reason == "stop"
    third = whole.output[2]
    (short,) = engine.generate(["hello"], SamplingParams(max_tokens=40, stop_token_ids=(third,)))
    assert short.output == whole.output[: whole.output.index(third) + 1]
    assert short.finish_reason == "stop"


def test_a_sequence_ends_where_the_engine_does(model: Any, tokens: Tokens) -> None:
    engine = small_engine(model, max_length=40)
    (request,) = engine.generate([tokens(35, seed=1).tolist()], SamplingParams(max_tokens=100))
    assert (len(request.output), request.finish_reason) == (5, "length")


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "The prompt is empty; give at least one token."),
        ([5, 97], "The prompt has the token 97; the model knows 0 to 96."),
        ([-1], "The prompt has the token -1; the model knows 0 to 96."),
        ("text", "The engine has no tokenizer; give token ids instead of text."),
        (
            [5] * 150,
            "The prompt has 150 tokens; the engine holds sequences of up to 150 and needs room for "
            "at least one more. Shorten it, or raise max_length or num_pages.",
        ),
    ],
)
def test_prompts_that_cannot_be(model: Any, prompt: Any, sentence: str) -> None:
    engine = small_engine(model)
    with pytest.raises(UsageError) as error:
        engine.add_request(prompt)
    assert str(error.value) == sentence
    assert not engine.has_unfinished
    # The others of the same call are not left behind.
    with pytest.raises(UsageError):
        engine.generate([[5, 6], prompt])
    assert not engine.requests and engine.cache.slots.num_free == 4


def test_settings_that_cannot_be(model: Any) -> None:
    for settings, part in (
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 10_000}, "max_length is 10000 tokens, the model was made for 512"),
        ({"page_size": -3}, "page_size is -3"),
        ({"max_batched_tokens": 3}, "too few for a token of each of 4 sequences"),
        ({"max_length": 1.5}, "max_length is 1.5; give a whole number"),
        ({"num_pages": "12"}, "num_pages is '12'; give a whole number"),
        ({"max_sequences": None}, "max_sequences is None; give a whole number"),
        ({"prefill_chunk": True}, "prefill_chunk is True; give a whole number"),
    ):
        with pytest.raises(UsageError, match=part):
            small_engine(model, **settings)
    with pytest.raises(UsageError, match="hybrids"):
        Engine(torch.nn.Linear(1, 1))
    engine = small_engine(model)
    engine.add_request([5], request_id="a")
    with pytest.raises(UsageError, match="There is a request 'a' already"):
        engine.add_request([5], request_id="a")
    with pytest.raises(UsageError, match="no tokenizer to find text with"):
        engine.add_request([5], SamplingParams(stop=("x",)))
    with pytest.raises(UsageError, match="prompts is one text; give a list"):
        engine.generate("two")
    with pytest.raises(UsageError, match="There are 2 prompts but 1 params"):
        engine.generate([[5], [6]], [SamplingParams()])


def test_running_out_of_memory_harms_one_request_at_most(
    model: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a prompt that don't fit are made smaller; a request that never fits fails alone."""
    engine = small_engine(model, prefill_chunk=32)
    real, most = engine_module.run, [12]

    def run(model: Any, step: Any, tokens: Any, rows: Any) -> torch.Tensor:
        if any(span.length > most[0] for span in step.spans) or 96 in tokens:
            # Some layers have stored their tokens before the memory ran out.
            real(model, step, tokens, rows)
            raise torch.OutOfMemoryError("no memory for that")
        return real(model, step, tokens, rows)

    monkeypatch.setattr(engine_module, "run", run)
    prompts = [tokens(n, seed=n).clamp(max=95).tolist() for n in (50, 9, 40)]
    expected = [expected_tokens(model, prompt, 3) for prompt in prompts]
    cursed = [5, 96, 5]
    names = [
        engine.add_request(prompt, SamplingParams(max_tokens=3))
        for prompt in (prompts[0], cursed, *prompts[1:])
    ]
    got: dict[str, list[int]] = {name: [] for name in names}
    ends = {}
    for _ in range(200):
        for out in engine.step():
            got[out.id] += out.token_ids
            if out.finish_reason:
                ends[out.id] = out
        if not engine.has_unfinished:
            break
    assert ends[names[1]].finish_reason == "error"
    assert "Not enough memory" in str(ends[names[1]].error)
    for name, new in zip((names[0], *names[2:]), expected, strict=True):
        assert ends[name].finish_reason == "length"
        if 96 not in new:
            assert got[name] == new
    assert engine.cache.pages.num_free == engine.cache.pages.size


def test_broken_logits_fail_their_own_request(
    model: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(model)
    real = engine_module.run

    def run(model: Any, step: Any, tokens: Any, rows: Any) -> torch.Tensor:
        logits = real(model, step, tokens, rows).clone()
        for index, row in enumerate(rows):
            if tokens[row] == 90:
                logits[index, 3] = float("nan")
        return logits

    monkeypatch.setattr(engine_module, "run", run)
    good = tokens(10, seed=2).clamp(max=80).tolist()
    bad, fine = engine.generate([[5, 90], good], SamplingParams(max_tokens=1))
    assert (bad.finish_reason, fine.finish_reason) == ("error", "length")
    assert "NaN" in str(bad.error)
    assert fine.output == expected_tokens(model, good, 1)


def test_names_that_were_given_are_not_made_up(model: Any) -> None:
    engine = small_engine(model)
    assert engine.add_request([5], request_id="1") == "1"
    assert [engine.add_request([5]) for _ in range(3)] == ["0", "2", "3"]
