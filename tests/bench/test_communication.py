"""Communication among a step's kernels, counted."""

from __future__ import annotations

import pytest

from longgen.bench.communication import communication_of

GATHER, SEND = "ncclDevKernel_AllGather_RING_LL(args)", "ncclDevKernel_SendRecv"


@pytest.mark.parametrize(
    ("kernels", "seconds", "exposed"),
    [
        ([], 0, 0),
        ([("gemm", 0, 5)], 0, 0),
        ([(GATHER, 0, 5)], 5, 5),
        # Hidden, hidden at its end alone, seen between two others.
        ([("gemm", 0, 5), (GATHER, 1, 4)], 3, 0),
        ([(GATHER, 0, 3), ("gemm", 2, 6)], 3, 2),
        ([("a", 0, 2), ("b", 4, 6), (SEND, 1, 5)], 4, 2),
        # Two at a time are one, and what began first may end last.
        ([(SEND, 0, 10), (GATHER, 2, 3), ("a", 1, 4)], 10, 7),
        ([(SEND, 6, 8), (GATHER, 0, 3), ("a", 7, 9), ("b", 8, 12)], 5, 4),
        # The profiler's own entries have no length.
        ([("Context Sync", 1, 1), (SEND, 0, 2)], 2, 2),
    ],
)
def test_what_nothing_hides(
    kernels: list[tuple[str, float, float]], seconds: float, exposed: float
) -> None:
    for order in (kernels, kernels[::-1]):
        found = communication_of(order)
        assert found.seconds == pytest.approx(seconds)
        assert found.exposed_seconds == pytest.approx(exposed)


def test_kinds_of_kernels_are_told_apart() -> None:
    found = communication_of(
        [
            (GATHER, 0, 4),
            ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(args)", 3, 6),
            (SEND, 7, 8),
            (SEND, 7.5, 9),
            ("ncclKernel_AllReduce", 10, 11),
            ("nccl:_all_gather_base", 20, 21),
            ("gemm", 2, 5),
        ]
    )
    assert found.kinds == {
        "AllGather": (4, 2),
        "AllReduce": (1, 1),
        "ReduceScatter": (3, 1),
        "SendRecv": (2, 2),
        "other": (1, 1),
    }
    # What two kinds do at a time counts once in all.
    assert (found.seconds, found.exposed_seconds) == (10, 7)
