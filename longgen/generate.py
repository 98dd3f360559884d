"""Generate from a long prompt: read it in chunks, write text as it comes, measure both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from longgen.engine import Engine, SamplingParams
from longgen.engine.text import IncrementalDetokenizer, StopStrings
from longgen.errors import UsageError
from longgen.hf import CACHE_NAME, cache_bytes
from longgen.runtime import ENGINE, runtime_of

Figures = dict[str, Any]
Write = Callable[[str], None]


def generate_text(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    params: SamplingParams,
    *,
    prefill_chunk: int = 8192,
    kv_dtype: str | None = None,
    is_compiled: bool = False,
    write: Write | None = None,
    on_read: Callable[[int], None] | None = None,
) -> Figures:
    """Continue a prompt: a hybrid in the engine, any other model in transformers.

    The prompt goes through the model `prefill_chunk` tokens at a time, so that memory for the work
    itself does not grow with it.

    Args:
        model: on its device.
        tokenizer: its tokenizer.
        ids: token ids of the prompt, [tokens].
        params: how tokens are chosen, how many at most, and where the text ends.
        prefill_chunk: tokens of the prompt in one forward pass.
        kv_dtype: of keys and values, as `Engine` takes it; only for hybrids.
        is_compiled: whether the engine compiles the model first, on a GPU.
        write: called with text as it comes.
        on_read: called with the tokens read so far, after each chunk of a hybrid's prompt.

    Returns:
        text, finish_reason ("stop" or "length"), runtime (what ran the model), prompt_tokens,
        new_tokens, cached_tokens (those that went through the cache), kv_bytes (bytes that these
        take there), prefill_seconds (up to the first new token), tokens_per_second (of those after
        it; None for a single one).

    Raises:
        UsageError: if memory runs out, or the model's output holds no numbers to choose from; or
            `kv_dtype` is given for a model that is no hybrid.
    """
    runtime = runtime_of(model)
    common: Figures = {"runtime": runtime, "prompt_tokens": len(ids)}
    if runtime == ENGINE:
        return common | _by_engine(
            model,
            tokenizer,
            ids,
            params,
            {
                "max_batched_tokens": prefill_chunk,
                "kv_dtype": kv_dtype,
                "enforce_eager": not is_compiled,
            },
            write,
            on_read,
        )
    if kv_dtype is not None:
        raise UsageError(
            f"Keys and values in {kv_dtype} are for hybrids, which the engine runs, and "
            f"{type(model).__name__} isn't one. Leave it out, or convert the model first."
        )
    return common | _by_transformers(model, tokenizer, ids, params, prefill_chunk, write)


def _by_engine(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    params: SamplingParams,
    settings: dict[str, Any],
    write: Write | None,
    on_read: Callable[[int], None] | None,
) -> Figures:
    length = len(ids) + params.max_tokens
    try:
        engine = Engine(model, tokenizer, max_length=length, max_sequences=1, **settings)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"The keys and values of {length:,} tokens do not fit into the memory of "
            f"{model.device}. Shorten the prompt, write fewer tokens, or keep keys and values in "
            "fp8."
        ) from error
    began = time.perf_counter()
    request = engine.requests[engine.add_request(ids, params)]
    times: list[float] = []
    while request.finish_reason is None:
        outputs = engine.step()
        times += [time.perf_counter() for out in outputs for _ in out.token_ids]
        if write is not None:
            for out in outputs:
                if out.text:
                    write(out.text)
        if not times and on_read is not None:
            on_read(request.num_cached)
    if request.error is not None:
        raise UsageError(request.error)
    # The last token written is not read any more.
    num_cached = request.num_tokens - 1
    return {
        "text": request.text,
        "finish_reason": request.finish_reason,
        "new_tokens": len(request.output),
        "cached_tokens": num_cached,
        "kv_bytes": engine.cache.bytes_of(num_cached),
        **_times(began, times),
    }


class _Writer(StoppingCriteria):
    """Look at every token that transformers chose: turn it into text, note when it came, say
    whether it is the last."""

    def __init__(
        self, tokenizer: Any, params: SamplingParams, ends: Sequence[int], write: Write | None
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop = StopStrings(params.stop)
        self._ends, self._max_tokens, self._write = ends, params.max_tokens, write
        self._pieces: list[str] = []
        self.times: list[float] = []
        self.finish_reason: str | None = None

    @property
    def text(self) -> str:
        """Text written so far, up to a stop string."""
        return "".join(self._pieces)

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        # Once it has ended: transformers may run a step more and undo it.
        if self.finish_reason is None:
            self._take(int(input_ids[0, -1]))
        is_done: Any = torch.tensor([self.finish_reason is not None], device=input_ids.device)
        return is_done

    def _take(self, token: int) -> None:
        self.times.append(time.perf_counter())
        reason = "length" if len(self.times) == self._max_tokens else None
        if token in self._ends:
            reason = "stop"
        else:
            self._give(self._stop.push(self._detokenizer.add(token))[0])
        # What was held back in case more belonged to it.
        if reason is not None and self._stop.matched is None:
            self._give(self._stop.push(self._detokenizer.flush())[0])
        if reason is not None and self._stop.matched is None:
            self._give(self._stop.flush())
        self.finish_reason = reason if self._stop.matched is None else "stop"

    def _give(self, text: str) -> None:
        self._pieces.append(text)
        if self._write is not None and text:
            self._write(text)


def _by_transformers(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    params: SamplingParams,
    prefill_chunk: int,
    write: Write | None,
) -> Figures:
    prompt = torch.tensor([list(ids)], device=model.device)
    own = model.generation_config
    eos = [own.eos_token_id] if isinstance(own.eos_token_id, int) else own.eos_token_id or []
    ends = [*([] if params.ignore_eos else eos), *params.stop_token_ids]
    chosen: dict[str, Any] = {"repetition_penalty": params.repetition_penalty}
    if not params.is_greedy:
        if params.seed is not None:
            torch.manual_seed(params.seed)
        chosen |= {name: getattr(params, name) for name in ("temperature", "top_p", "top_k")}
        chosen |= {"min_p": params.min_p} if params.min_p else {}
    # The model's own config may hold sampling settings that nobody here asked for.
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else 0,
    )
    writer = _Writer(tokenizer, params, ends, write)
    began = time.perf_counter()
    try:
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=params.max_tokens,
            do_sample=not params.is_greedy,
            prefill_chunk_size=prefill_chunk,
            stopping_criteria=[writer],
            return_dict_in_generate=True,
            **chosen,
        )
    finally:
        model.generation_config = own
    return {
        "text": writer.text,
        "finish_reason": writer.finish_reason,
        "new_tokens": len(writer.times),
        "cached_tokens": getattr(output, CACHE_NAME).get_seq_length(),
        "kv_bytes": cache_bytes(getattr(output, CACHE_NAME)),
        **_times(began, writer.times),
    }


def _times(began: float, times: Sequence[float]) -> Figures:
    """Return figures of the moments at which tokens came."""
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    return {"prefill_seconds": times[0] - began, "tokens_per_second": speed}
