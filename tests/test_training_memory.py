"""What training keeps and takes, against autograd's hooks, the profiler and a measured run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longgen import training_memory as planning
from longgen.accounting import RESERVE
from longgen.bench.models import planned_config, random_model, shape_config
from longgen.errors import UsageError
from longgen.hf import attention as hf_attention
from longgen.hf import head
from longgen.parallel import attend as parallel_attend
from longgen.parallel import collectives, ranges
from longgen.parallel.group import ContextGroup
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import SHAPES, ModelShape
from longgen.train.extend import compile_elementwise
from longgen.training_memory import TrainingSetup, layer_activations, training_memory
from tests import weighing

CPU = torch.device("cpu")
CONTEXT = 131072
LLAMA = SHAPES["llama-2-7b"]
PAPER = LayerPlan.build(32, "middle:12", SparsePattern.attention_sink())
PATTERN = SparsePattern(block_size=16, sink_blocks=1, local_blocks=2)
TOKENS = 1024
SMALL = ModelShape(
    model_type="llama",
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    max_position_embeddings=TOKENS,
)
# How a process computes on one GPU, under FSDP2, and on a CPU.
AUTOCAST = TrainingSetup(is_bf16=True)
SHARDED = TrainingSetup(is_bf16=True, gpus=2)
PLAIN = TrainingSetup(is_bf16=False)


@pytest.fixture(autouse=True)
def flash_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_attention, "attention", weighing.flash_like)
    monkeypatch.setattr(parallel_attend, "attention", weighing.flash_like)


def build(shape: ModelShape, setup: TrainingSetup) -> Any:
    plan = LayerPlan.build(shape.num_hidden_layers, "middle:1", PATTERN)
    config = planned_config(shape_config(shape, TOKENS), plan)
    dtype = torch.bfloat16 if setup.is_sharded else torch.float32
    model = random_model(config, dtype=dtype, device=CPU, seed=0).train()
    if setup.checkpointing == "full":
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if setup.compile:
        compile_elementwise(model)
    return model


def ids(length: int = TOKENS) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, (1, length), generator=torch.manual_seed(0))


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
    with weighing.partitioned_as_compiled() if compile else nullcontext():
        for layers in (1, 3):
            model = build(
                replace(shape, num_hidden_layers=layers), replace(setup, checkpointing="off")
            )
            kept.append(
                weighing.kept_bytes(
                    model, lambda m=model: weighing.loss(m, ids(), autocast=setup.casts_weights)
                )
            )
    weighed = (kept[1] - kept[0]) // 2
    planned = layer_activations(shape, TOKENS, setup)
    assert planned.total == pytest.approx(weighed, rel=0.01)


def test_checkpointing_keeps_what_goes_into_a_layer() -> None:
    kept = []
    for layers in (1, 3):
        model = build(replace(SMALL, num_hidden_layers=layers), replace(AUTOCAST, compile=False))
        kept.append(
            weighing.kept_bytes(model, lambda m=model: weighing.loss(m, ids(), autocast=True))
        )
    weighed = (kept[1] - kept[0]) / 2
    activations = layer_activations(SMALL, TOKENS, AUTOCAST)
    assert activations.kept("full") == 2 * 64 * TOKENS
    # Autograd also keeps the generator's state, some KB on a CPU.
    assert activations.kept("full") == pytest.approx(weighed, rel=0.05)
    assert activations.kept("selective") - activations.kept("full") == activations.attended


@pytest.mark.parametrize("checkpointing", ["off", "full"])
@pytest.mark.parametrize("setup", [AUTOCAST, PLAIN], ids=["autocast", "fp32"])
@pytest.mark.parametrize("accumulates", [False, True], ids=["", "accumulates"])
def test_the_peak_is_that_of_a_profiled_step(
    setup: TrainingSetup,
    checkpointing: str,
    accumulates: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In separate operations; `test_the_peak_of_compiled_layers` has the compiled ones."""
    check_peak(
        replace(setup, checkpointing=checkpointing, compile=False, accumulates=accumulates),
        monkeypatch,
        tmp_path,
    )


