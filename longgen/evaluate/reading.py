"""A prompt read, and tokens written after it, by the engine and by transformers: what is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from longgen.engine import Engine, RequestOutput, SamplingParams
from longgen.hf import CACHE_NAME, cache_bytes

PAGE_SIZE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Hold the bytes of keys and values.

    Attributes:
        sequence: of one sequence after its prompt, by the sizes of its storages.
        each: of one sequence while it decodes.
        allocated: by a cache for one sequence, before it decodes.
    """

    sequence: int
    each: int
    allocated: int

    @property
    def spare(self) -> int:
        """Bytes that are allocated for no sequence in particular."""
        return max(0, self.allocated - self.each)


class EnginePrefill:
    """Read a prompt through `Engine.step`, again and again, and write on after the last time.

    Args:
        model: the hybrid. The prompt may go beyond its context.
        prompt: token ids.
        room: tokens that the sequence may grow by, at least two.
        kv_dtype: of keys and values, as `Engine` takes it.
    """

    def __init__(
        self, model: Any, prompt: Sequence[int], room: int, kv_dtype: str | None = None
    ) -> None:
        assert room > 1, "the first token must not end the request: what it holds is still wanted"
        self.prompt, self.room = list(prompt), room
        self.engine = Engine(
            model,
            max_length=len(self.prompt) + room,
            beyond_context=True,
            max_sequences=1,
            page_size=PAGE_SIZE,
            kv_dtype=kv_dtype,
        )
        self.chunk = len(self.prompt)

    def prepare(self, chunk: int) -> None:
        """Forget what was read, and get ready to read it `chunk` tokens at a time."""
        self.engine.cancel("prompt")
        self.engine.step()  # tells the end of the one that was cancelled
        self.chunk = chunk
        self.engine.scheduler.sizes.set(chunk, chunk)
        params = SamplingParams(max_tokens=self.room, ignore_eos=True)
        self.engine.add_request(self.prompt, params, "prompt")

    def read(self) -> None:
        """Read the prompt to its first new token."""
        while True:
            outputs = self.engine.step()
            if self.engine.scheduler.sizes.is_reduced:
                # It would go on in smaller pieces, and that is not what is measured.
                raise torch.OutOfMemoryError(f"in pieces of {self.chunk} tokens")
            if outputs:
                return check_outputs(outputs, 1)

    def write(self) -> None:
        """Write the next token: at most `room - 1` times."""
        write_tokens(self.engine, 1)

    def held(self) -> Held:
        """Return the bytes of keys and values, right after the prompt was read."""
        cache = self.engine.cache
        num_pages = len(self.engine.requests["prompt"].block_table)
        sequence = 0
        for layer, kind in enumerate(cache.plan.layers):
            for store in (cache.keys[layer], cache.values[layer]):
                each = store.untyped_storage().nbytes() // len(store)
                sequence += each * (num_pages if kind == "F" else 1)
        written = cache.bytes_of(cache.max_length) - cache.bytes_of(len(self.prompt))
        return Held(sequence=sequence, each=sequence + written, allocated=cache.num_bytes)


class TransformersPrefill:
    """Read a prompt through transformers' forward pass, as `generate()` does, and write on.

    Args:
        model: any causal language model.
        prompt: token ids (P).
        new: token ids that follow it; which they are doesn't change how long they take.
    """

    def __init__(self, model: PreTrainedModel, prompt: Sequence[int], new: Sequence[int]) -> None:
        self.model = model
        self.prompt, self.new = (
            torch.tensor([list(ids)], device=model.device) for ids in (prompt, new)
        )
        self.chunk, self.num_written = len(prompt), 0
        self.cache: Cache | None = None

    def prepare(self, chunk: int) -> None:
        """Forget what was read, and get ready to read it `chunk` tokens at a time."""
        self.cache, self.chunk, self.num_written = None, chunk, 0

    def read(self) -> None:
        """Read the prompt to its last logits."""
        for ids in self.prompt.split(self.chunk, dim=1):
            self._forward(ids)

    def write(self) -> None:
        """Read the next of the new tokens."""
        place = self.num_written
        self._forward(self.new[:, place : place + 1])
        self.num_written += 1

    def held(self) -> Held:
        """Return the bytes of keys and values, right after the prompt was read."""
        assert self.cache is not None
        sequence = cache_bytes(self.cache)
        return Held(sequence=sequence, each=sequence, allocated=sequence)

    def _forward(self, ids: torch.Tensor) -> None:
        held = {CACHE_NAME: self.cache}
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **held)
        self.cache = getattr(output, CACHE_NAME)


def write_tokens(engine: Engine, number: int) -> None:
    """Run a step that writes one token for each of `number` requests.

    Raises:
        torch.OutOfMemoryError: the engine would read them again in smaller pieces.
        RuntimeError: with the engine's reason, if one of them got none.
    """
    outputs = engine.step()
    if any(request.num_preempted for request in engine.scheduler.waiting):
        raise torch.OutOfMemoryError("in a step of one token a sequence")
    check_outputs(outputs, number)


def check_outputs(outputs: Sequence[RequestOutput], number: int) -> None:
    """See that a step brought a token to each of `number` requests.

    Raises:
        RuntimeError: with the engine's reason, if it didn't.
    """
    error = next((out.error for out in outputs if out.error), None)
    if error is not None or sum(len(out.token_ids) for out in outputs) != number:
        raise RuntimeError(error or f"{len(outputs)} of {number} sequences got a token")
