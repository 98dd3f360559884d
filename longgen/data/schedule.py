"""Which source of a mixture each sequence comes from: exact proportions in every prefix."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from longgen.errors import UsageError

# Weights are kept to a millionth: so many sequences later the order begins anew.
_LONGEST_PERIOD = 1_000_000
_BLOCK = 4096


class Schedule:
    """Deal sequences out to sources by weight, each a pure function of (weights, index).

    Of the first n sequences, source j gets n * weight_j, rounded up or down, for every n and j:
    the order is Tijdeman's (the chairman assignment problem, 1980). At every step the source is
    taken that would first fall behind its share; of those that may be, as none may run ahead.

    Attributes:
        weights: the shares in whole numbers without a common factor, adding up to the period.
        period: after so many sequences the order begins anew.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Make the schedule of some weights, in any unit.

        Raises:
            UsageError: there are none, or one is not a number above 0.
        """
        if not weights:
            raise UsageError("A mixture needs at least one source.")
        for weight in weights:
            if not 0 < weight < float("inf"):
                raise UsageError(f"A weight is {weight}; give a number above 0.")
        # As they are written: 0.3 is three tenths, not the binary number next to it.
        exact = [Fraction(str(weight)) for weight in weights]
        self.weights = _whole(exact)
        self.period = sum(self.weights)
        self._sources = np.empty(0, dtype=np.int32)
        self._numbers = np.empty(0, dtype=np.int64)
        self._counts = [0] * len(weights)

    def place(self, index: int) -> tuple[int, int]:
        """Return the source of sequence `index`, and how many came from it before."""
        cycle, at = divmod(index, self.period)
        self._extend(at + 1)
        source = int(self._sources[at])
        return source, cycle * self.weights[source] + int(self._numbers[at])

    def counts(self, num: int) -> list[int]:
        """Return how many of the first `num` sequences come from each source."""
        cycles, rest = divmod(num, self.period)
        self._extend(rest)
        part = np.bincount(self._sources[:rest], minlength=len(self.weights)).tolist()
        return [cycles * weight + count for weight, count in zip(self.weights, part, strict=True)]

    def _extend(self, length: int) -> None:
        """Know the first `length` places of the period."""
        have = len(self._sources)
        if have >= length:
            return
        end = min(max(-(-length // _BLOCK) * _BLOCK, 2 * have), self.period)
        width = max(2 * len(self.weights) - 2, 1)
        weights, counts, period = self.weights, self._counts, self.period
        sources = np.empty(end - have, dtype=np.int32)
        numbers = np.empty(end - have, dtype=np.int64)
        everyone = range(len(weights))
        for at in range(have, end):
            # By how much each would be behind its share without this sequence, times the period.
            behind = [(at + 1) * weights[j] - period * counts[j] for j in everyone]
            _, source = min(
                (((width - 1) * period - width * behind[j]) / weights[j], j)
                for j in everyone
                if width * behind[j] >= period
            )
            sources[at - have], numbers[at - have] = source, counts[source]
            counts[source] += 1
        self._sources = np.concatenate([self._sources, sources])
        self._numbers = np.concatenate([self._numbers, numbers])


def _whole(weights: list[Fraction]) -> list[int]:
    """Return weights as whole numbers without a common factor; a very long period is rounded."""
    factor = lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * factor) for weight in weights]
    if sum(numbers) // gcd(*numbers) > _LONGEST_PERIOD:
        total = sum(weights)
        exact = [weight / total * _LONGEST_PERIOD for weight in weights]
        numbers = [max(int(one), 1) for one in exact]
        # The largest remainders get what is left, so that the sum is the period.
        order = sorted(range(len(exact)), key=lambda j: int(exact[j]) - exact[j])
        for j in order[: max(_LONGEST_PERIOD - sum(numbers), 0)]:
            numbers[j] += 1
    factor = gcd(*numbers)
    return [number // factor for number in numbers]