@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_the_peak_of_compiled_layers(
    checkpointing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    check_peak(replace(AUTOCAST, checkpointing=checkpointing), monkeypatch, tmp_path)
    torch._dynamo.reset()


def check_peak(setup: TrainingSetup, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    chunk = 1 << 17
    monkeypatch.setattr(head, "_CHUNK_BYTES", chunk)
    monkeypatch.setattr(planning, "LOSS_CHUNK_BYTES", chunk)
    setup = replace(setup, optimizer=False)
    shape = replace(SMALL, num_hidden_layers=4)
    model = build(shape, setup)

    def step() -> None:
        weighing.loss(model, ids(), autocast=setup.casts_weights).backward()

    step()
    if not setup.accumulates:
        model.zero_grad(set_to_none=True)
    weighed = weighing.peak_bytes(step, folder)
    weights = 4 * shape.num_parameters
    there = weights * (2 if setup.accumulates else 1)
    planned = training_memory(shape, TOKENS, setup).allocated - there
    assert planned == pytest.approx(weighed, rel=0.15)


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

    def alone(rows: torch.Tensor, send: Any, receive: Any, group: Any) -> torch.Tensor:
        return rows.new_zeros(sum(receive), *rows.shape[1:])

    monkeypatch.setattr(collectives, "all_to_all", alone)
    monkeypatch.setattr(ranges, "all_to_all", alone)
    shape = replace(SMALL, num_key_value_heads=kv_heads)
    setup = TrainingSetup(gpus=4, context_parallel=4, checkpointing="off", compile=False)
    kept = []
    for layers in (1, 3):
        plan = LayerPlan("F" * layers if pattern.is_full else "S" * layers, pattern)
        if pattern.is_full:
            plan = LayerPlan("F" * layers, PATTERN)
        config = planned_config(
            shape_config(replace(shape, num_hidden_layers=layers), TOKENS), plan
        )
        model = random_model(config, dtype=torch.bfloat16, device=CPU, seed=0).train()
        model.set_context_parallel(ContextGroup(3, 4))
        kept.append(
            weighing.kept_bytes(
                model, lambda m=model: weighing.loss(m, ids(TOKENS // 4), autocast=False)
            )
        )
    weighed = (kept[1] - kept[0]) // 2
    planned = layer_activations(shape, TOKENS, setup, pattern)
    assert planned.total == pytest.approx(weighed, rel=0.02)
    whole = layer_activations(shape, TOKENS, replace(setup, context_parallel=1)).total
    assert planned.total > whole // 4


def test_the_demos_run_on_an_h200_is_planned_within_5_percent() -> None:
    """Measured: benchmarks/results/2026-11-23_nvidia-h200_demo.json (23.4 GB)."""
    setup = TrainingSetup(checkpointing="off")
    planned = training_memory(SHAPES["smollm2-135m"], 32768, setup)
    assert planned.allocated == pytest.approx(23397549056, rel=0.05)


def test_states_are_fp32_and_sharded() -> None:
    one = training_memory(LLAMA, CONTEXT).parts
    eight = training_memory(LLAMA, CONTEXT, TrainingSetup(gpus=8)).parts
    for name, size in (("weights", 4), ("gradients", 4), ("Adam moments", 8)):
        assert one[f"{name}, fp32"] == size * LLAMA.num_parameters
        assert eight[f"{name}, fp32"] == size * -(-LLAMA.num_parameters // 8)
    copies = training_memory(LLAMA, CONTEXT, TrainingSetup(gpus=8, sharding="ddp")).parts
    assert copies["weights, fp32"] == one["weights, fp32"]
    assert copies["DDP buckets, fp32"] == one["gradients, fp32"]
    without = training_memory(LLAMA, CONTEXT, TrainingSetup(optimizer=False)).parts
    assert "Adam moments, fp32" not in without
    assert RESERVE in one


def test_the_more_is_kept_the_more_it_takes() -> None:
    def total(**changes: Any) -> int:
        setup = TrainingSetup(gpus=8, context_parallel=8, **changes)
        return training_memory(LLAMA, CONTEXT, setup, PAPER).total

    sizes = [total(checkpointing=name) for name in ("full", "selective", "off")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    assert total(offload_activations=True) < sizes[0]
    assert total(compile=False) > sizes[0]
    estimate = training_memory(LLAMA, CONTEXT, TrainingSetup(), PAPER)
    assert estimate.allocated == max(estimate.phases.values())
    assert set(estimate.phases) == {"loss", "backward of the last norm", "backward of a layer"}


def test_a_longer_sequence_over_more_gpus_takes_as_much() -> None:
    one = training_memory(LLAMA, 8192, TrainingSetup(gpus=8))
    batch = training_memory(LLAMA, 4096, TrainingSetup(gpus=8, batch=2))
    assert one.parts == batch.parts


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="checkpointing is 'some'; choose from off, selective"):
        TrainingSetup(checkpointing="some")
    with pytest.raises(UsageError, match="sharding is 'zero'"):
        TrainingSetup(sharding="zero")
    with pytest.raises(UsageError, match="4 GPUs do not divide into groups of 3"):
        TrainingSetup(gpus=4, context_parallel=3)
