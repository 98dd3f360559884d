"""Decoding steps of fixed shape, captured in CUDA graphs.

A step of one token a sequence is bound by memory, but only if nobody waits for Python to launch
its hundreds of kernels. So the batch is filled up to one of a few sizes, its tensors stay where
they are, and on a GPU the whole pass is recorded once for each size and played back ever after:
lengths, slots and block tables are data on the device.
"""

from __future__ import annotations

from typing import Any

import torch

from longgen.engine import one_token
from longgen.engine.cache import EngineCache
from longgen.engine.decode import DecodeBatch, slot_places
from longgen.engine.sampling import likeliest
from longgen.engine.step import Step, run_tokens


class _Buffers:
    """Hold the inputs and the results of a batch of one size."""

    def __init__(self, cache: EngineCache, size: int) -> None:
        device = cache.device
        self.cache, self.size = cache, size
        width = max(cache.num_pages_for(cache.max_length), 1)
        # What a step brings is put together on the host, where the device reads it by itself.
        pinned = device.type == "cuda"
        self._host = torch.zeros(3, size, dtype=torch.long, pin_memory=pinned)
        self._host_tables = torch.zeros(size, width, dtype=torch.int32, pin_memory=pinned)
        self._numbers = torch.zeros(3, size, dtype=torch.long, device=device)
        self.tables = torch.zeros(size, width, dtype=torch.int32, device=device)
        # Which list each row of the tables holds, and how much of it.
        self._held: list[tuple[list[int] | None, int]] = [(None, 0)] * size
        self.logits: torch.Tensor | None = None
        self.likeliest: torch.Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        # Set when the device has read the host's numbers.
        self._read = torch.cuda.Event() if pinned else None

    @property
    def tokens(self) -> torch.Tensor:
        """The new tokens, (size,)."""
        return self._numbers[0]

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each sequence, the new one included, (size,)."""
        return self._numbers[1]

    @property
    def slots(self) -> torch.Tensor:
        """Slots, (size,)."""
        return self._numbers[2]

    def fill(
        self, tokens: list[int], lengths: list[int], slots: list[int], tables: list[list[int]]
    ) -> None:
        """Send a step's numbers to the device; rows that are left over are no sequence's."""
        if self._read is not None:
            self._read.synchronize()
        left = self.size - len(tokens)
        nothing = [0] * left
        self._host.copy_(torch.tensor((tokens + nothing, lengths + nothing, slots + nothing)))
        self._numbers.copy_(self._host, non_blocking=True)
        written = [self._write(row, table) for row, table in enumerate(tables)]
        written += [self._write(row, None) for row in range(len(tokens), self.size)]
        if any(written):
            self.tables.copy_(self._host_tables, non_blocking=True)
        if self._read is not None:
            self._read.record()

    def forget(self) -> None:
        """Have all tables written anew."""
        self._held = [(None, 0)] * self.size

    def _write(self, row: int, table: list[int] | None) -> bool:
        """Put a sequence's pages into the host's table, as far as they aren't there; return whether
        any were. What stands behind them doesn't matter."""
        held, count = self._held[row]
        if table is not held or held is None:
            count = 0
        pages = [self.cache.spare_page] if table is None else table[count:]
        if not pages or (table is None and self._held[row] == (None, 1)):
            return False
        self._host_tables[row, count : count + len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self._held[row] = table, count + len(pages)
        return True


class DecodeRunner:
    """Run decoding steps in batches of fixed sizes.

    Args:
        model: a LongGen causal language model.
        cache: its keys and values; rows that only fill a batch up write to what it has to spare.
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
        # Some fifty small kernels otherwise, once a step.
        self._find_places = (
            torch.compile(slot_places, dynamic=True) if self.capture else slot_places
        )
        self._one_token = one_token.can_run(model)
        self._buffers: dict[int, _Buffers] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(
        self, tokens: list[int], lengths: list[int], slots: list[int], tables: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put one token of each sequence through the model.

        Args:
            tokens: the new tokens, (N).
            lengths: tokens of each sequence, the new one included.
            slots: their slots.
            tables: their pages in order; a list that was given before may only have grown.

        Returns:
            logits (N, vocabulary) and what `likeliest` makes of them, (N,); both are overwritten by
            the next call.
        """
        number = len(tokens)
        size = next(n for n in self.sizes if n >= number)
        buffers = self._buffers.get(size)
        if buffers is None:
            buffers = self._buffers[size] = _Buffers(self.cache, size)
        buffers.fill(tokens, lengths, slots, tables)
        if not self.capture:
            self._run(buffers)
        elif buffers.graph is None:
            self._record(buffers)
        if buffers.graph is not None:
            buffers.graph.replay()
        assert buffers.logits is not None and buffers.likeliest is not None
        return buffers.logits[:number], buffers.likeliest[:number]

    def _run(self, buffers: _Buffers) -> None:
        batch = DecodeBatch(
            self.cache, buffers.lengths, buffers.slots, buffers.tables, self._find_places
        )
        if buffers.size == 1 and self._one_token:
            buffers.logits = one_token.logits_of(self.model, batch, buffers.tokens)
        else:
            step = Step(self.cache, [], batch)
            buffers.logits = run_tokens(self.model, step, buffers.tokens, None)
        # In the graph: one kernel after the other, the host would launch these ten times slower.
        buffers.likeliest = likeliest(buffers.logits)

    def _record(self, buffers: _Buffers) -> None:
        """Record one pass; kernels are compiled and chosen in two passes before it.

        They run on no sequence, since storing the same token twice changes what a slot holds where
        a stride's tokens leave the ring.
        """
        kept = [x.clone() for x in (buffers.lengths, buffers.tables)]
        buffers.lengths.zero_()
        buffers.tables.fill_(self.cache.spare_page)
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._run(buffers)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._run(buffers)
        except BaseException:
            # The tables on the device are no sequence's now.
            buffers.forget()
            raise
        self._pool = self._pool or graph.pool()
        buffers.graph = graph
        buffers.lengths.copy_(kept[0])
        buffers.tables.copy_(kept[1])
