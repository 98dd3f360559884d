"""What an engine is through: memory that runs out, steps that are broken off, numbers that are
none, requests that make no sense. The others never notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longgen.engine import Engine, SamplingParams
from longgen.engine import engine as engine_module
from longgen.engine.checks import check_kv_dtype
from longgen.engine.runner import DecodeRunner
from longgen.engine.sizes import PATIENCE, StepSizes
from longgen.errors import UsageError
from tests.engine.test_engine import expected_tokens, small_engine
from tests.hf.conftest import SINK

Tokens = Callable[..., torch.Tensor]
Run = Callable[..., torch.Tensor]


def ids(tokens: Tokens, *lengths: int) -> list[list[int]]:
    return [tokens(n, seed=n).clamp(max=89).tolist() for n in lengths]


def run_to_end(engine: Engine, steps: int = 500) -> dict[str, Any]:
    """Return the last output of every request."""
    ends = {}
    while engine.has_unfinished:
        steps -= 1
        assert steps, "no end"
        ends |= {out.id: out for out in engine.step() if out.finish_reason}
    assert engine.cache.pages.num_free == engine.cache.pages.size
    assert engine.cache.slots.num_free == engine.cache.slots.size
    return ends


def short_of_memory(most: list[int], log: list[int], real: Run) -> Run:
    """Return a `run` that has no memory for more than `most[0]` tokens, which it finds out late."""

    def run(model: Any, step: Any, tokens: Any, rows: Any) -> torch.Tensor:
        logits = real(model, step, tokens, rows)
        log.append(len(tokens))
        if len(tokens) > most[0]:
            raise torch.OutOfMemoryError("no memory for that")
        return logits

    return run


@pytest.mark.parametrize("most", [1, 13])
def test_what_fits_alone_gets_done_though_not_together(
    model: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Not two pieces of a prompt, or not even two single tokens, fit into one step."""
    engine = small_engine(model, page_size=1)
    monkeypatch.setattr(engine_module, "run", short_of_memory([most], [], engine_module.run))
    prompts = ids(tokens, 30, 9, 21, 5)
    expected = [expected_tokens(model, prompt, 6) for prompt in prompts]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    requests = [engine.requests[engine.add_request(prompt, params)] for prompt in prompts]
    run_to_end(engine)
    assert [request.output for request in requests] == expected


