"""Passes that begin ahead: what they bring is asked for, or overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from longgen.engine import Engine, SamplingParams
from longgen.engine.decode import DecodeBatch
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


def in_place(runner: Any) -> None:
    """Have all passes of one size leave their results in one place, as recorded ones do."""
    run = runner._run
    places: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def into_place(buffers: Any) -> None:
        run(buffers)
        found = buffers.logits, buffers.likeliest
        place = places.setdefault(buffers, tuple(x.clone() for x in found))
        buffers.logits, buffers.likeliest = (
            old.copy_(new) for old, new in zip(place, found, strict=True)
        )

    runner._run = into_place


@pytest.mark.parametrize(
    ("layers", "pattern", "given", "began"),
    [
        # All but the last, and those that are the last in their page.
        ("SFS", SINK, {}, 39 - 40 // 8),
        ("SFS", SINK, {"temperature": 0.5}, 0),
        # The engine has no room for more: it holds 61 tokens.
        ("SFS", SINK, {"max_tokens": 100}, 39 - 40 // 8),
        # There are no pages; there is nothing that strides move.
        ("SS", SINK, {}, 39),
        ("FF", STRIDED, {}, 39 - 40 // 8),
        ("SS", STRIDED, {}, 0),
    ],
)
def test_each_token_takes_one_pass(
    build: Make, tokens: Make, layers: str, pattern: Any, given: dict[str, Any], began: int
) -> None:
    model = build(pattern=pattern, layers=layers)
    fields: dict[str, Any] = {"max_tokens": 41, "seed": 1, "ignore_eos": True} | given
    longest = 61 if fields["max_tokens"] > 41 else 90
    plain, engine = (small_engine(model, max_length=longest) for _ in range(2))
    plain.decode_runner = None
    (expected,) = plain.generate([tokens(20).tolist()], SamplingParams(**fields))
    sizes = count_passes(engine)
    found = 0
    runner: Any = engine.decode_runner
    request = engine.requests[engine.add_request(tokens(20).tolist(), SamplingParams(**fields))]
    while engine.has_unfinished:
        engine.step()
        found += any(buffers._under_way for buffers in runner._buffers.values())
    assert request.output == expected.output and len(expected.output) == 41
    assert sizes == [1] * 40
    assert found == began


@pytest.mark.parametrize("change", ["another's", "grown", "none"])
def test_results_are_those_of_the_tables_that_are_given(
    build: Make, tokens: Make, change: str
) -> None:
    """The same token, length and slot, but pages of another request, or more of them."""
    model = build(pattern=SINK)
    engine = small_engine(model)
    runner: Any = engine.decode_runner
    sizes = count_passes(engine)
    for store in (*engine.cache.keys, *engine.cache.values):
        store.normal_(generator=torch.Generator().manual_seed(0))
    table = [4, 2, 7]
    _, (token,) = runner([5], [23], [0], [table], ahead=True)
    assert sizes == [1, 1]
    if change == "another's":
        table = [5, 1, 3]
    elif change == "grown":
        table.append(6)
    # The pass that this one begins is the first beyond the third page.
    logits, (follows,) = runner([token], [24], [0], [table], ahead=change == "grown")
    assert len(sizes) == {"another's": 3, "grown": 4, "none": 2}[change]
    if change == "grown":
        logits, _ = runner([follows], [25], [0], [table])
        token, length = follows, 25
    else:
        length = 24
    other = DecodeRunner(model, engine.cache, capture=False)
    assert torch.equal(other([token], [length], [0], [list(table)])[0], logits)


@pytest.mark.parametrize("at", range(4))
def test_tables_that_were_not_sent_are_sent_again(
    build: Make, tokens: Make, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """A step is broken off as its numbers go to the device; rows of no sequence count, too."""
    model = build(pattern=SINK)
    engine = small_engine(model, max_sequences=4)
    runner: Any = engine.decode_runner
    pages = [list(range(n, n + 3)) for n in (0, 3, 6, 9)]
    runner([5, 6, 7, 8], [20, 21, 22, 19], [0, 1, 2, 3], pages)
    (buffers,) = runner._buffers.values()
    three = [5, 6, 7], [21, 22, 23], [0, 1, 2], pages[:3]
    kept = [store.clone() for store in (*engine.cache.keys, *engine.cache.values)]
    real, calls = torch.Tensor.copy_, []

    def copy_(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.Tensor, "copy_", copy_)
        runner(*three)
    runner(*three)
    assert buffers.tables[0, :3].tolist() == pages[0]
    assert buffers.tables[3, 0] == engine.cache.spare_page
    assert buffers.lengths.tolist() == [22, 23, 24, 0]
    # Nobody wrote to the pages and the slot of the fourth.
    for store, before in zip((*engine.cache.keys, *engine.cache.values), kept, strict=True):
        if len(store) == engine.cache.slots.size:
            assert torch.equal(store[3, :-1], before[3, :-1])
        else:
            assert torch.equal(store[9:12], before[9:12])


def test_a_pass_that_failed_has_left_other_numbers(build: Make, tokens: Make) -> None:
    """It had put the next tokens behind the sequences, and is asked for once more."""
    model = build(pattern=SINK)
    engine = small_engine(model)
    runner: Any = engine.decode_runner
    run = runner._run

    def fail(buffers: Any) -> None:
        run(buffers)
        raise MemoryError

    step = [5, 6], [9, 12], [0, 1], [[0, 1], [2, 3]]
    expected, _ = runner(*step)
    runner._run = fail
    with pytest.raises(MemoryError):
        runner([1, 2], *step[1:])
    with pytest.raises(MemoryError):
        runner(*step)
    runner._run = run
    assert torch.equal(runner(*step)[0], expected)


def test_nothing_begins_ahead_of_who_waits(build: Make, tokens: Make) -> None:
    engine = small_engine(build(pattern=SINK), max_sequences=1)
    sizes = count_passes(engine)
    prompts = [tokens(n, seed=n).tolist() for n in (5, 9)]
    first = engine.add_request(prompts[0], SamplingParams(max_tokens=30))
    engine.step()
    second = engine.add_request(prompts[1], SamplingParams(max_tokens=30))
    buffers: Any = engine.decode_runner._buffers  # type: ignore[union-attr]
    while first in engine.requests:
        engine.step()
        assert not any(one._under_way for one in buffers.values())
    while second in engine.requests:
        engine.step()
    assert sizes == [1] * 58


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
        in_place(runner)
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


def test_passes_run_with_their_gpu_as_the_current_one(
    build: Make, tokens: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, decoding by transformers' layers, one token's own way: Triton looks at nothing
    else."""
    where: list[torch.device] = []
    found: list[list[torch.device]] = []

    @contextmanager
    def launching_on(device: torch.device) -> Iterator[None]:
        where.append(device)
        yield
        where.pop()

    for module in ("step", "runner"):
        monkeypatch.setattr(f"longgen.engine.{module}.launching_on", launching_on)
    for name in ("attend", "rotate_and_attend"):
        own = getattr(DecodeBatch, name)

        def noted(self: Any, *args: Any, own: Any = own) -> Any:
            found.append(list(where))
            return own(self, *args)

        monkeypatch.setattr(DecodeBatch, name, noted)
    engine = small_engine(build(pattern=SINK))
    engine.generate([tokens(20).tolist(), tokens(9).tolist()], SamplingParams(max_tokens=4))
    engine.generate([tokens(20).tolist()], SamplingParams(max_tokens=4))
    assert found and all(found) and not where
    assert {device for some in found for device in some} == {engine.cache.device}
