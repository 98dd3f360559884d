"""Decoding steps of fixed shape, captured in CUDA graphs.

A step of one token a sequence is bound by memory, but only if nobody waits for Python to launch
its hundreds of kernels. So the batch is filled up to one of a few sizes, its tensors stay where
they are, and on a GPU the whole pass is recorded once for each size and played back ever after:
lengths, slots and block tables are data on the device. A pass leaves them as the next one needs
them if each sequence goes on with its likeliest token, so that one can be under way before the host
has read a token of the other.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch

from longgen.engine import one_token
from longgen.engine.cache import EngineCache
from longgen.engine.decode import DecodeBatch, slot_places
from longgen.engine.kernels import launching_on
from longgen.engine.sampling import likeliest
from longgen.engine.step import Step, run_tokens

# Tokens, lengths and slots of a batch's sequences.
_Numbers = tuple[list[int], list[int], list[int]]


class _Result(NamedTuple):
    """Hold what a pass under way will bring: logits (size, vocabulary), the likeliest tokens
    (size,) where the host reads them, and what is set when they are there."""

    logits: torch.Tensor
    tokens: torch.Tensor
    done: torch.cuda.Event | None


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
        self.numbers = torch.zeros(3, size, dtype=torch.long, device=device)
        self.tables = torch.zeros(size, width, dtype=torch.int32, device=device)
        # Which list each row of the tables holds, and how much of it.
        self._held: list[tuple[list[int] | None, int]] = [(None, 0)] * size
        self.logits: torch.Tensor | None = None
        self.likeliest: torch.Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        # Set when the device has read the host's numbers.
        self._read = torch.cuda.Event() if pinned else None
        # Passes whose results nobody has taken: one, or two if the second began ahead; the numbers
        # that the last of them began with, and those that the device has now, if these are known.
        self._under_way: deque[_Result] = deque()
        self._began_with: _Numbers | None = None
        self._stands: _Numbers | None = None
        # The results of two passes that follow each other.
        self._host_tokens = [
            torch.zeros(size, dtype=torch.long, pin_memory=pinned) for _ in range(2)
        ]
        self._kept: torch.Tensor | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """The new tokens, (size,)."""
        return self.numbers[0]

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each sequence, the new one included, (size,)."""
        return self.numbers[1]

    @property
    def slots(self) -> torch.Tensor:
        """Slots, (size,)."""
        return self.numbers[2]

    def fill(self, numbers: _Numbers, tables: list[list[int]]) -> None:
        """Send a step's numbers to the device, as far as they don't stand there; rows that are left
        over are no sequence's."""
        changes = self._stands != numbers
        left = range(len(tables), self.size)
        if self._read is not None:
            self._read.synchronize()
        if changes:
            nothing = [0] * len(left)
            self._host.copy_(torch.tensor([[*row, *nothing] for row in numbers]))
            self.numbers.copy_(self._host, non_blocking=True)
        written = [self._write(row, table) for row, table in enumerate(tables)]
        written += [self._write(row, None) for row in left]
        if any(written):
            self.tables.copy_(self._host_tables, non_blocking=True)
        if self._read is not None and (changes or any(written)):
            self._read.record()
        self._stands = numbers

    def advance(self) -> None:
        """Put the likeliest tokens behind their sequences, on the device: the end of a pass."""
        assert self.likeliest is not None
        # What is no token is never used, but must not fail.
        self.numbers[0].copy_(self.likeliest.clamp(min=0))
        self.numbers[1] += self.numbers[1] > 0

    def began(self, numbers: _Numbers, tables: list[list[int]]) -> bool:
        """Whether a pass of these sequences is under way; if it is another's, nobody will ask for
        its results."""
        if not self._under_way:
            return False
        same = self._began_with == numbers and all(
            held is table and count == len(table)
            for (held, count), table in zip(self._held, tables, strict=False)
        )
        if not same:
            self.drop()
        return same

    def drop(self) -> None:
        """Give up what is under way; the device finishes it, and goes on with what comes then."""
        self._under_way.clear()
        self._began_with = self._stands = None

    def note_launch(self) -> None:
        """Take note of a pass that was just launched, and have its results sent to the host."""
        assert self.logits is not None and self.likeliest is not None
        self._began_with, self._stands = self._stands, None
        tokens = self._host_tokens[0]
        self._host_tokens.reverse()
        tokens.copy_(self.likeliest, non_blocking=True)
        done = None
        if self._read is not None:
            done = torch.cuda.Event()
            done.record()
        self._under_way.append(_Result(self.logits, tokens, done))

    def keep_logits(self) -> None:
        """Keep those of the pass under way from the next, which writes to the same place."""
        (result,) = self._under_way
        if self._kept is None:
            self._kept = torch.empty_like(result.logits)
        self._under_way[0] = result._replace(logits=self._kept.copy_(result.logits))

    def take(self, numbers: _Numbers) -> tuple[torch.Tensor, list[int]]:
        """Wait for the first pass under way, which began with `numbers`: its logits and tokens."""
        result = self._under_way.popleft()
        if result.done is not None:
            result.done.synchronize()
        _, lengths, slots = numbers
        tokens: list[int] = result.tokens[: len(lengths)].tolist()
        follow = [max(token, 0) for token in tokens], [n + 1 for n in lengths], slots
        if self._under_way:
            self._began_with = follow
        else:
            self._stands = follow
        return result.logits[: len(lengths)], tokens

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
        if table is None and self._held[row] == (None, 1):
            return False
        if pages:
            new = torch.tensor(pages, dtype=torch.int32)
            self._host_tables[row, count : count + len(pages)] = new
        # Also where there are no pages, without full layers: `began` asks whose row it is.
        self._held[row] = table, count + len(pages)
        return bool(pages)


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
        self._last: _Buffers | None = None
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(
        self,
        tokens: list[int],
        lengths: list[int],
        slots: list[int],
        tables: list[list[int]],
        ahead: bool = False,
    ) -> tuple[torch.Tensor, list[int]]:
        """Put one token of each sequence through the model.

        Args:
            tokens: the new tokens, (N).
            lengths: tokens of each sequence, the new one included.
            slots: their slots.
            tables: their pages in order; a list that was given before may only have grown.
            ahead: begin the next pass of the same sequences as well, with their likeliest tokens.
                Their pages have room for these. If the next call asks for something else, what the
                pass has stored is overwritten, which is right only where storing a token twice is
                the same as once: not in slots where strides move tokens.

        Returns:
            logits (N, vocabulary) and what `likeliest` makes of them, N tokens; the logits are
            overwritten by the next call.
        """
        with launching_on(self.cache.device):
            return self._call((tokens, lengths, slots), tables, ahead)

    def _call(
        self, numbers: _Numbers, tables: list[list[int]], ahead: bool
    ) -> tuple[torch.Tensor, list[int]]:
        number = len(tables)
        size = next(n for n in self.sizes if n >= number)
        buffers = self._buffers.get(size)
        if buffers is None:
            buffers = self._buffers[size] = _Buffers(self.cache, size)
        if self._last is not None and self._last is not buffers:
            self._last.drop()
        self._last = buffers
        try:
            if not buffers.began(numbers, tables):
                buffers.fill(numbers, tables)
                self._launch(buffers)
            if ahead:
                buffers.keep_logits()
                self._launch(buffers)
            return buffers.take(numbers)
        except BaseException:
            buffers.drop()
            # The device's tables may be older than the host's, or no sequence's.
            buffers.forget()
            raise

    def _launch(self, buffers: _Buffers) -> None:
        if not self.capture:
            self._run(buffers)
        else:
            if buffers.graph is None:
                self._record(buffers)
            assert buffers.graph is not None
            buffers.graph.replay()
        buffers.note_launch()

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
        buffers.advance()

    def _record(self, buffers: _Buffers) -> None:
        """Record one pass; kernels are compiled and chosen in two passes before it.

        They run on no sequence, since storing the same token twice changes what a slot holds where
        a stride's tokens leave the ring.
        """
        kept = [x.clone() for x in (buffers.numbers, buffers.tables)]
        buffers.lengths.zero_()
        buffers.tables.fill_(self.cache.spare_page)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(buffers)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run(buffers)
        self._pool = self._pool or graph.pool()
        buffers.graph = graph
        buffers.numbers.copy_(kept[0])
        buffers.tables.copy_(kept[1])