def test_steps_grow_again_when_there_is_memory(
    model: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine(model, page_size=2, prefill_chunk=32, max_batched_tokens=32)
    most, log = [9], []
    monkeypatch.setattr(engine_module, "run", short_of_memory(most, log, engine_module.run))
    params = SamplingParams(max_tokens=1)
    (prompt,) = ids(tokens, 120)
    engine.generate([prompt], params)
    sizes = engine.scheduler.sizes
    assert sizes.is_reduced and max(log[5:]) == 8
    most[0] = 1000
    log.clear()
    for _ in range(20):
        engine.generate([prompt], params)
    assert not sizes.is_reduced and max(log) == 32
    # Neither too early nor never.
    assert log.index(16) >= PATIENCE - 20 and log.index(32) - log.index(16) >= PATIENCE


def test_each_growth_that_came_too_early_doubles_the_wait() -> None:
    sizes, waits = StepSizes(64, 64, 4), []
    sizes.shrink([64])
    assert (sizes.max_batched_tokens, sizes.prefill_chunk) == (32, 32)
    for _ in range(4):
        steps = 0
        while sizes.prefill_chunk == 32:
            steps += 1
            sizes.note([3])  # says nothing
            sizes.note([32])
        waits.append(steps)
        assert not sizes.is_reduced
        sizes.shrink([64])
    assert waits == [PATIENCE, 2 * PATIENCE, 4 * PATIENCE, 8 * PATIENCE]
    sizes.restore()
    for _ in range(16 * PATIENCE):
        sizes.note([64])
    sizes.shrink([64])
    steps = 0
    while sizes.prefill_chunk == 32:
        steps += 1
        sizes.note([32])
    assert steps == PATIENCE, "calm times make it forget"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize("where", ["run", "sample"])
def test_memory_runs_out_in_other_words_and_places(
    model: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    engine = small_engine(model)
    place: Any = engine_module if where == "run" else engine.sampler
    real, calls = getattr(place, where), []

    def fails_sometimes(*args: Any) -> Any:
        calls.append(1)
        if len(calls) in (2, 4, 5, 13):
            raise error
        return real(*args)

    monkeypatch.setattr(place, where, fails_sometimes)
    prompts = ids(tokens, 30, 9, 21)
    expected = [expected_tokens(model, prompt, 9) for prompt in prompts]
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    requests = [engine.requests[engine.add_request(prompt, params)] for prompt in prompts]
    run_to_end(engine)
    assert len(calls) > 9 and [request.output for request in requests] == expected


@pytest.mark.parametrize("at", [1, 4, 7])
@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_is_broken_off_is_done_again(
    model: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, at: int, late: bool
) -> None:
    """In the midst of layers, or of telling what it brought."""
    engine = small_engine(model)
    place, name = (engine, "_put") if late else (engine_module, "run")
    real: Any = getattr(place, name)
    calls = []

    def interrupted(*args: Any) -> Any:
        result = real(*args) if late or len(calls) != at else None
        calls.append(1)
        if len(calls) == at + 1:
            if not late:
                real(*args)
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(place, name, interrupted)
    prompts = ids(tokens, 30, 9, 21)
    expected = [expected_tokens(model, prompt, 9) for prompt in prompts]
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    requests = [engine.requests[engine.add_request(prompt, params)] for prompt in prompts]
    told: dict[str, list[int]] = {request.id: [] for request in requests}
    interrupts = 0
    while engine.has_unfinished:
        try:
            for out in engine.step():
                told[out.id] += out.token_ids
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1 and len(calls) > at
    assert [request.output for request in requests] == expected
    assert list(told.values()) == expected


@pytest.mark.parametrize("fixed", [False, True])
def test_numbers_that_are_none_stay_with_their_request(
    model: Any, tokens: Tokens, fixed: bool
) -> None:
    """A token's damaged embedding: who comes after, into the same pages and slot, or runs beside
    it, is not harmed, whether it failed, was cancelled or lost its place."""
    embedding = model.model.embed_tokens.weight.data
    kept = embedding[90].clone()
    prompts = ids(tokens, 30, 9, 21, 3)
    expected = [expected_tokens(model, prompt, 9) for prompt in prompts]
    good, bad = SamplingParams(max_tokens=9, ignore_eos=True), [5, 90, *prompts[0]]
    try:
        embedding[90] = torch.nan
        engine = small_engine(model, max_sequences=2, prefill_chunk=8)
        if fixed:
            engine.decode_runner = DecodeRunner(model, engine.cache, capture=False)
        for _ in range(2):
            failed, *done = engine.generate([bad, *prompts], good)
            assert failed.finish_reason == "error" and "NaN" in str(failed.error)
            assert [request.output for request in done] == expected
            # Two are cancelled while they are read.
            names = [engine.add_request(bad, good) for _ in range(2)]
            engine.step()
            for name in names:
                engine.cancel(name)
            assert [r.output for r in engine.generate(prompts, good)] == expected
        # One loses its place.
        engine.add_request(bad, good)
        engine.step()
        engine.scheduler.recompute(engine.scheduler.running[0])
        assert [r.output for r in engine.generate(prompts, good)] == expected
        # A GPU's kernel reads what a mask hides, too: it has to be numbers.
        engine.add_request(bad, good)
        engine.generate([bad], good)
        run_to_end(engine)
        for kind, *stores in zip(
            engine.cache.plan.layers, engine.cache.keys, engine.cache.values, strict=True
        ):
            assert kind == "F" or all(store.isfinite().all() for store in stores)
    finally:
        embedding[90] = kept


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("ends", ["at it", "before it", "by cancelling", "by an interrupt"])
def test_numbers_that_become_none_are_cleared(
    build: Callable[..., Any], tokens: Tokens, fixed: bool, ends: str
) -> None:
    """A token is written whose embedding is damaged: read once, or in a pass that began ahead."""
    model = build(pattern=SINK)
    (prompt,) = ids(tokens, 20)
    text = expected_tokens(model, prompt, 30)
    place = next(i for i in range(5, 30) if text[i] not in [*prompt, *text[:i]])
    model.model.embed_tokens.weight.data[text[place]] = torch.nan
    engine = small_engine(model, max_sequences=2)
    if fixed:
        engine.decode_runner = DecodeRunner(model, engine.cache, capture=False)
    stop = (text[place],) if ends == "before it" else ()
    params = SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=stop)
    request = engine.requests[engine.add_request(prompt, params)]
    while len(request.output) <= place:
        engine.step()
    if ends == "by cancelling":
        engine.cancel(request.id)
    if ends == "by an interrupt":
        done, engine.sampler.explain = engine.sampler.explain, interrupt  # type: ignore
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.sampler.explain = done  # type: ignore
    else:
        run_to_end(engine)
        assert request.output == text[: place + 1]
        reasons = {"at it": "error", "before it": "stop", "by cancelling": "cancelled"}
        assert request.finish_reason == reasons[ends]
    cache = engine.cache
    for kind, *stores in zip(cache.plan.layers, cache.keys, cache.values, strict=True):
        assert kind == "F" or all(store.isfinite().all() for store in stores)


def interrupt(*_: Any) -> str:
    raise KeyboardInterrupt


def test_no_request_decides_how_others_are_kept_in_eight_bits(model: Any, tokens: Tokens) -> None:
    embedding = model.model.embed_tokens.weight.data
    kept = embedding[[90, 91]].clone()
    prompts = ids(tokens, 30, 9, 21)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    try:
        embedding[91] = torch.nan
        alone = [small_engine(model, kv_dtype="fp8").generate([p], params)[0] for p in prompts]
        # One is as short as can be, one has no numbers.
        for first in ([90], [91, 5]):
            engine = small_engine(model, kv_dtype="fp8")
            engine.generate([first], SamplingParams(max_tokens=1))
            done = engine.generate(prompts, params)
            assert [request.output for request in done] == [other.output for other in alone]
    finally:
        embedding[[90, 91]] = kept


def test_a_tokenizer_that_fails_costs_one_request_its_text(
    tiny_tokenizer: Any, build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(layers="SF", vocab_size=len(tiny_tokenizer))
    engine = small_engine(model, tokenizer=tiny_tokenizer)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    (alone,) = engine.generate(["hello"], params)
    name, other = engine.add_request("good day", params), engine.add_request("hello", params)
    request = engine.requests[other]

    def add(token: int) -> str:
        raise OverflowError("id out of range")

    engine.step()
    monkeypatch.setattr(engine.requests[name].detokenizer, "add", add)
    ends = run_to_end(engine)
    assert ends[name].finish_reason == "error" and "could not be turned" in ends[name].error
    assert "id out of range" in ends[name].error
    assert request.output == alone.output and request.text == alone.text


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ([5.0, 6.0], "The prompt is [5.0, 6.0]; give text, or token ids as whole numbers"),
        ([[5, 6]], "The prompt is [[5, 6]]; give text"),
        (None, "The prompt is None; give text"),
        (["a"], "The prompt is ['a']; give text"),
        (torch.ones(1, 3, dtype=torch.long), "The prompt is a tensor of shape (1, 3); give text"),
    ],
)
def test_prompts_that_are_none(model: Any, prompt: Any, part: str) -> None:
    engine = small_engine(model)
    with pytest.raises(UsageError) as error:
        engine.add_request(prompt)
    assert str(error.value).startswith(part)
    assert not engine.has_unfinished


