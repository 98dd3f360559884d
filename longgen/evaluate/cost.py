"""What a context costs: bytes of cache held, time to read a prompt, time per generated token."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from longgen.errors import UsageError
from longgen.evaluate.asking import evaluating
from longgen.evaluate.reading import EnginePrefill, TransformersPrefill
from longgen.memory import clear, is_out_of_memory
from longgen.runtime import ENGINE, TRANSFORMERS, runtime_of

WARMUP_STEPS = 3

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Hold what one length cost, or why it was not measured.

    Attributes:
        length: tokens in the prompt.
        prefill_chunk: tokens per forward pass of the prefill.
        runtime: what ran the model, `longgen.runtime`'s name of it.
        kv_bytes: bytes of keys and values held right after the prefill; by the engine, in the
            sequence's pages and its slot.
        prefill_seconds: one figure per repeat.
        decode_ms: milliseconds per token, one figure per step.
        error: a sentence, where the length was not measured.
    """

    length: int
    prefill_chunk: int
    runtime: str = TRANSFORMERS
    kv_bytes: int | None = None
    prefill_seconds: tuple[float, ...] = ()
    decode_ms: tuple[float, ...] = ()
    error: str | None = None

    def rows(self, variant: str) -> list[dict[str, object]]:
        """Give a results row each for `kv_bytes`, `prefill` and `decode`, value None on error."""
        held = () if self.kv_bytes is None else (self.kv_bytes,)
        return [
            self._row(f"kv_bytes.{variant}", "bytes", held),
            self._row(f"prefill.{variant}", "s", self.prefill_seconds),
            self._row(f"decode.{variant}", "ms per token", self.decode_ms),
        ]

    def _row(self, case: str, unit: str, figures: Sequence[float]) -> dict[str, object]:
        row: dict[str, object] = {"case": case, "length": self.length, "unit": unit, "batch": 1}
        row |= {"prefill_chunk": self.prefill_chunk, "runtime": self.runtime, "n": len(figures)}
        if self.error is not None:
            return row | {"value": None, "error": self.error}
        return row | {"value": statistics.median(figures), "spread": [min(figures), max(figures)]}


def measure_cost(
    model: PreTrainedModel,
    lengths: Sequence[int],
    *,
    decode_steps: int = 32,
    repeats: int = 3,
    warmup: int = 1,
    prefill_chunk: int = 8192,
    seed: int = 0,
    kv_dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Cost]:
    """Measure cache, prefill and decode at batch 1 with random tokens, shortest length first.

    Hybrids are measured in the engine, where a token is one whole step, scheduling and choosing the
    likeliest token included; other models in transformers, where it is a forward pass. Times come
    from CUDA events on a GPU and from the monotonic clock elsewhere. A length that runs out of
    memory is recorded with its error, and so is every greater one, without being tried.

    Args:
        model: a causal language model, on its device and in its dtype.
        lengths: prompt lengths in tokens; they may go beyond the model's context.
        decode_steps: timed tokens after the prompt; a few untimed ones go before them.
        repeats: timed prefills.
        warmup: untimed prefills before them, at every length, since kernels are compiled and tuned
            by shape.
        prefill_chunk: tokens per forward pass of the prefill.
        seed: of the random tokens.
        kv_dtype: of keys and values, as `Engine` takes it; only for hybrids.
        progress: called with (lengths done, lengths) after every length.

    Raises:
        UsageError: a length or a count is below 1.
    """
    counts = {"decode_steps": decode_steps, "repeats": repeats, "prefill_chunk": prefill_chunk}
    counts |= {"a length": min(lengths, default=0)}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"Measuring cost needs {name} of at least 1, not {count}.")
    runtime = runtime_of(model)
    costs: list[Cost] = []
    too_long: int | None = None
    for number, length in enumerate(sorted(lengths), start=1):
        cost = Cost(length=length, prefill_chunk=prefill_chunk, runtime=runtime)
        if too_long is not None:
            reason = f"Skipped: {too_long:,} tokens did not fit, so greater lengths were not tried."
            cost = replace(cost, error=reason)
        else:
            try:
                with evaluating(model):
                    cost = _measure(model, cost, decode_steps, repeats, warmup, seed, kv_dtype)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                too_long = length
                cost = replace(cost, error=f"Out of memory at {length:,} tokens on {model.device}.")
            clear(model.device)
        costs.append(cost)
        if progress:
            progress(number, len(lengths))
    return costs


def _measure(
    model: PreTrainedModel,
    cost: Cost,
    decode_steps: int,
    repeats: int,
    warmup: int,
    seed: int,
    kv_dtype: str | None,
) -> Cost:
    generator = torch.Generator().manual_seed(seed)
    num_new = WARMUP_STEPS + decode_steps
    size = (cost.length + num_new,)
    tokens = torch.randint(model.config.vocab_size, size, generator=generator).tolist()
    prompt, new = tokens[: cost.length], tokens[cost.length :]
    task: EnginePrefill | TransformersPrefill
    if cost.runtime == ENGINE:
        # One token more: the engine writes the first when it has read the prompt.
        task = EnginePrefill(model, prompt, num_new + 1, kv_dtype)
    else:
        task = TransformersPrefill(model, prompt, new)
    prefill: list[float] = []
    for _ in range(warmup + repeats):
        task.prepare(cost.prefill_chunk)
        prefill.append(timed(model.device, task.read)[1])
    held = task.held().sequence
    steps = [timed(model.device, task.write)[1] for _ in range(num_new)]
    return replace(
        cost,
        kv_bytes=held,
        prefill_seconds=tuple(prefill[warmup:]),
        decode_ms=tuple(1000 * seconds for seconds in steps[WARMUP_STEPS:]),
    )


def timed(device: torch.device, work: Callable[[], Result]) -> tuple[Result, float]:
    """Run `work` and give its result and the seconds it took, the device's work included."""
    if device.type != "cuda":
        begin = time.perf_counter()
        result = work()
        return result, time.perf_counter() - begin
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = work()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end) / 1000
