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
    "window": Training(WINDOW, (4, 2), packed=True, recompute="full"),
    "window-kept": Training(WINDOW, (4, 2), packed=True, recompute="selective"),
    "products-kept": Training(WINDOW, (4, 2), packed=True, recompute="elementwise"),
    "strided": Training(STRIDED, (4, 4), packed=False),
    "one-kv-head": Training(STRIDED, (4, 1), packed=True, recompute="full"),
    "one-kv-head-kept": Training(STRIDED, (4, 1), packed=True, recompute="selective", offload=True),
    "three-heads": Training(STRIDED, (3, 3), packed=True),
    "tied": Training(WINDOW, (4, 2), packed=True, recompute="full", offload=True, tied=True),
}
# Processes -> the runs, the sizes of the groups that share a sequence, and who holds the model.
SHARED = {
    2: (
        ("window", 1, "ddp"),
        ("window-kept", 2, "ddp"),
        ("strided", 2, "ddp"),
        ("three-heads", 2, "ddp"),
        ("window-kept", 1, "fsdp"),
        ("products-kept", 1, "ddp"),
        ("products-kept", 2, "fsdp"),
        ("strided", 2, "fsdp"),
        ("one-kv-head-kept", 2, "fsdp"),
        ("tied", 2, "fsdp"),
    ),
    4: (
        ("window", 4, "ddp"),
        ("one-kv-head", 4, "ddp"),
        ("three-heads", 4, "ddp"),
        ("strided", 2, "ddp"),
        ("one-kv-head-kept", 4, "fsdp"),
        ("window", 2, "fsdp"),
        ("tied", 1, "fsdp"),
    ),
    8: (("one-kv-head", 4, "ddp"), ("window-kept", 4, "fsdp")),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """Return every run as one process does it."""
    return {name: train(run, Processes()) for name, run in RUNS.items()}


@pytest.fixture(scope="module", params=SHARED)
def shared(request: pytest.FixtureRequest) -> list[tuple[tuple[str, int, str], list[Any]]]:
    """Return for one number of processes every run and what each process got."""
    runs = SHARED[request.param]
    jobs = [(RUNS[name], size, sharding) for name, size, sharding in runs]
    results = run_processes(request.param, train_all, jobs)
    return list(zip(runs, map(list, zip(*results, strict=True)), strict=True))


def test_losses_and_weights_equal_those_of_one_process(
    alone: dict[str, dict[str, Any]], shared: list[tuple[tuple[str, int, str], list[Any]]]
) -> None:
    for run, ranks in shared:
        expected, found = alone[run[0]], ranks[0]
        for step, (one, other) in enumerate(zip(expected["logged"], found["logged"], strict=True)):
            assert other[0] == pytest.approx(one[0], rel=1e-6), (run, step)
            # The norm sums up gradients, whose own errors are relative to their greatest terms.
            assert other[1] == pytest.approx(one[1], rel=1e-5), (run, step)
        before = make_model(RUNS[run[0]]).state_dict()
        for key, weight in expected["weights"].items():
            largest = np.abs(weight).max()
            assert np.abs(weight - before[key].numpy()).max() > 1e-3 * largest, key
            error = np.abs(found["weights"][key] - weight).max()
            assert error < 1e-6 * largest, (run, key, error / largest)


def test_processes_end_with_the_same_weights_and_counts(
    alone: dict[str, dict[str, Any]], shared: list[tuple[tuple[str, int, str], list[Any]]]
) -> None:
    for (name, *_), ranks in shared:
        for rank in ranks:
            assert rank["logged"] == ranks[0]["logged"]
            assert rank["tokens"] == STEPS * SEQUENCES * CONTEXT
            assert rank["flops"] == pytest.approx(alone[name]["flops"], rel=1e-12)
            for key, weight in rank["weights"].items():
                assert np.array_equal(weight, ranks[0]["weights"][key]), key


@pytest.mark.parametrize(
    ("name", "runs"), [("window", 2), ("window-kept", 1), ("tied", 2), ("one-kv-head-kept", 1)]
)
def test_attention_runs_again_only_where_its_outputs_are_not_kept(
    alone: dict[str, dict[str, Any]], name: str, runs: int
) -> None:
    forward, backward = alone[name]["calls"]
    assert backward >= STEPS * SEQUENCES * 3
    assert forward == runs * backward


def test_attention_runs_once_where_sequences_and_model_are_shared(
    shared: list[tuple[tuple[str, int, str], list[Any]]],
) -> None:
    for (name, *_), ranks in shared:
        for forward, backward in (rank["calls"] for rank in ranks):
            assert forward == backward * (2 if RUNS[name].recompute == "full" else 1)
