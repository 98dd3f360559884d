"""Prompts read and tokens written, by the engine and by transformers: what is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from longgen.engine import Engine, SamplingParams
from longgen.engine.request import State
from longgen.evaluate.reading import PAGE_SIZE, Held, write_tokens
from longgen.hf import CACHE_NAME, cache_bytes

_NOISE_SIZE = 1 << 24


class Prefill(Protocol):
    """Read one prompt, again and again."""

    def prepare(self, chunk: int) -> None:
        """Forget what was read, and get ready to read it `chunk` tokens at a time."""

    def read(self) -> None:
        """Read the prompt to its first new token."""

    def held(self) -> Held:
        """Return the bytes of keys and values after it was read."""
        ...


class Decode(Protocol):
    """Write tokens for some sequences at once."""

    def write(self) -> None:
        """Write one token for each."""


class EngineDecode:
    """Write tokens through `Engine.step` for sequences whose cache was never computed.

    What the cache holds doesn't change how long a step takes, so it is filled with normal numbers.

    Args:
        model: the hybrid.
        length: tokens of each sequence when the first token is written.
        batch: sequences.
        room: tokens that they may grow by.
        seed: of contents and tokens.
        kv_dtype: of keys and values, as `Engine` takes it.
    """

    def __init__(
        self,
        model: Any,
        length: int,
        batch: int,
        room: int,
        seed: int,
        kv_dtype: str | None = None,
    ) -> None:
        self.batch = batch
        self.engine = engine = Engine(
            model,
            max_length=length + room,
            max_sequences=batch,
            page_size=PAGE_SIZE,
            max_batched_tokens=max(batch, PAGE_SIZE),
            kv_dtype=kv_dtype,
        )
        generator = torch.Generator(model.device).manual_seed(seed)
        fill([*engine.cache.keys, *engine.cache.values], generator)
        prompt = random_tokens(model, length, seed)
        scheduler = engine.scheduler
        for _ in range(batch):
            params = SamplingParams(max_tokens=room, ignore_eos=True)
            request = engine.requests[engine.add_request(prompt, params)]
            # As if all tokens but the last had gone through the model.
            scheduler.waiting.remove(request)
            (request.slot,) = engine.cache.slots.take(1)
            request.state, request.num_cached = State.RUNNING, length - 1
            scheduler.running.append(request)

    def write(self) -> None:
        write_tokens(self.engine, self.batch)


class StockPrefill:
    """Read a prompt through transformers' model, in one piece, as `generate()` does.

    Args:
        model: transformers' own.
        prompt: token ids.
    """

    def __init__(self, model: Any, prompt: Sequence[int]) -> None:
        self.model, self.cache = model, None
        self.ids = torch.tensor([list(prompt)], device=model.device)

    def prepare(self, chunk: int) -> None:
        assert chunk == self.ids.shape[1]
        self.cache = None

    @torch.inference_mode()
    def read(self) -> None:
        out = self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        self.cache = getattr(out, CACHE_NAME)
        _check_finite(out.logits)

    def held(self) -> Held:
        sequence = cache_bytes(self.cache)  # type: ignore[arg-type]
        # Every new token has each layer's keys and values copied, one layer after the other.
        copied = sequence // self.model.config.num_hidden_layers
        return Held(sequence=sequence, each=sequence + copied, allocated=sequence)


class StockDecode:
    """Write tokens through transformers' model with its default cache, filled like the engine's.

    Args:
        model: transformers' own.
        length: tokens of each sequence when the first token is written.
        batch: sequences.
        seed: of contents and tokens.
    """

    def __init__(self, model: Any, length: int, batch: int, seed: int) -> None:
        self.model = model
        config = model.config
        head_dim = getattr(config, "head_dim", None)
        size = head_dim or config.hidden_size // config.num_attention_heads
        generator = torch.Generator(model.device).manual_seed(seed)
        self.cache = DynamicCache(config=config)
        held = (batch, config.num_key_value_heads, length - 1, size)
        for layer in range(config.num_hidden_layers):
            states = [torch.empty(held, dtype=model.dtype, device=model.device) for _ in range(2)]
            fill(states, generator)
            self.cache.update(states[0], states[1], layer)
        self.tokens = torch.tensor([random_tokens(model, 1, seed)] * batch, device=model.device)

    @torch.inference_mode()
    def write(self) -> None:
        held = {CACHE_NAME: self.cache}
        out = self.model(input_ids=self.tokens, use_cache=True, logits_to_keep=1, **held)
        # The token is needed on the host, to be shown: as the engine does.
        self.tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        _check_finite(out.logits)


def _check_finite(logits: torch.Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("the logits are not finite")


def fill(stores: Sequence[torch.Tensor], generator: torch.Generator) -> None:
    """Fill keys or values with normal numbers, the same block of them over and over."""
    for store in stores:
        size = min(_NOISE_SIZE, store.numel())
        noise = torch.randn(size, generator=generator, device=store.device)
        for piece in store.view(-1).split(max(size, 1)):
            piece.copy_(noise[: len(piece)])


def random_tokens(model: Any, length: int, seed: int) -> list[int]:
    """Draw token ids."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(
        model.config.vocab_size, (length,), generator=generator
    ).tolist()
    return tokens
