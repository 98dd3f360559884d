"""How long a call takes: warm-up and repetitions by time, CUDA events, medians and deciles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Calls that are in flight at a time: enough to keep a GPU busy, few enough to queue at once.
_BATCH = 32
_MOST_CALLS = 2000
_DECILES_FROM = 10
# Inputs are changed from call to call until this many times the L2 cache lies between two uses.
_TIMES_L2 = 2
_FILLER_SIZE = 4096
_LONGEST_HEAD_START_MS = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Say how long one visit lasts.

    Attributes:
        warmup_ms: time of untimed calls before the timed ones; one call at least.
        repeat_ms: time of the timed calls together.
        least: timed calls at least.
    """

    warmup_ms: float
    repeat_ms: float
    least: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Say how long to measure each provider.

    Attributes:
        warmup_ms: time of untimed calls before each visit's timed ones.
        repeat_ms: time of timed calls, over all rounds.
        least: timed calls at least, over all rounds.
        rounds: visits to every provider, in an order that turns by one each round.
    """

    warmup_ms: float = 100.0
    repeat_ms: float = 300.0
    least: int = 6
    rounds: int = 3

    @property
    def whole(self) -> Limits:
        """All rounds in one visit."""
        return Limits(warmup_ms=self.warmup_ms, repeat_ms=self.repeat_ms, least=self.least)

    @property
    def visit(self) -> Limits:
        """One round's share."""
        return Limits(
            warmup_ms=self.warmup_ms,
            repeat_ms=self.repeat_ms / self.rounds,
            least=-(-self.least // self.rounds),
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """Hold the median of some times, and where most of them lie.

    Attributes:
        median: in the unit of the times.
        low: the first decile, or the least of fewer than 10 times.
        high: the ninth decile, or the greatest.
        n: number of times.
    """

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """Summarise at least one time."""
        low, high = min(times), max(times)
        if len(times) >= _DECILES_FROM:
            deciles = statistics.quantiles(times, n=10, method="inclusive")
            low, high = deciles[0], deciles[-1]
        return cls(statistics.median(times), low, high, len(times))

    @property
    def kind(self) -> str:
        """What `low` and `high` are, in words."""
        return "deciles" if self.n >= _DECILES_FROM else "range"


class Clock:
    """Time calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._filler: torch.Tensor | None = None
        self._filler_ms = 0.0

    def copies(self, num_bytes: int) -> int:
        """Return how many sets of inputs to turn through, given the bytes of one.

        One set that is larger than the L2 cache pushes itself out of it; smaller ones would be
        found there by the next call, as they are not in a model.
        """
        if self.device.type != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return 1 if num_bytes > cache else 1 + math.ceil(_TIMES_L2 * cache / num_bytes)

    def times(self, call: Callable[[int], object], limits: Limits) -> list[float]:
        """Return the milliseconds of each timed call.

        Args:
            call: what to time; gets the number of the call, to choose its inputs by.
            limits: how long to warm up and to time.
        """
        number, each, host = self._warm_up(call, limits.warmup_ms)
        wanted = math.ceil(limits.repeat_ms / max(each, 1e-3))
        count = max(limits.least, min(_MOST_CALLS, wanted))
        if self.device.type != "cuda":
            return [self._on_host(call, number + i) for i in range(count)]
        times: list[float] = []
        while len(times) < count:
            batch = min(_BATCH, count - len(times))
            times += self._on_cuda(call, number + len(times), batch, each, host)
        return times

    def _warm_up(self, call: Callable[[int], object], warmup_ms: float) -> tuple[int, float, float]:
        """Return the number of calls made, and the last one's whole and host milliseconds."""
        number, begin, each, host = 0, time.perf_counter(), 0.0, 0.0
        while number == 0 or (time.perf_counter() - begin) * 1000 < warmup_ms:
            start = time.perf_counter()
            call(number)
            host = (time.perf_counter() - start) * 1000
            self.wait()
            each = (time.perf_counter() - start) * 1000
            number += 1
        return number, each, host

    def _on_host(self, call: Callable[[int], object], number: int) -> float:
        start = time.perf_counter()
        call(number)
        return (time.perf_counter() - start) * 1000

    def _on_cuda(
        self, call: Callable[[int], object], number: int, batch: int, each: float, host: float
    ) -> list[float]:
        with torch.cuda.device(self.device):
            events = [
                [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(batch)
            ]
            if host > 0.3 * each:
                # Where a call takes longer to launch than to run, the events would time Python.
                self._head_start(host * batch)
            for i, (start, end) in enumerate(events):
                start.record()
                call(number + i)
                end.record()
            self.wait()
            return [start.elapsed_time(end) for start, end in events]

    def _head_start(self, milliseconds: float) -> None:
        """Keep the GPU busy with matrix products while the calls to be timed are queued."""
        if self._filler is None:
            filler = torch.zeros(
                _FILLER_SIZE, _FILLER_SIZE, dtype=torch.float16, device=self.device
            )
            _, self._filler_ms, _ = self._warm_up(lambda _: filler @ filler, 20.0)
            self._filler = filler
        wanted = min(milliseconds, _LONGEST_HEAD_START_MS)
        for _ in range(math.ceil(wanted / self._filler_ms)):
            self._filler @ self._filler

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """Hold what the card itself reaches, measured in the same run.

    Attributes:
        matmul: FLOP/s of a square matrix product in the dtype of the run, median and spread.
        matmul_size: its side.
        copy: bytes read and written per second by a device copy, median and spread.
    """

    matmul: Spread
    matmul_size: int
    copy: Spread

    def row(self) -> dict[str, object]:
        """Give the figures for a results file, in TFLOP/s and TB/s."""
        return {
            "matmul_tflops": self.matmul.median / 1e12,
            "matmul_spread": [self.matmul.low / 1e12, self.matmul.high / 1e12],
            "matmul_size": self.matmul_size,
            "copy_terabytes_per_second": self.copy.median / 1e12,
            "copy_spread": [self.copy.low / 1e12, self.copy.high / 1e12],
            "n": self.matmul.n,
        }


def quick_ceiling(device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return how a quick run measures: `budget`, `matmul_size` and `copy_bytes` of its settings.

    Args:
        device: where.
        dtype: of the matrix product.
        rounds: of the budget.
    """
    if device.type != "cuda":
        return {
            "budget": Budget(warmup_ms=5.0, repeat_ms=20.0, least=2, rounds=rounds),
            "matmul_size": 512,
            "copy_bytes": 1 << 24,
        }
    free, _ = torch.cuda.mem_get_info(device)
    return {
        "budget": Budget(warmup_ms=50.0, repeat_ms=100.0, least=4, rounds=rounds),
        # fp32 has no tensor cores on most cards: the same product would take seconds.
        "matmul_size": 8192 if dtype.itemsize == 2 else 4096,
        "copy_bytes": min(1 << 30, free // 8),
    }


def measure_ceiling(
    clock: Clock, dtype: torch.dtype, budget: Budget, *, matmul_size: int, copy_bytes: int
) -> Ceiling:
    """Measure the rate of a square matrix product and of a copy."""
    matmul, copy = (
        Spread.of([amount / (ms / 1000) for ms in times])
        for amount, times in (
            _matmul(clock, dtype, budget.whole, matmul_size),
            _copy(clock, budget.whole, copy_bytes),
        )
    )
    return Ceiling(matmul=matmul, matmul_size=matmul_size, copy=copy)


def _matmul(
    clock: Clock, dtype: torch.dtype, limits: Limits, size: int
) -> tuple[float, list[float]]:
    """Return the FLOPs of a matrix product, and times."""
    generator = torch.Generator(clock.device).manual_seed(0)

    def draw() -> torch.Tensor:
        # Not zeros: those draw less power, so that the card runs at a higher clock.
        values = torch.randn(size, size, generator=generator, device=clock.device)
        return values.to(dtype)

    a, b = draw(), draw()
    return 2 * size**3, clock.times(lambda _: a @ b, limits)


def _copy(clock: Clock, limits: Limits, size: int) -> tuple[float, list[float]]:
    """Return the bytes that a copy reads and writes, and times."""
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size, clock.times(lambda _: target.copy_(source), limits)
