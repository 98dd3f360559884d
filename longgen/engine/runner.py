"""Decoding steps of fixed shape, captured in CUDA graphs.

A step of one token a sequence is bound by memory, but only if nobody waits for Python to launch
its hundreds of kernels. So the batch is filled up to one of a few sizes, its tensors stay where
they are, and on a GPU the whole pass is recorded once for each size and played back ever after:
lengths, slots and block tables are data on the device.
"""

from __future__ import annotations

from typing import Any

import torch

from longgen.engine.cache import EngineCache
from longgen.engine.decode import DecodeBatch
from longgen.engine.step import Step, run_tokens


class _Buffers:
    """Hold the inputs and the result of a batch of one size."""

    def __init__(self, cache: EngineCache, size: int) -> None:
        device = cache.device
        width = max(cache.num_pages_for(cache.max_length), 1)
        self.tokens = torch.zeros(size, dtype=torch.long, device=device)
        self.lengths = torch.ones(size, dtype=torch.long, device=device)
        self.slots = torch.full((size,), cache.spare_slot, device=device)
        self.tables = torch.full((size, width), cache.spare_page, dtype=torch.int32, device=device)
        self.logits: torch.Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None


class DecodeRunner:
    """Run decoding steps in batches of fixed sizes.

    Args:
        model: a LongGen causal language model.
        cache: its keys and values; rows that only fill a batch up write to its spare slot and page.
        sizes: batch sizes; None takes powers of two up to the cache's slots.
        capture: whether to record CUDA graphs; None does on a GPU.
    """

    def __init__(
        self,
        model: Any,
        cache: EngineCache,
        sizes: tuple[int, ...] | None = None,
        capture: bool | None = None,
    ) -> None:
        self.model, self.cache = model, cache
        if sizes is None:
            powers = (1 << i for i in range(cache.slots.size.bit_length()))
            sizes = (*(n for n in powers if n < cache.slots.size), cache.slots.size)
        self.sizes = tuple(sorted(sizes))
        self.capture = cache.device.type == "cuda" if capture is None else capture
        self._buffers: dict[int, _Buffers] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(
        self, tokens: list[int], lengths: list[int], slots: list[int], tables: list[list[int]]
    ) -> torch.Tensor:
        """Put one token of each sequence through the model.

        Args:
            tokens: the new tokens, (N).
            lengths: tokens of each sequence, the new one included.
            slots: their slots.
            tables: their pages in order.

        Returns:
            logits (N, vocabulary); overwritten by the next call.
        """
        number = len(tokens)
        size = next(n for n in self.sizes if n >= number)
        buffers = self._buffers.get(size)
        if buffers is None:
            buffers = self._buffers[size] = _Buffers(self.cache, size)
        filling = size - number
        width = buffers.tables.shape[1]
        spare = self.cache.spare_page
        rows = [[*table, *[spare] * (width - len(table))] for table in tables]
        for target, values in (
            (buffers.tokens, [*tokens, *[0] * filling]),
            (buffers.lengths, [*lengths, *[1] * filling]),
            (buffers.slots, [*slots, *[self.cache.spare_slot] * filling]),
            (buffers.tables, [*rows, *[[spare] * width] * filling]),
        ):
            target.copy_(torch.tensor(values, dtype=target.dtype), non_blocking=True)
        if not self.capture:
            return self._run(buffers)[:number]
        if buffers.graph is None:
            self._record(buffers)
        assert buffers.graph is not None and buffers.logits is not None
        buffers.graph.replay()
        return buffers.logits[:number]

    def _run(self, buffers: _Buffers) -> torch.Tensor:
        batch = DecodeBatch(self.cache, buffers.lengths, buffers.slots, buffers.tables)
        return run_tokens(self.model, Step(self.cache, [], batch), buffers.tokens, None)

    def _record(self, buffers: _Buffers) -> None:
        """Record one pass; kernels are compiled and chosen in two passes before it.

        They run on the sequences themselves: storing the same token twice changes nothing but
        where a stride's tokens leave the ring, so they go to the spare slot and page instead.
        """
        kept = [x.clone() for x in (buffers.slots, buffers.tables)]
        buffers.slots.fill_(self.cache.spare_slot)
        buffers.tables.fill_(self.cache.spare_page)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(buffers)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            buffers.logits = self._run(buffers)
        self._pool = self._pool or graph.pool()
        buffers.graph = graph
        buffers.slots.copy_(kept[0])
        buffers.tables.copy_(kept[1])
