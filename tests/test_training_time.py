"""How long training takes, against counting by hand and runs that were measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longgen.accounting import training_flops
from longgen.errors import UsageError
from longgen.gpus import Gpu, GpuGroup, parse_gpus
from longgen.layout import contiguous
from longgen.parallel import ContextGroup
from longgen.parallel.attend import sent_bytes
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import SHAPES
from longgen.training_setup import CHECKPOINTING, TrainingSetup
from longgen.training_time import TrainingTime, messages, training_time, work_seconds

LLAMA = SHAPES["llama-2-7b"]
PAPER = LayerPlan.build(32, "middle:12", SparsePattern.attention_sink())
WHOLE = LayerPlan.build(32, "all")
SLICE = replace(LLAMA, num_hidden_layers=8)
LENGTH = 131072
H200 = parse_gpus("H200").gpu


def seconds(plan: LayerPlan, **how: Any) -> float:
    setup = TrainingSetup(**how)
    flops, bandwidth = H200.flops or 0.0, H200.bandwidth or 0.0
    work = work_seconds(SLICE, plan, LENGTH, flops, bandwidth, setup, is_hopper=True)
    return sum(work.values())


def step(plan: LayerPlan = PAPER, sequences: int = 32, **how: Any) -> TrainingTime:
    setup = TrainingSetup(**{"gpus": 8, "context_parallel": 8, **how})
    found = training_time(LLAMA, plan, LENGTH, GpuGroup(setup.gpus, H200), setup, sequences)
    assert found is not None
    return found


def test_a_slice_takes_about_what_separate_operations_took_on_an_h200() -> None:
    """8 layers, forward and backward, checkpointed, with FlashAttention-4 and norms and MLPs in
    separate operations: 11.33 s all full, 6.55 s with 3 full. Compiled they should take less."""
    whole, hybrid = LayerPlan.build(8, "all"), LayerPlan.build(8, "middle:3", PAPER.pattern)
    assert 0.85 * 11.33 < seconds(whole) < 11.33
    assert 0.85 * 6.55 < seconds(hybrid) < 6.55


def test_what_is_computed_again_takes_time() -> None:
    times = [seconds(WHOLE, checkpointing=name) for name in CHECKPOINTING]
    assert times == sorted(times) and len(set(times)) == len(CHECKPOINTING)


def test_the_flops_of_a_step_are_those_of_the_accounting() -> None:
    found = step()
    assert found.flops == 32 * training_flops(LLAMA, PAPER, LENGTH)
    assert found.tokens == 32 * LENGTH
    assert found.mfu == pytest.approx(found.flops / (found.seconds * 8 * (H200.flops or 0)))
    assert 0.3 < found.mfu < 0.7
    hours = found.gpu_hours(5 * 10**9)
    assert hours == pytest.approx(5e9 / found.tokens_per_second * 8 / 3600)


def test_full_layers_cost_more_and_more_gpus_no_more_hours() -> None:
    tokens = 5 * 10**9
    assert step(WHOLE).gpu_hours(tokens) > 1.5 * step().gpu_hours(tokens)
    four = step(gpus=4, context_parallel=4).gpu_hours(tokens)
    assert step().gpu_hours(tokens) == pytest.approx(four, rel=0.05)


def test_messages_are_those_that_ranks_send() -> None:
    setup = TrainingSetup(gpus=8, context_parallel=4, checkpointing="off")
    sent = messages(LLAMA, PAPER, LENGTH, setup, passes=3)
    by_layer = [
        max(
            sent_bytes(
                PAPER.pattern_of(layer),
                (contiguous(LENGTH),),
                ContextGroup(rank, 4),
                num_heads=32,
                num_key_value_heads=32,
                head_dim=128,
            )
            for rank in range(4)
        )
        for layer in (0, 10)
    ]
    # Forward and backward, three times.
    assert sent.context == 6 * (20 * by_layer[0] + 12 * by_layer[1])
    assert sent.sharding == int(LLAMA.num_parameters * 3 * 8 * 7 / 8)
    again = messages(LLAMA, PAPER, LENGTH, replace(setup, checkpointing="full"), passes=3)
    assert again.context == sent.context * 3 // 2
    copies = messages(LLAMA, PAPER, LENGTH, replace(setup, sharding="ddp"), passes=3)
    assert copies.sharding == int(LLAMA.num_parameters * 8 * 7 / 8)
    alone = messages(LLAMA, PAPER, LENGTH, TrainingSetup(), passes=3)
    assert (alone.context, alone.sharding) == (0, 0)


def test_a_card_that_is_not_known_has_no_estimate() -> None:
    cards = GpuGroup(1, Gpu(name="Own Card", memory_bytes=1))
    assert training_time(LLAMA, PAPER, LENGTH, cards, TrainingSetup(), 1) is None


def test_sequences_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(UsageError, match="3 sequences, which 2 groups of GPUs with 1 at a time"):
        step(sequences=3, context_parallel=4)
