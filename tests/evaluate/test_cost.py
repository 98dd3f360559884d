from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from longgen.engine import engine as engine_module
from longgen.errors import UsageError
from longgen.evaluate import cost
from longgen.evaluate.cost import Cost, measure_cost
from longgen.hf import CACHE_NAME

BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, float32


@contextmanager
def watched(model: LlamaForCausalLM, limit: int = 10**9, text: str = "") -> Iterator[list[int]]:
    """List the tokens of every forward pass; fail once keys would exceed `limit`."""
    sizes: list[int] = []

    def watch(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        cache, new = kwargs[CACHE_NAME], kwargs["input_ids"].shape[1]
        assert not module.training
        if new + (cache.get_seq_length() if cache else 0) > limit:
            raise RuntimeError(text) if text else torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(new)

    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


def test_measures_every_length(model: LlamaForCausalLM) -> None:
    done: list[tuple[int, int]] = []
    with watched(model) as sizes:
        costs = measure_cost(
            model,
            [50, 20],
            decode_steps=4,
            repeats=2,
            warmup=1,
            prefill_chunk=16,
            progress=lambda a, b: done.append((a, b)),
        )
    decode = [1] * (cost.WARMUP_STEPS + 4)
    assert sizes == [16, 4] * 3 + decode + [16, 16, 16, 2] * 3 + decode
    assert done == [(1, 2), (2, 2)]
    for found, length in zip(costs, (20, 50), strict=True):
        assert found.length == length and found.error is None
        assert found.kv_bytes == length * BYTES_PER_TOKEN
        assert len(found.prefill_seconds) == 2 and len(found.decode_ms) == 4
        assert min(found.prefill_seconds) > 0 and min(found.decode_ms) > 0


def test_times_are_what_the_clock_says(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    (found,) = measure_cost(model, [8], decode_steps=2, repeats=3)
    assert found.prefill_seconds == (1, 1, 1) and found.decode_ms == (1000, 1000)


def test_a_hybrid_is_measured_in_the_engine(hybrid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beyond its context of 192 tokens."""
    real, sizes = engine_module.run, []

    def run(model: Any, step: Any, tokens: Any, rows: Any) -> torch.Tensor:
        assert not model.training
        sizes.append(len(tokens))
        return real(model, step, tokens, rows)

    monkeypatch.setattr(engine_module, "run", run)
    hybrid.train()
    try:
        costs = measure_cost(
            hybrid, [300, 20], decode_steps=4, repeats=2, warmup=1, prefill_chunk=128
        )
        assert hybrid.training
    finally:
        hybrid.eval()
    decode = [1] * (cost.WARMUP_STEPS + 4)
    assert sizes == [20] * 3 + decode + [128, 128, 44] * 3 + decode
    token = BYTES_PER_TOKEN // 2  # of one layer
    # A page is 128 tokens, and a slot at most 16 + 32, less where no sequence grows so long, and an
    # entry that is to spare.
    assert [found.kv_bytes for found in costs] == [token * (128 + 29), token * (3 * 128 + 49)]
    for found in costs:
        assert found.error is None and found.runtime == "longgen.engine"
        assert len(found.prefill_seconds) == 2 and len(found.decode_ms) == 4
        assert {row["runtime"] for row in found.rows("hybrid")} == {"longgen.engine"}


def test_a_hybrid_out_of_memory_is_a_row(hybrid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine_module.run

    def run(model: Any, step: Any, tokens: Any, rows: Any) -> torch.Tensor:
        if len(tokens) > 140:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, step, tokens, rows)

    monkeypatch.setattr(engine_module, "run", run)
    costs = measure_cost(hybrid, [140, 200, 300], decode_steps=1, repeats=1)
    assert costs[0].error is None
    # The engine would go on in smaller pieces.
    assert costs[1].error == "Out of memory at 200 tokens on cpu."
    assert costs[2].error == "Skipped: 200 tokens did not fit, so greater lengths were not tried."
    assert {found.runtime for found in costs} == {"longgen.engine"}


@pytest.mark.parametrize(
    "text", ["", "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"]
)
def test_out_of_memory_is_a_row(model: LlamaForCausalLM, text: str) -> None:
    with watched(model, limit=40, text=text):
        costs = measure_cost(model, [16, 64, 128], decode_steps=1, repeats=1)
    assert costs[0].error is None
    assert costs[1].error == "Out of memory at 64 tokens on cpu."
    assert costs[2].error == "Skipped: 64 tokens did not fit, so greater lengths were not tried."
    for row in costs[2].rows("full"):
        assert row["value"] is None and row["error"] == costs[2].error


def test_other_errors_pass(model: LlamaForCausalLM) -> None:
    with (
        watched(model, limit=10, text="shapes differ"),
        pytest.raises(RuntimeError, match="shapes"),
    ):
        measure_cost(model, [16])


def test_rows_give_median_and_range() -> None:
    found = Cost(
        length=4096,
        prefill_chunk=1024,
        kv_bytes=77,
        prefill_seconds=(3.0, 1.0, 2.0),
        decode_ms=(4.0, 9.0, 5.0, 4.0),
    )
    kv, prefill, decode = found.rows("hybrid")
    assert (kv["case"], kv["value"], kv["unit"]) == ("kv_bytes.hybrid", 77, "bytes")
    assert (prefill["case"], prefill["value"], prefill["unit"]) == ("prefill.hybrid", 2.0, "s")
    assert (decode["case"], decode["value"]) == ("decode.hybrid", 4.5)
    assert decode["spread"] == [4.0, 9.0] and decode["n"] == 4 and decode["batch"] == 1
    assert {row["length"] for row in (kv, prefill, decode)} == {4096}


@pytest.mark.parametrize(
    "wrong",
    [
        {"lengths": [0, 5]},
        {"lengths": []},
        {"repeats": 0},
        {"decode_steps": 0},
        {"prefill_chunk": 0},
    ],
)
def test_senseless_counts(model: LlamaForCausalLM, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="at least 1, not 0"):
        measure_cost(model, **{"lengths": [8], **wrong})
