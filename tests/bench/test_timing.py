from itertools import pairwise

import pytest
import torch

from longgen.bench.timing import Budget, Clock, Limits, Spread, measure_ceiling

CPU = torch.device("cpu")


def test_few_times_give_their_range_and_many_their_deciles() -> None:
    few = Spread.of([3.0, 1.0, 2.0])
    assert (few.median, few.low, few.high, few.n, few.kind) == (2.0, 1.0, 3.0, 3, "range")
    many = Spread.of([float(i) for i in range(101)])
    assert (many.median, many.low, many.high) == (50.0, 10.0, 90.0)
    assert many.kind == "deciles"


def test_calls_are_numbered_and_as_many_as_asked_for() -> None:
    calls: list[int] = []
    times = Clock(CPU).times(calls.append, Limits(warmup_ms=0.0, repeat_ms=0.0, least=5))
    assert len(times) == 5 and all(time >= 0 for time in times)
    assert calls[0] == 0 and all(b == a + 1 for a, b in pairwise(calls))
    # One untimed call at least.
    assert len(calls) == 6


def test_a_round_is_a_share_of_the_budget() -> None:
    visit = Budget(warmup_ms=100, repeat_ms=300, least=7, rounds=3).visit
    assert (visit.warmup_ms, visit.repeat_ms, visit.least) == (100, 100, 3)


def test_inputs_are_turned_through_until_they_exceed_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Clock(CPU).copies(1) == 1

    class Card:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    clock = Clock(torch.device("cuda"))
    assert clock.copies(51 << 20) == 1
    for size in (50 << 20, 20 << 20, 1 << 20):
        # Between two uses of a set lie the others.
        assert (clock.copies(size) - 1) * size > 50 << 20


def test_ceiling_is_measured() -> None:
    budget = Budget(warmup_ms=0, repeat_ms=1, least=3, rounds=1)
    row = measure_ceiling(Clock(CPU), torch.float32, budget, matmul_size=64, copy_bytes=4096).row()
    assert row["matmul_size"] == 64 and int(str(row["n"])) >= 3
    assert float(str(row["matmul_tflops"])) > 0
    assert float(str(row["copy_terabytes_per_second"])) > 0
