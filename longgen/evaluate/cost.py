"""What a context costs: bytes of cache held, time to read a prompt, time per generated token."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from transformers import Cache, PreTrainedModel

from longgen.errors import UsageError
from longgen.evaluate.needle import evaluating
from longgen.hf import cache_bytes

WARMUP_STEPS = 3

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Hold what one length cost, or why it was not measured.

    Attributes:
        length: tokens in the prompt.
        prefill_chunk: tokens per forward pass of the prefill.
        kv_bytes: bytes of keys and values held right after the prefill.
        prefill_seconds: one figure per repeat.
        decode_ms: milliseconds per token, one figure per step.
        error: a sentence, where the length was not measured.
    """

    length: int
    prefill_chunk: int
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
        row |= {"prefill_chunk": self.prefill_chunk, "n": len(figures)}
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
    progress: Callable[[int, int], None] | None = None,
) -> list[Cost]:
    """Measure cache, prefill and decode at batch 1 with random tokens, shortest length first.

    Every figure is a whole forward pass as a user would call it. Times come from CUDA events on a
    GPU and from the monotonic clock elsewhere. A length that runs out of memory is recorded with
    its error, and so is every greater one, without being tried.

    Args:
        model: a causal language model, on its device and in its dtype.
        lengths: prompt lengths in tokens.
        decode_steps: timed tokens after the prompt; a few untimed ones go before them.
        repeats: timed prefills.
        warmup: untimed prefills before them, at every length, since kernels are compiled and tuned
            by shape.
        prefill_chunk: tokens per forward pass of the prefill.
        seed: of the random tokens.
        progress: called with (lengths done, lengths) after every length.

    Raises:
        UsageError: a length or a count is below 1.
    """
    counts = {"decode_steps": decode_steps, "repeats": repeats, "prefill_chunk": prefill_chunk}
    counts |= {"a length": min(lengths, default=0)}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"Measuring cost needs {name} of at least 1, not {count}.")
    costs: list[Cost] = []
    too_long: int | None = None
    for number, length in enumerate(sorted(lengths), start=1):
        cost = Cost(length=length, prefill_chunk=prefill_chunk)
        if too_long is not None:
            reason = f"Skipped: {too_long:,} tokens did not fit, so greater lengths were not tried."
            cost = replace(cost, error=reason)
        else:
            try:
                with evaluating(model):
                    cost = _measure(model, cost, decode_steps, repeats, warmup, seed)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                too_long = length
                cost = replace(cost, error=f"Out of memory at {length:,} tokens on {model.device}.")
            if (
                too_long is not None
            ):  # after the handler: until it ends, the exception's frames hold the tensors
                gc.collect()
                if model.device.type == "cuda":
                    torch.cuda.empty_cache()
        costs.append(cost)
        if progress:
            progress(number, len(lengths))
    return costs


def _measure(
    model: PreTrainedModel, cost: Cost, decode_steps: int, repeats: int, warmup: int, seed: int
) -> Cost:
    generator = torch.Generator().manual_seed(seed)
    total = cost.length + WARMUP_STEPS + decode_steps
    tokens = torch.randint(model.config.vocab_size, (1, total), generator=generator).to(
        model.device
    )
    prompt, new = tokens[:, : cost.length], tokens[:, cost.length :]
    prefill: list[float] = []
    for _ in range(warmup + repeats):
        cache: Cache | None = None  # let go of the last one before the next is filled
        cache, seconds = timed(model.device, partial(_prefill, model, prompt, cost.prefill_chunk))
        prefill.append(seconds)
    held = cache_bytes(cache)
    steps = [
        timed(model.device, partial(_forward, model, t, cache))[1] for t in new.split(1, dim=1)
    ]
    return replace(
        cost,
        kv_bytes=held,
        prefill_seconds=tuple(prefill[warmup:]),
        decode_ms=tuple(1000 * seconds for seconds in steps[WARMUP_STEPS:]),
    )


def _forward(model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None) -> Cache:
    return model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).past_key_values


def _prefill(model: PreTrainedModel, prompt: torch.Tensor, chunk: int) -> Cache:
    cache = None
    for ids in prompt.split(chunk, dim=1):
        cache = _forward(model, ids, cache)
    assert cache is not None
    return cache


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


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception means that a GPU or the machine has no memory left."""
    # The CPU allocator raises a bare RuntimeError that can only be told by its text.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(
        error
    )
