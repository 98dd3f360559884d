"""Generate from a long prompt: read it in chunks, write text as it comes, measure both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from longgen.hf import cache_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Say how tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that together reach this probability.
        top_k: draw from so many of the likeliest tokens.
        seed: decides what is drawn.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0


class _Streamer(TextStreamer):
    """Hand over text in whole words, and note when each token came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._hand_over = write
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        # The first call brings the prompt, before it is read.
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._hand_over is not None and text:
            self._hand_over(text)


def generate_text(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    prefill_chunk: int = 8192,
    write: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue a prompt with a hybrid or plain model.

    The prompt goes through the model `prefill_chunk` tokens at a time, so that sparse layers never
    hold more of it than that.

    Args:
        model: on its device.
        tokenizer: its tokenizer.
        ids: token ids of the prompt, [tokens].
        max_new_tokens: tokens to write at most; it stops before where the model ends its text.
        sampling: None takes the likeliest tokens.
        prefill_chunk: tokens of the prompt in one forward pass.
        write: called with text as it comes.

    Returns:
        text, prompt_tokens, new_tokens, cached_tokens (tokens that went through the cache),
        kv_bytes (bytes that it holds), prefill_seconds (up to the first new token),
        tokens_per_second (of those after it; None for a single one).
    """
    sampling = sampling or Sampling()
    prompt = torch.tensor([list(ids)], device=model.device)
    own = model.generation_config
    chosen: dict[str, Any] = {}
    if sampling.temperature:
        torch.manual_seed(sampling.seed)
        chosen = {
            "temperature": sampling.temperature,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "top_k": sampling.top_k or 0,
        }
    # The model's own config may hold sampling settings that nobody here asked for.
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else 0,
    )
    streamer = _Streamer(tokenizer, write)
    began = time.perf_counter()
    try:
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=bool(sampling.temperature),
            prefill_chunk_size=prefill_chunk,
            streamer=streamer,
            return_dict_in_generate=True,
            **chosen,
        )
    finally:
        model.generation_config = own
    new = output.sequences[0, len(ids) :]
    times = streamer.times[1:]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": len(ids),
        "new_tokens": len(new),
        "cached_tokens": output.past_key_values.get_seq_length(),
        "kv_bytes": cache_bytes(output.past_key_values),
        "prefill_seconds": times[0] - began,
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
    }
