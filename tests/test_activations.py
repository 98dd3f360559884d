"""What a layer keeps, against what autograd's hooks count."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from longgen.activations import layer_activations
from longgen.parallel import collectives, ranges
from longgen.parallel.group import ContextGroup
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.training_setup import TrainingSetup
from tests.weighing import (
    AUTOCAST,
    PLAIN,
    SHARDED,
    SMALL,
    TOKENS,
    build,
    ids,
    kept_bytes,
    loss,
    partitioned_as_compiled,
    stand_in,
)

PATTERN = SparsePattern(block_size=16, sink_blocks=1, local_blocks=2)


@pytest.fixture(autouse=True)
def no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.mark.parametrize("compile", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("setup", [AUTOCAST, SHARDED, PLAIN], ids=["autocast", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("family", "kv_heads"), [("llama", 2), ("llama", 4), ("qwen2", 1), ("qwen3", 2)]
)
def test_a_layer_keeps_what_autograd_keeps(
    family: str, kv_heads: int, setup: TrainingSetup, compile: bool
) -> None:
    setup = replace(setup, compile=compile)
    shape = replace(SMALL, model_type=family, num_key_value_heads=kv_heads)
    kept = []
    with partitioned_as_compiled() if compile else nullcontext():
        for layers in (1, 3):
            deep = replace(shape, num_hidden_layers=layers)
            plan = LayerPlan.build(layers, "middle:1", PATTERN)
            model = build(deep, replace(setup, checkpointing="off"), plan)
            kept.append(
                kept_bytes(model, lambda m=model: loss(m, ids(), autocast=setup.casts_weights))
            )
    weighed = (kept[1] - kept[0]) // 2
    planned = layer_activations(shape, TOKENS, setup)
    assert planned.total == pytest.approx(weighed, rel=0.01)


def test_checkpointing_keeps_what_goes_into_a_layer() -> None:
    kept = []
    for layers in (1, 3):
        deep = replace(SMALL, num_hidden_layers=layers)
        plan = LayerPlan.build(layers, "middle:1", PATTERN)
        model = build(deep, replace(AUTOCAST, compile=False), plan)
        kept.append(kept_bytes(model, lambda m=model: loss(m, ids(), autocast=True)))
    weighed = (kept[1] - kept[0]) / 2
    activations = layer_activations(SMALL, TOKENS, AUTOCAST)
    assert activations.kept("full") == 2 * 64 * TOKENS
    # Autograd also keeps the generator's state, some KB on a CPU.
    assert activations.kept("full") == pytest.approx(weighed, rel=0.05)
    assert activations.kept("selective") - activations.kept("full") == activations.attended


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "pattern",
    [
        SparsePattern.full(),
        PATTERN,
        SparsePattern(block_size=16, local_blocks=2, stride_blocks=4, head_shift=1),
    ],
    ids=str,
)
def test_shards_of_a_sequence_keep_what_they_exchange(
    pattern: SparsePattern, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of four ranks, alone: what others would send is made up."""

    def alone(rows: torch.Tensor, send: Any, receive: Any, group: Any) -> Any:
        received = rows.new_zeros(sum(receive), *rows.shape[1:])
        return lambda: received

    for module in (collectives, ranges):
        monkeypatch.setattr(module, "begin_all_to_all", alone)
    shape = replace(SMALL, num_key_value_heads=kv_heads)
    setup = TrainingSetup(gpus=4, context_parallel=4, checkpointing="off", compile=False)
    kept = []
    for layers in (1, 3):
        plan = LayerPlan("S" * layers, pattern)
        if pattern.is_full:
            plan = LayerPlan("F" * layers, PATTERN)
        model = build(replace(shape, num_hidden_layers=layers), setup, plan)
        model.set_context_parallel(ContextGroup(3, 4))
        kept.append(kept_bytes(model, lambda m=model: loss(m, ids(TOKENS // 4), autocast=False)))
    weighed = (kept[1] - kept[0]) // 2
    planned = layer_activations(shape, TOKENS, setup, pattern)
    assert planned.total == pytest.approx(weighed, rel=0.02)
    whole = layer_activations(shape, TOKENS, replace(setup, context_parallel=1)).total
    assert planned.total > whole // 4
