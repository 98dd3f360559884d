"""Schedules: every prefix has its proportions, and any place is known without the ones before."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longgen.data.schedule import Schedule
from longgen.errors import UsageError

decimals = st.integers(1, 1000).map(lambda n: n / 1000)
weights = st.lists(st.one_of(decimals, st.integers(1, 9), st.floats(1e-3, 1e3)), min_size=1)


@settings(deadline=None)
@given(weights.filter(lambda w: len(w) <= 12), st.integers(1, 1500))
def test_every_prefix_is_within_one_sequence_of_its_share(given: list[float], num: int) -> None:
    schedule = Schedule(given)
    counts = [0] * len(given)
    bound = 1 - 1 / max(2 * len(given) - 2, 1) if len(given) > 1 else 0
    for index in range(num):
        source, number = schedule.place(index)
        assert number == counts[source]
        counts[source] += 1
        for weight, count in zip(schedule.weights, counts, strict=True):
            share = (index + 1) * weight / schedule.period
            assert abs(count - share) <= bound + 1e-9
    assert schedule.counts(num) == counts


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.lists(st.integers(0, 5000)))
def test_places_do_not_depend_on_what_was_asked_before(given: list[int], asked: list[int]) -> None:
    one, other = Schedule(given), Schedule(given)
    whole = [one.place(index) for index in range(max(asked, default=0) + 1)]
    for index in asked:
        assert other.place(index) == whole[index]


def test_weights_are_what_is_written() -> None:
    assert Schedule([0.3, 0.3, 0.1, 0.3]).weights == [3, 3, 1, 3]
    assert Schedule([60, 40]).weights == [3, 2]
    assert Schedule([5.0]).weights == [1]
    assert Schedule([1 / 3, 0.5]).weights == [2, 3]  # rounded, as no period would be this long
    long = Schedule([0.123456789, 1.0])
    assert abs(long.weights[0] / long.period - 0.123456789 / 1.123456789) < 1e-6
    assert Schedule([1e-12, 1.0]).weights[0] == 1
    far = Schedule([2, 1])
    source, number = far.place(10**12 % 3)
    assert far.place(10**12) == (source, number + far.weights[source] * (10**12 // 3))


@pytest.mark.parametrize("bad", [[0.0], [1, -1], [float("inf")], [float("nan")], []])
def test_other_weights_are_refused(bad: list[float]) -> None:
    with pytest.raises(UsageError, match=r"number above 0|at least one source"):
        Schedule(bad)
