"""How many tokens a step may hold: what was asked for, less while memory is short."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

# Steps as large as is allowed that have to go well before larger ones are tried.
PATIENCE = 64


class StepSizes:
    """Hold the most tokens of a step, and of one prompt in it.

    Where memory runs out both get smaller, and after `PATIENCE` steps that used what they were
    allowed they grow again. Each time that was too early the next wait is twice as long, so that
    what is read again after every failure comes to an end.

    Attributes:
        max_batched_tokens: tokens a step, at most, at present.
        prefill_chunk: tokens of one prompt a step, at most, at present.
        smallest: tokens of a prompt that are not made fewer.
    """

    def __init__(self, max_batched_tokens: int, prefill_chunk: int, smallest: int) -> None:
        self.smallest = smallest
        self.set(max_batched_tokens, prefill_chunk)

    def set(self, max_batched_tokens: int, prefill_chunk: int) -> None:
        """Ask for other numbers."""
        self._asked = max_batched_tokens, prefill_chunk
        self._patience, self._has_grown = PATIENCE, False
        self.restore()

    @property
    def is_reduced(self) -> bool:
        """Whether steps are smaller than was asked for."""
        return (self.max_batched_tokens, self.prefill_chunk) != self._asked

    def restore(self) -> None:
        """Allow again what was asked for: not the size of steps was at fault."""
        self.max_batched_tokens, self.prefill_chunk = self._asked
        self._num_good = 0

    def shrink(self, lengths: list[int]) -> None:
        """Make steps smaller than the one of these pieces, whose memory ran out."""
        if self._has_grown:
            self._patience *= 2
        self._has_grown, self._num_good = False, 0
        self.max_batched_tokens = min(self.max_batched_tokens, max(sum(lengths) // 2, 1))
        longest = max(lengths)
        if longest > self.smallest:
            self.prefill_chunk = max(longest // 2, self.smallest)
        logger.warning(
            "Out of memory with %d tokens in a step; going on with %d, %d of one prompt.",
            sum(lengths),
            self.max_batched_tokens,
            self.prefill_chunk,
        )

    def note(self, lengths: list[int]) -> None:
        """Take note of a step of these pieces that went well."""
        is_largest = sum(lengths) >= self.max_batched_tokens or max(lengths) >= self.prefill_chunk
        self._num_good += is_largest
        if self._num_good < self._patience:
            return
        if not self.is_reduced:
            self._patience, self._has_grown = PATIENCE, False
            return
        tokens, chunk = self._asked
        self.max_batched_tokens = min(2 * self.max_batched_tokens, tokens)
        self.prefill_chunk = min(2 * self.prefill_chunk, chunk)
        self._num_good, self._has_grown = 0, True
        logger.info(
            "Trying %d tokens in a step again, %d of one prompt.",
            self.max_batched_tokens,
            self.prefill_chunk,
        )
