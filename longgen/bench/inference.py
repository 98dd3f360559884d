"""`longgen bench inference`: a hybrid, the same model all full, and transformers, from one set of
weights.

Lengths go from short to long; at each, one variant after the other reads a prompt and writes
tokens, and gives back all memory but the weights, which all of them share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from longgen.accounting import decode_bytes, forward_flops, full_plan, kv_bytes
from longgen.bench.failures import check_device, reason
from longgen.bench.inference_settings import MOST, MOST_SEQUENCES, VARIANTS, InferenceSettings
from longgen.bench.memory import allocated_bytes, peak_bytes, restart_peak
from longgen.bench.models import parameter_bytes, planned_config, stock_config, variant_of
from longgen.bench.tasks import (
    Decode,
    EngineDecode,
    Prefill,
    StockDecode,
    StockPrefill,
    random_tokens,
)
from longgen.bench.timing import Ceiling, Clock, Spread, measure_ceiling
from longgen.errors import UsageError
from longgen.evaluate.cost import WARMUP_STEPS, timed
from longgen.evaluate.reading import EnginePrefill, Held
from longgen.evaluate.results import say_bytes, say_tokens
from longgen.memory import clear, free_bytes
from longgen.plan import LayerPlan

ResultRow = dict[str, Any]
# A first reading that takes this many times as long as all timed ones may is the last.
_LONGEST_WARMUP = 4


class InferenceBench:
    """Measure inference as `settings` say.

    Attributes:
        rows: results rows so far.
        skipped: what was not measured, and why: variant, length (None: all), reason.
        ceiling: what the device reaches by itself; None before it was measured.
        weight_bytes: of the weights, which are there once.
    """

    def __init__(
        self,
        settings: InferenceSettings,
        model: Callable[[], Any],
        *,
        on_row: Callable[[ResultRow], None] = lambda row: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Prepare; nothing is loaded yet.

        Args:
            settings: what to measure.
            model: returns the weights: any variant of the model, on its device.
            on_row: called with every row.
            say: prints a line of progress.
        """
        self.settings, self._load, self.on_row, self.say = settings, model, on_row, say
        self.clock = Clock(settings.device)
        self.rows: list[ResultRow] = []
        self.skipped: list[ResultRow] = []
        self.ceiling: Ceiling | None = None
        self.weight_bytes = 0
        self._models: dict[str, Any] = {}
        self._begin = time.monotonic()

    def run(self) -> list[ResultRow]:
        """Measure everything and return the rows; what was measured before an interrupt is kept.

        Raises:
            UsageError: nothing fits the memory, or something broke the GPU for all that follows.
        """
        if self.settings.device.type != "cuda":
            return self._run()
        # Kernels of Triton and CuTe are launched on the current device.
        with torch.cuda.device(self.settings.device):
            return self._run()

    def _run(self) -> list[ResultRow]:
        settings = self.settings
        self._check_memory()
        self.ceiling = measure_ceiling(
            self.clock,
            settings.torch_dtype,
            settings.budget,
            matmul_size=settings.matmul_size,
            copy_bytes=settings.copy_bytes,
        )
        clear(settings.device)
        model = self._load()
        self.weight_bytes = parameter_bytes(model)
        for name in settings.variants:
            if VARIANTS[name].is_stock:
                self._models[name] = variant_of(model, stock_config(model.config), "sdpa")
            else:
                config = planned_config(model.config, self._plan(name))
                self._models[name] = variant_of(model, config)
        del model
        clear(settings.device)
        self.say(
            f"weights {say_bytes(self.weight_bytes)}, there once; "
            f"{say_bytes(self._free())} of memory are free beside them"
        )
        for length in sorted(settings.lengths):
            for name in settings.variants:
                if self._has_turn(name, length):
                    self._measure(name, length)
        return self.rows

    def timing(self) -> ResultRow:
        """Return how times were taken, for a results file."""
        settings = self.settings
        return {
            "prefill_repeats": settings.repeats,
            "prefill_seconds_at_most": settings.seconds_each,
            "decode_tokens": settings.decode_tokens,
            "decode_warmup_tokens": WARMUP_STEPS,
            "order": "by length; variants one after the other in the order given",
        }

    def _plan(self, name: str) -> LayerPlan:
        settings = self.settings
        return settings.plan if VARIANTS[name].is_sparse else full_plan(settings.shape)

    def _free(self) -> int:
        return free_bytes(self.settings.device)

    def _kv_bytes(self, name: str, length: int, batch: int = 1) -> int:
        """Return the bytes of keys and values by the formula."""
        size = 1 if VARIANTS[name].kv_dtype == "fp8" else self.settings.torch_dtype.itemsize
        return kv_bytes(self.settings.shape, self._plan(name), length, batch, size)

    def _check_memory(self) -> None:
        """Refuse a run of which nothing can fit."""
        settings = self.settings
        free = self._free()
        weights = settings.resident_shape.num_parameters * settings.torch_dtype.itemsize
        cache, length, name = min(
            (self._kv_bytes(name, length), length, name)
            for name in settings.variants
            for length in settings.lengths
        )
        if weights + cache > free:
            raise UsageError(
                f"{settings.name} does not fit: its weights take {say_bytes(weights)} in "
                f"{settings.dtype} and the keys and values of {length:,} tokens "
                f"{say_bytes(cache)} ({name}), but {say_bytes(free)} of memory are free on "
                f"{settings.device}. Give a smaller model, shorter --lengths, a larger card, or "
                "--resident-layers with --shape."
            )

    def _has_turn(self, name: str, length: int) -> bool:
        settings, why = self.settings, None
        if settings.seconds is not None and time.monotonic() - self._begin > settings.seconds:
            why = f"{settings.seconds:.0f} seconds were over before its turn."
        elif VARIANTS[name].is_sparse and settings.plan.pattern.covers(length):
            why = f"At {length:,} tokens the pattern hides nothing: it is full there."
        if why:
            self._skip(name, length, why)
        return why is None

    def _skip(self, name: str, length: int, why: str) -> None:
        self.skipped.append({"variant": name, "length": length, "reason": why})
        self.say(f"{name} {say_tokens(length)}: {why}")

    def _attempt(self, what: str, length: int, action: Callable[[], object]) -> str | None:
        """Do something; return why it failed, None if it didn't, after clearing up."""
        error: str | None = None
        try:
            action()
        except Exception as failure:
            # Whatever a kernel, a compiler or transformers throws: the others go on.
            error = reason(failure, f"at {length:,} tokens")
        clear(self.settings.device)
        if error:
            check_device(
                self.clock,
                f"{what} left the GPU unusable at {length:,} tokens: {error}",
                "Leave it out with --variants; the results so far are kept.",
            )
        return error

    def _measure(self, name: str, length: int) -> None:
        """Give all rows of one variant at one length."""
        needed, free = self._kv_bytes(name, length), self._free()
        if needed > free:
            why = (
                f"The keys and values of {length:,} tokens take {say_bytes(needed)}; "
                f"{say_bytes(free)} are free."
            )
            for case, unit in (("prefill", "s"), ("kv_bytes", "bytes"), ("decode", "ms per token")):
                self._add(case, unit, name, length, {"batch": 1}, error=why)
            return
        held, work = self._prefill(name, length)
        fits = self._kv_row(name, length, held, work, free)
        for batch in self._batches(fits):
            self._decode(name, length, batch, fits)

    def _prefill(self, name: str, length: int) -> tuple[Held | None, int | None]:
        """Read a prompt in pieces and at once; return what it holds and the peak memory of the
        first way that worked, in bytes beyond weights, keys and values."""
        settings = self.settings
        stock = VARIANTS[name].is_stock
        chunks = [length] if stock else sorted({min(settings.prefill_chunk, length), length})
        found: list[tuple[Held, int | None]] = []
        seconds: dict[int, float] = {}
        for chunk in chunks:
            times: list[float] = []
            peaks: list[int] = []

            def measure(
                chunk: int = chunk, times: list[float] = times, peaks: list[int] = peaks
            ) -> None:
                resident = allocated_bytes(settings.device)
                task = self._prefill_task(name, length)
                times += self._read(task, chunk)
                held = task.held()
                peak = peak_bytes(settings.device)
                if peak is not None and resident is not None:
                    peaks.append(peak - resident - held.allocated)
                found.append((held, peaks[0] if peaks else None))

            if seconds and (least := min(seconds.values())) > settings.seconds_each:
                # Not to take as long again for what can only be a little faster.
                self._skip(name, length, f"At once not tried: in pieces it took {least:.0f} s.")
                continue
            error = self._attempt(f"prefill.{name}", length, measure)
            flops = forward_flops(settings.shape, self._plan(name), length, prefill_logits=True)
            extra: ResultRow = {"batch": 1, "prefill_chunk": chunk, "flops": flops}
            if not error:
                seconds[chunk] = Spread.of(times).median
                extra["peak_bytes"] = peaks[0] if peaks else None
                if chunk != chunks[0] and chunks[0] in seconds:
                    extra["chunked_over_one_piece"] = seconds[chunks[0]] / seconds[chunk]
            assert self.ceiling is not None
            ceiling = flops / self.ceiling.matmul.median
            self._add("prefill", "s", name, length, extra, times, ceiling, error)
        return found[0] if found else (None, None)

    def _prefill_task(self, name: str, length: int) -> Prefill:
        model = self._models[name]
        prompt = random_tokens(model, length, self.settings.seed)
        if VARIANTS[name].is_stock:
            return StockPrefill(model, prompt)
        return EnginePrefill(model, prompt, self.settings.room, VARIANTS[name].kv_dtype)

    def _read(self, task: Prefill, chunk: int) -> list[float]:
        """Return the seconds of each timed prefill; memory's peak is that of these."""
        settings = self.settings

        def once() -> float:
            task.prepare(chunk)
            restart_peak(settings.device)
            return timed(settings.device, task.read)[1]

        # Kernels may be compiled in the first, however short the prompt is: it is no result unless
        # there is no time for another.
        first = once()
        if first > _LONGEST_WARMUP * settings.seconds_each:
            self.say(
                f"The next figure is of a first reading, of {first:.0f} s: too slow to repeat."
            )
            return [first]
        times = [once()]
        if times[0] * settings.repeats <= settings.seconds_each:
            times += [once() for _ in range(settings.repeats - 1)]
        return times

    def _kv_row(
        self, name: str, length: int, held: Held | None, work: int | None, free: int
    ) -> int | None:
        """Give the row of the bytes held; return how many sequences fit, None if not known.

        What fits: the bytes that are free beside the weights, less what one prompt's reading takes
        at its peak and what a cache has to spare, over the bytes of a sequence.
        """
        formula = self._kv_bytes(name, length)
        extra: ResultRow = {"batch": 1, "formula_bytes": formula}
        if held is None:
            why = "No prompt could be read, so there was nothing to measure."
            self._add("kv_bytes", "bytes", name, length, extra, error=why)
            return None
        fits = max(0, free - held.spare - (work or 0)) // held.each
        extra |= {
            "allocated_bytes": held.allocated,
            "spare_bytes": held.spare,
            "free_bytes": free,
            "work_bytes": work,
            "bytes_each": held.each,
            "max_sequences": fits,
            "max_sequences_is": "(free_bytes - spare_bytes - work_bytes) // bytes_each",
        }
        if self.settings.resident_layers:
            extra["absent_weight_bytes"] = self.settings.absent_bytes
        self._add("kv_bytes", "bytes", name, length, extra, [held.sequence], formula)
        return fits

    def _batches(self, fits: int | None) -> list[int]:
        """Return the numbers of sequences to decode at once."""
        given = self.settings.batches
        batches = {batch for batch in given if isinstance(batch, int)}
        if MOST in given and fits:
            batches.add(min(fits, MOST_SEQUENCES))
        return sorted(batches or {1})

    def _decode(self, name: str, length: int, batch: int, fits: int | None) -> None:
        settings = self.settings
        size = settings.torch_dtype.itemsize
        # Of a batch of none, the weights alone: keys and values may have another size.
        weights = decode_bytes(settings.shape, self._plan(name), length, 0, size)
        read = weights + self._kv_bytes(name, length, batch)
        extra: ResultRow = {"batch": batch, "bytes": read}
        if fits is not None and batch > max(fits, 1):
            why = f"{fits} such sequences fit (see kv_bytes.{name})."
            return self._add("decode", "ms per token", name, length, extra, error=why)
        times: list[float] = []

        def measure() -> None:
            task = self._decode_task(name, length, batch)
            count = WARMUP_STEPS + settings.decode_tokens
            every = [timed(settings.device, task.write)[1] for _ in range(count)]
            times.extend(1000 * seconds for seconds in every[WARMUP_STEPS:])

        error = self._attempt(f"decode.{name}", length, measure)
        assert self.ceiling is not None
        if not error:
            extra["tokens_per_second"] = 1000 * batch / Spread.of(times).median
        least = 1000 * read / self.ceiling.copy.median
        self._add("decode", "ms per token", name, length, extra, times, least, error)

    def _decode_task(self, name: str, length: int, batch: int) -> Decode:
        model, seed = self._models[name], self.settings.seed
        if VARIANTS[name].is_stock:
            return StockDecode(model, length, batch, seed)
        kv_dtype = VARIANTS[name].kv_dtype
        return EngineDecode(model, length, batch, self.settings.room, seed, kv_dtype)

    def _add(
        self,
        metric: str,
        unit: str,
        name: str,
        length: int,
        extra: ResultRow,
        values: Sequence[float] = (),
        ceiling: float | None = None,
        error: str | None = None,
    ) -> None:
        """Give a row: the median of `values`, or why there is none."""
        settings = self.settings
        plan = self._plan(name)
        row: ResultRow = {
            "case": f"{metric}.{name}",
            "length": length,
            "unit": unit,
            "shape": settings.name,
            "layers": plan.layers,
            "pattern": str(plan.pattern) if "S" in plan.layers else None,
            "dtype": settings.dtype,
            "kv_dtype": VARIANTS[name].kv_dtype or settings.dtype,
            **({"resident_layers": few} if (few := settings.resident_layers) else {}),
            **extra,
        }
        if error:
            row |= {"value": None, "n": 0, "error": error}
            said = error
        else:
            found = Spread.of(values)
            row |= {"value": found.median, "spread": [found.low, found.high], "n": found.n}
            if ceiling is not None:
                row |= {"ceiling": ceiling, "share_of_ceiling": ceiling / found.median}
            said = say_bytes(found.median) if unit == "bytes" else f"{found.median:.4g} {unit}"
        chunk = f" in pieces of {extra['prefill_chunk']:,}" if "prefill_chunk" in extra else ""
        batch = f" batch {extra['batch']}" if metric == "decode" else ""
        self.say(f"{row['case']} {say_tokens(length)}{chunk}{batch}: {said}")
        self.rows.append(row)
        self.on_row(row)
