"""Training shared out over processes: the same losses and weights as alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from longgen.pattern import SparsePattern
from tests.processes import run_processes
from tests.train.work import (
    CONTEXT,
    SEQUENCES,
    STEPS,
    Processes,
    Training,
    make_model,
    train,
    train_all,
)

WINDOW = SparsePattern(block_size=8, sink_blocks=1, local_blocks=2)
STRIDED = SparsePattern.block_sparse(block_size=4, stride_blocks=5, local_blocks=2, head_shift=2)
RUNS = {
    "window": Training(WINDOW, (4, 2), packed=True, checkpointing=True),
    "strided": Training(STRIDED, (4, 4), packed=False, checkpointing=False),
    "one-kv-head": Training(STRIDED, (4, 1), packed=True, checkpointing=True),
    "three-heads": Training(STRIDED, (3, 3), packed=True, checkpointing=False),
}
# Processes -> the runs and the sizes of the groups that share a sequence.
SHARED = {
    2: (("window", 1), ("window", 2), ("strided", 2), ("three-heads", 2)),
    4: (("window", 4), ("one-kv-head", 4), ("three-heads", 4), ("strided", 2)),
    8: (("one-kv-head", 4),),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """Return every run as one process does it."""
    return {name: train(run, Processes()) for name, run in RUNS.items()}


@pytest.fixture(scope="module", params=SHARED)
def shared(request: pytest.FixtureRequest) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """Return for one number of processes every run, its groups' size and what each process got."""
    runs = SHARED[request.param]
    results = run_processes(request.param, train_all, [(RUNS[name], size) for name, size in runs])
    return [
        (*run, list(ranks)) for run, ranks in zip(runs, zip(*results, strict=True), strict=True)
    ]


def test_losses_and_weights_equal_those_of_one_process(
    alone: dict[str, dict[str, Any]], shared: list[tuple[str, int, list[dict[str, Any]]]]
) -> None:
    for name, size, ranks in shared:
        expected, found = alone[name], ranks[0]
        for step, (one, other) in enumerate(zip(expected["logged"], found["logged"], strict=True)):
            assert other[0] == pytest.approx(one[0], rel=1e-6), (name, size, step)
            # The norm sums up gradients, whose own errors are relative to their greatest terms.
            assert other[1] == pytest.approx(one[1], rel=1e-5), (name, size, step)
        before = make_model(RUNS[name]).state_dict()
        for key, weight in expected["weights"].items():
            largest = np.abs(weight).max()
            assert np.abs(weight - before[key].numpy()).max() > 1e-3 * largest, key
            error = np.abs(found["weights"][key] - weight).max()
            assert error < 1e-6 * largest, (name, size, key, error / largest)


def test_processes_end_with_the_same_weights_and_counts(
    alone: dict[str, dict[str, Any]], shared: list[tuple[str, int, list[dict[str, Any]]]]
) -> None:
    for name, _, ranks in shared:
        for rank in ranks:
            assert rank["logged"] == ranks[0]["logged"]
            assert rank["tokens"] == STEPS * SEQUENCES * CONTEXT
            assert rank["flops"] == pytest.approx(alone[name]["flops"], rel=1e-12)
            for key, weight in rank["weights"].items():
                assert np.array_equal(weight, ranks[0]["weights"][key]), key