def test_prompts_may_be_tensors_and_params_must_be_params(model: Any, tokens: Tokens) -> None:
    engine = small_engine(model)
    prompt = tokens(9, seed=1)
    params = SamplingParams(max_tokens=3)
    (request,) = engine.generate([prompt.numpy()], params)
    assert request.output == expected_tokens(model, prompt.tolist(), 3)
    (other,) = engine.generate([prompt], params)
    assert other.output == request.output
    bad: Any = {"max_tokens": 3}
    with pytest.raises(UsageError, match=r"params is \{'max_tokens': 3\}; give SamplingParams"):
        engine.add_request([5], bad)
    assert not engine.has_unfinished


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_follow_the_longest_are_refused(
    build: Callable[..., Any], kind: str
) -> None:
    """One request would turn another's keys."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        rope |= factors | {"original_max_position_embeddings": 128}
    model = build(rope_parameters=rope)
    with pytest.raises(UsageError, match=f"embedding is of type '{kind}', whose frequencies"):
        small_engine(model)


def test_a_pool_too_small_for_the_prompt_says_so(model: Any) -> None:
    engine = small_engine(model, num_pages=3, max_length=150)
    with pytest.raises(UsageError, match=r"21 tokens; the engine holds sequences of up to 21"):
        engine.add_request([5] * 21)
    (request,) = engine.generate([[5] * 20], SamplingParams(max_tokens=10, ignore_eos=True))
    assert len(request.output) == 1 and request.finish_reason == "length"


def test_gpus_without_eight_bits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, own = torch.device("cuda", 0), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UsageError, match=r"capability 8\.9\); NVIDIA A100 has 8\.0\. Leave fp8"):
        check_kv_dtype("fp8", own, gpu)
    assert check_kv_dtype(None, own, gpu) is own
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert check_kv_dtype("fp8", own, gpu) is torch.float8_e4m3fn
    assert check_kv_dtype("fp8", own, torch.device("cpu")) is torch.float8_e4m3fn
    with pytest.raises(UsageError, match="kv_dtype is 'int4'"):
        check_kv_dtype("int4", own, gpu)
