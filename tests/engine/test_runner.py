"""Passes that begin ahead: what they bring is asked for, or overwritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longgen.engine import Engine, SamplingParams
from longgen.engine.runner import DecodeRunner
from tests.hf.conftest import SINK, STRIDED

Make = Callable[..., Any]


def small_engine(model: Any, **settings: Any) -> Engine:
    fields = {"max_length": 90, "max_sequences": 3, "page_size": 8}
    engine = Engine(model, **(fields | settings))
    engine.decode_runner = DecodeRunner(model, engine.cache, capture=False)
    return engine


def count_passes(engine: Engine) -> list[int]:
    """Have the sizes of passes noted."""
    runner: Any = engine.decode_runner
    sizes: list[int] = []
    run = runner._run

    def counted(buffers: Any) -> None:
        sizes.append(buffers.size)
        run(buffers)

    runner._run = counted
    return sizes


@pytest.mark.parametrize(("given", "ahead"), [({}, True), ({"temperature": 0.5}, False)])
def test_each_token_takes_one_pass(
    build: Make, tokens: Make, given: dict[str, Any], ahead: bool
) -> None:
    engine = small_engine(build(pattern=SINK))
    sizes = count_passes(engine)
    began = 0
    runner: Any = engine.decode_runner
    name = engine.add_request(tokens(20).tolist(), SamplingParams(max_tokens=41, seed=1, **given))
    while engine.has_unfinished:
        engine.step()
        began += any(buffers._under_way for buffers in runner._buffers.values())
    assert name not in engine.requests
    assert sizes == [1] * 40
    # All but the last, and those that are the last in their page.
    assert began == (39 - 40 // 8 if ahead else 0)


def test_strides_are_never_written_twice(build: Make, tokens: Make) -> None:
    engine = small_engine(build(pattern=STRIDED))
    runner: Any = engine.decode_runner
    engine.add_request(tokens(20).tolist(), SamplingParams(max_tokens=40))
    while engine.has_unfinished:
        engine.step()
        assert not any(buffers._under_way for buffers in runner._buffers.values())


def test_what_is_not_asked_for_does_no_harm(build: Make, tokens: Make) -> None:
    """Other tokens than the likeliest, fewer sequences, more of them, other slots and pages."""
    model = build(pattern=SINK)
    prompts = [tokens(n, seed=n).tolist() for n in (20, 31, 9)]
    texts = [tokens(12, seed=n).tolist() for n in range(3)]
    results = []
    for ahead in (False, True):
        engine = small_engine(model)
        runner: Any = engine.decode_runner
        slots, tables = [], []
        for prompt in prompts:
            name = engine.add_request(prompt, SamplingParams(max_tokens=60))
            engine.step()
            request = engine.requests[name]
            slots.append(request.slot)
            request.block_table += engine.cache.pages.take(11 - len(request.block_table))
            tables.append(request.block_table)
        # Whatever these steps wrote is written over.
        lengths = [len(prompt) for prompt in prompts]
        logits = []
        for step in range(12):
            rows = ((0, 1, 2), (0, 1, 2), (0,), (0,), (2,), (1, 2), (2, 1))[step % 7]
            for row in rows:
                lengths[row] += 1
            found, likeliest = runner(
                [texts[row][step] for row in rows],
                [lengths[row] for row in rows],
                [slots[row] for row in rows],
                [tables[row] for row in rows],
                ahead=ahead,
            )
            assert likeliest == found.argmax(-1).tolist()
            logits.append(found.clone())
        results.append(logits)
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)


def test_a_stop_token_and_a_cancellation_end_what_began_ahead(build: Make, tokens: Make) -> None:
    """Requests that follow in the same slot and pages write what they write alone."""
    model = build(pattern=SINK)
    prompts = [tokens(n, seed=n).tolist() for n in (20, 31, 27)]

    def alone(prompt: list[int], **fields: Any) -> list[int]:
        engine = small_engine(model, max_sequences=1)
        engine.decode_runner = None
        (done,) = engine.generate([prompt], SamplingParams(max_tokens=40, **fields))
        return done.output

    whole = [alone(prompt) for prompt in prompts]
    engine = small_engine(model, max_sequences=1, num_pages=10)
    stop = whole[0][10]
    (first,) = engine.generate([prompts[0]], SamplingParams(max_tokens=40, stop_token_ids=(stop,)))
    assert first.output == whole[0][: whole[0].index(stop) + 1]
    name = engine.add_request(prompts[1], SamplingParams(max_tokens=40))
    for _ in range(7):
        engine.step()
    engine.cancel(name)
    (last,) = engine.generate([prompts[2]], SamplingParams(max_tokens=40))
    assert last.output == whole[2]
    assert engine.cache.pages.num_free == engine.cache.pages.size
