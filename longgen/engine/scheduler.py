"""Who goes next: continuous batching, first come first served, under a budget of tokens a step."""

from __future__ import annotations

from collections import deque

from longgen.engine.cache import EngineCache
from longgen.engine.request import Request, State
from longgen.engine.sizes import StepSizes


class Scheduler:
    """Choose the tokens of each step, and give and take pages and slots.

    Decoding requests go first, one token each; what is left of the budget reads prompts, in the
    order in which they came. When pages run out, the request that came last gives its own up and is
    read again later: nothing that was written is lost, only time.

    Args:
        cache: whose pages and slots are handed out.
        max_batched_tokens: tokens a step, at most.
        prefill_chunk: tokens of one prompt a step, at most.
    """

    def __init__(self, cache: EngineCache, max_batched_tokens: int, prefill_chunk: int) -> None:
        self.cache = cache
        self.sizes = StepSizes(max_batched_tokens, prefill_chunk, cache.page_size)
        self.waiting: deque[Request] = deque()
        # In the order in which they came.
        self.running: list[Request] = []
        # One of these at a time, and nobody else, until each has gone through a step.
        self.suspects: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def goes_on(self, decoding: list[Request]) -> bool:
        """Whether the step after this one will be of the same requests, their likeliest tokens and
        the pages that they have, unless one ends or comes that nobody can foresee."""
        return (
            not self.waiting
            # There, storing a token again is not the same as once.
            and not self.cache.moves_tokens
            and all(
                request.row.params.takes_likeliest
                and len(request.output) + 1 < request.params.max_tokens
                and self.cache.num_pages_for(request.num_cached + 2) <= len(request.block_table)
                and request.num_cached + 2 < self.cache.max_length
                for request in decoding
            )
        )

    def schedule(self) -> list[tuple[Request, int]]:
        """Return the requests of the next step and how many tokens of each go through the model."""
        budget = self.sizes.max_batched_tokens
        chosen: dict[Request, int] = {}
        preempted = False
        self.suspects = [r for r in self.suspects if r.state is not State.FINISHED]
        if self.suspects and (alone := self._alone()) is not None:
            return [alone]
        # Those with one token left are decoding.
        for request in sorted(self.running, key=lambda r: r.num_left > 1):
            if not budget:
                break
            if request.state is not State.RUNNING:
                continue  # it gave its pages up to one before it
            length = min(request.num_left, budget, self._chunk(request))
            while not self._grow(request, length):
                last = self.running[-1]
                preempted = True
                budget += chosen.pop(last, 0)
                self._preempt(last)
                if last is request:
                    break
            if request.state is State.RUNNING:
                chosen[request] = length
                budget -= length
        while self.waiting and budget and not preempted:
            request = self.waiting[0]
            if not self.cache.slots.num_free or not self._has_room(request):
                break
            length = self._admit(request, budget)
            chosen[request] = length
            budget -= length
        return list(chosen.items())

    def _admit(self, request: Request, budget: int) -> int:
        """Let the first that waits in, with a slot and the pages of its first tokens."""
        self.waiting.remove(request)
        (request.slot,) = self.cache.slots.take(1)
        request.state = State.RUNNING
        self.running.append(request)
        length = min(request.num_left, budget, self.sizes.prefill_chunk)
        self._grow(request, length)
        return length

    def note(self, batch: list[tuple[Request, int]]) -> None:
        """Take note of a step that went well."""
        self.sizes.note([length for _, length in batch])
        done = {request for request, _ in batch}
        for request in done:
            request.failed_alone = False
        self.suspects = [request for request in self.suspects if request not in done]

    def _alone(self) -> tuple[Request, int] | None:
        """Return the next suspect and its tokens, None if it cannot be let in yet."""
        request = self.suspects[0]
        if request.state is State.WAITING:
            if not self.cache.slots.num_free or not self._has_room(request):
                return None
            return request, self._admit(request, self.sizes.prefill_chunk)
        length = min(request.num_left, self._chunk(request))
        return (request, length) if self._grow(request, length) else None

    def _chunk(self, request: Request) -> int:
        return self.sizes.prefill_chunk if request.num_left > 1 else 1

    def _has_room(self, request: Request) -> bool:
        """Whether the pages of all its tokens, and of the next, are free: a request that is let in
        is read to its end unless earlier ones grow into its pages."""
        length = min(request.num_tokens + 1, self.cache.max_length)
        return self.cache.num_pages_for(length) <= self.cache.pages.num_free

    def _grow(self, request: Request, length: int) -> bool:
        """Take the pages that `length` more tokens need, or none if they aren't all there."""
        needed = self.cache.num_pages_for(request.num_cached + length) - len(request.block_table)
        if needed > self.cache.pages.num_free:
            return False
        request.block_table += self.cache.pages.take(max(needed, 0))
        return True

    def _preempt(self, request: Request) -> None:
        self.release(request)
        request.state = State.WAITING
        request.num_preempted += 1
        # It came before all that wait.
        self.waiting.appendleft(request)

    def recompute(self, request: Request) -> None:
        """Have a running request read again from its start: its cache is not to be trusted."""
        # Among those that wait it goes where its turn was.
        self._preempt(request)

    def release(self, request: Request) -> None:
        """Take a running request's pages and slot back."""
        self.running.remove(request)
        self.cache.pages.give_back(request.block_table)
        if request.slot is not None:
            if not request.is_sound:
                self.cache.clear_slot(request.slot)
            self.cache.slots.give_back([request.slot])
        request.is_sound = False
        request.slot, request.block_table, request.num_cached = None, [], 0

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is."""
        if request.state is State.RUNNING:
            self.release(request)
        elif request.state is State.WAITING:
            self.waiting.remove(request)
        request.state = State.FINISHED
