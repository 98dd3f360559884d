"""Attention spread over processes equals the whole, and sends what it says it sends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from longgen.layout import Axis, Run, contiguous, packed
from longgen.pattern import SparsePattern
from tests.parallel.work import Case, compare
from tests.processes import run_processes

WINDOW = SparsePattern(block_size=16, sink_blocks=1, local_blocks=3)
STRIDED = SparsePattern.block_sparse(block_size=8, stride_blocks=5, local_blocks=2, head_shift=2)
TOTAL = 240
ONE = (contiguous(TOTAL),)
CROSSING = (packed([0, 50, 55, 200, TOTAL]),)
ALIGNED = (packed([0, 60, 120, 180, TOTAL]),)
# Rows that begin in the middle of a document: what came before is nowhere.
LATE = ((Run(0, 100, 150), Run(1, 7, 90)),)
MIXED = (packed([0, 50, 55, 200, TOTAL]), contiguous(TOTAL), packed([0, 119, 121, TOTAL]))


def random_cases(count: int) -> list[Case]:
    """Draw patterns, packings and heads; those of seed 0 are the same in every run."""
    rng = np.random.default_rng(0)
    cases = []
    for seed in range(count):
        stride = int(rng.choice([0, 0, 1, 2, 3, 5]))
        pattern = SparsePattern(
            block_size=int(rng.choice([1, 3, 16, 64])),
            sink_blocks=int(rng.integers(0, 3)),
            local_blocks=int(rng.choice([1, 1, 2, 5])),
            stride_blocks=stride,
            head_shift=int(rng.integers(0, 9)) if stride else 0,
        )
        size = int(rng.choice([2, 3, 4]))
        total = size * int(rng.integers(1, 70))

        def row(total: int = total) -> Axis:
            borders = rng.integers(0, total + 1, int(rng.integers(0, 5))).tolist()
            return packed([0, *sorted(borders), total])

        kv_heads = int(rng.choice([1, 2, 3]))
        heads = (kv_heads * int(rng.choice([1, 2])), kv_heads, 4)
        rows = tuple(row() for _ in range(int(rng.choice([1, 1, 2]))))
        cases.append(Case(pattern, rows, heads, size, "ranges", seed))
    return cases


CASES = {
    **{
        f"{name}-{size}-{by}": Case(pattern, rows, heads, size, by)
        for name, pattern, rows, heads, sizes, by in (
            ("window", WINDOW, ONE, (4, 2, 8), (1, 2, 3, 4), "ranges"),
            ("window-packed", WINDOW, CROSSING, (4, 2, 8), (2, 3, 4), "ranges"),
            ("window-aligned", WINDOW, ALIGNED, (4, 2, 8), (2, 4), "ranges"),
            ("strided", STRIDED, ONE, (4, 4, 8), (1, 2, 3, 4), "ranges"),
            ("strided-packed", STRIDED, CROSSING, (6, 3, 8), (2, 3, 4), "ranges"),
            ("window-late", WINDOW, LATE, (4, 2, 8), (2, 4), "ranges"),
            ("strided-late", STRIDED, LATE, (3, 3, 8), (3,), "ranges"),
            ("full-late", SparsePattern.full(), LATE, (4, 2, 8), (2,), "heads"),
            ("strided-rows", STRIDED, MIXED, (4, 2, 8), (2, 4), "ranges"),
            ("full", SparsePattern.full(), ONE, (3, 1, 8), (2, 3, 4), "ranges"),
            ("full-rows", SparsePattern.full(), MIXED, (5, 5, 8), (2, 4), "ranges"),
            ("full", SparsePattern.full(), ONE, (4, 4, 8), (1, 2, 4), "heads"),
            ("full-one-kv", SparsePattern.full(), MIXED, (12, 1, 8), (2, 3, 4), "heads"),
            ("full-two-kv", SparsePattern.full(), CROSSING, (4, 2, 8), (2, 4), "heads"),
            # No layer goes this way by itself, but heads are told apart only under such a pattern.
            ("strided", STRIDED, MIXED, (8, 4, 8), (2, 4), "heads"),
            ("strided-two-kv", STRIDED, MIXED, (8, 2, 8), (2, 4), "heads"),
        )
        for size in sizes
    },
    **{f"random-{case.seed}": case for case in random_cases(60)},
}


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    """Run all cases in one group of four processes; return by case what each rank found."""
    found = [iter(answers) for answers in run_processes(4, compare, list(CASES.values()))]
    return {name: [next(found[r]) for r in range(case.size)] for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_those_of_one_process(
    results: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for rank, found in enumerate(results[name]):
        # Sums of at most some hundred terms in fp64, in another order.
        assert found["error"] < 1e-13, (rank, found)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_sends_the_bytes_that_were_planned(
    results: dict[str, list[dict[str, Any]]], name: str
) -> None:
    ranks = results[name]
    assert [found["sent"] for found in ranks] == [found["planned"] for found in ranks]
    # Gradients go back the way that keys and values came.
    total = sum(found["sent"] for found in ranks)
    assert total == sum(found["sent_back"] for found in ranks)
    if not name.startswith("random"):
        # Documents that end with the shards have nothing to fetch.
        assert (total == 0) == (CASES[name].size == 1 or "aligned" in name)
