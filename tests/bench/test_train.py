"""`TrainBench` end to end on a tiny model, and what becomes of what fails."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longgen.accounting import full_plan, training_flops
from longgen.bench import train, train_step
from longgen.bench.communication import Communication
from longgen.bench.inference_settings import TINY, TINY_PATTERN
from longgen.bench.models import shape_config
from longgen.bench.timing import Budget
from longgen.bench.train import TrainBench
from longgen.bench.train_settings import TrainSettings, cut, quick_settings
from longgen.bench.train_step import TrainStep, make_step
from longgen.errors import UsageError
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.train.processes import Processes
from longgen.training_memory import training_memory
from longgen.training_setup import CHECKPOINTING, TrainingSetup
from tests.processes import run_processes

SHAPE = replace(TINY, num_hidden_layers=3)
PLAN = LayerPlan("SFS", TINY_PATTERN)
ALONE = Processes()


def make_settings(**changes: Any) -> TrainSettings:
    setup = TrainingSetup(checkpointing="selective", compile=False, is_bf16=False, optimizer=False)
    settings = TrainSettings(
        name="tiny",
        shape=SHAPE,
        plan=PLAN,
        whole_layers=6,
        lengths=(256,),
        device=torch.device("cpu"),
        setup=setup,
        steps=3,
        budget=Budget(warmup_ms=0.0, repeat_ms=1.0, least=2, rounds=1),
        matmul_size=64,
        copy_bytes=1 << 12,
    )
    return replace(settings, **changes)


def base() -> Any:
    return shape_config(SHAPE, 512)


def bench(settings: TrainSettings, processes: Processes = ALONE) -> TrainBench:
    found = TrainBench(settings, base(), processes)
    found.run()
    return found


def step_of(name: str, settings: TrainSettings) -> TrainStep:
    plan = PLAN if name == "hybrid" else full_plan(SHAPE)
    return make_step(settings, name, plan, base(), 256, ALONE)


def test_rows_are_whole_and_consistent() -> None:
    found = bench(make_settings(lengths=(512, 256)))
    assert [(row["case"], row["length"]) for row in found.rows] == [
        (f"train_step.{name}", length)
        for length in (256, 512)
        for name in ("hybrid", "full", "transformers")
    ]
    for row in found.rows:
        assert row["value"] > 0 and row["n"] == 3 and "error" not in row
        assert row["spread"][0] <= row["value"] <= row["spread"][1]
        assert row["tokens_per_second_per_gpu"] == pytest.approx(row["length"] / row["value"])
        assert row["unit"] == "s" and row["layers_of"] == 6 and row["gpus"] == 1
        assert row["mfu"] is None and row["peak_bytes"] is None
        assert 5 < row["loss"] < 8
    hybrid, full, stock = found.rows[:3]
    assert hybrid["layers"] == "SFS" and full["layers"] == stock["layers"] == "FFF"
    assert hybrid["flops"] == training_flops(SHAPE, PLAN, 256)
    assert full["flops"] == training_flops(SHAPE, full_plan(SHAPE), 256)
    setup = replace(make_settings().setup, accumulates=False)
    assert hybrid["planned_bytes"] == training_memory(SHAPE, 256, setup, PLAN).allocated
    assert "planned_bytes" not in stock
    assert (hybrid["checkpointing"], stock["checkpointing"]) == ("selective", "full")


def test_checkpointing_is_chosen_for_each_variant_and_length() -> None:
    """As little is computed again as fits the card; transformers checkpoints whole layers."""
    settings = make_settings(lengths=(256, 512), chooses_checkpointing=True)
    run = TrainBench(settings, base(), ALONE)

    def need(name: str, length: int) -> int:
        setup = replace(settings.setup, accumulates=False, checkpointing=name)
        return training_memory(SHAPE, length, setup, PLAN).total

    run.memory_bytes = need("elementwise", 512)
    assert need("elementwise", 512) < need("off", 512) and need("off", 256) <= run.memory_bytes
    chosen = [run._setup("hybrid", length).checkpointing for length in settings.lengths]
    assert chosen == ["off", "elementwise"]
    assert run._setup("transformers", 256).checkpointing == "full"
    run.settings = replace(settings, fp8=True)
    assert run._setup("hybrid", 512).checkpointing == "selective"
    run.settings = replace(settings, chooses_checkpointing=False)
    assert run._setup("hybrid", 512).checkpointing == "selective"
    found = bench(replace(settings, lengths=(256,), variants=("hybrid", "transformers"), steps=1))
    assert {row["checkpointing"] for row in found.rows} == {"full"}


def test_all_variants_train_the_same_model_on_the_same_tokens() -> None:
    """All layers full, the hybrid's path has transformers' loss and gradients, also where layers
    are computed again, and the sparse one has others."""
    losses, gradients = {}, {}
    for name in ("full", "transformers", "hybrid"):
        for kept in CHECKPOINTING:
            settings = make_settings()
            settings = replace(settings, setup=replace(settings.setup, checkpointing=kept))
            step = step_of(name, settings)
            losses[name, kept] = float(step.run())
            weight = step.model.model.layers[0].mlp.up_proj.weight
            gradients[name, kept] = weight.grad
    for (name, kept), loss in losses.items():
        same = ("hybrid", "off") if name == "hybrid" else ("transformers", "off")
        assert loss == pytest.approx(losses[same], rel=1e-5)
        torch.testing.assert_close(gradients[name, kept], gradients[same], rtol=1e-3, atol=1e-6)
    assert losses["hybrid", "off"] != pytest.approx(losses["full", "off"], rel=1e-6)


def test_an_optimizers_step_is_one() -> None:
    settings = make_settings()
    settings = replace(settings, setup=replace(settings.setup, optimizer=True))
    step = step_of("hybrid", settings)
    before = step.model.lm_head.weight.detach().clone()
    first = float(step.run())
    step.forget_gradients()
    assert not torch.equal(before, step.model.lm_head.weight)
    assert float(step.run()) < first
    alone = step_of("hybrid", make_settings())
    before = alone.model.lm_head.weight.detach().clone()
    alone.run()
    assert torch.equal(before, alone.model.lm_head.weight)


def test_what_is_not_finite_is_an_error_in_place_of_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = train_step.random_model

    def broken(config: Any, **how: Any) -> Any:
        model = original(config, **how)
        if not hasattr(config, "layer_plan"):
            model.lm_head.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(train_step, "random_model", broken)
    rows = bench(make_settings()).rows
    assert rows[2]["value"] is None and rows[2]["error"] == "ArithmeticError: The loss is nan."
    assert all(row["value"] for row in rows[:2])


def test_a_gradient_that_is_not_finite_is_found() -> None:
    step = step_of("hybrid", make_settings())
    loss = step.run()
    step.model.lm_head.weight.grad[0, 0] = float("inf")
    with pytest.raises(ArithmeticError, match=r"norm of the gradients is (inf|nan)"):
        step.check(loss)


def test_a_lack_of_memory_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    original = train.make_step

    def make(settings: Any, name: str, *rest: Any) -> TrainStep:
        if name == "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(settings, name, *rest)

    monkeypatch.setattr(train, "make_step", make)
    hybrid, full, stock = bench(make_settings()).rows
    assert full["error"] == "Out of memory at 256 tokens." and full["value"] is None
    assert hybrid["value"] and stock["value"]


def test_slow_steps_are_not_repeated() -> None:
    rows = bench(make_settings(seconds_each=1e-9, variants=("hybrid",))).rows
    assert rows[0]["n"] == 1
    found = bench(make_settings(seconds=-1.0))
    assert not found.rows and len(found.skipped) == 3
    assert "seconds were over" in found.skipped[0]["reason"]


def test_where_a_pattern_hides_nothing_there_is_no_hybrid() -> None:
    found = bench(make_settings(lengths=(64,)))
    assert [row["case"] for row in found.rows] == ["train_step.full", "train_step.transformers"]
    assert "the pattern hides nothing" in found.skipped[0]["reason"]


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("S" * 10 + "F" * 12 + "S" * 10, 8, "SSFFFSSS"),
        ("S" * 10 + "F" * 11 + "S" * 11, 8, "SSFFFSSS"),
        ("S" * 10 + "F" * 12 + "S" * 10, 32, "S" * 10 + "F" * 12 + "S" * 10),
        ("SFSFSFSF", 4, "FFFF"),
        ("FFSSSSSS", 4, "FSSS"),
    ],
)
def test_a_slice_has_full_layers_where_the_whole_has(
    layers: str, count: int, expected: str
) -> None:
    assert cut(LayerPlan(layers, SparsePattern()), count).layers == expected


def test_a_slice_is_no_longer_than_the_model() -> None:
    with pytest.raises(UsageError, match="--layers is 9; the model has 3, so give 1 to 3"):
        cut(PLAN, 9)


def test_a_quick_run_is_one() -> None:
    quick = quick_settings(make_settings())
    assert quick.seconds is not None and quick.steps < make_settings().steps


def several(rank: int, context_parallel: int, sharding: str) -> Any:
    processes = Processes.start(context_parallel)
    setup = replace(
        make_settings().setup, gpus=2, context_parallel=context_parallel, sharding=sharding
    )
    optimizer = replace(setup, optimizer=True)
    original, kept = train_step.random_model, []

    def noted(config: Any, **how: Any) -> Any:
        kept.append(how["kept_on"])
        return original(config, **how)

    train_step.random_model = noted
    rows = bench(make_settings(setup=optimizer, steps=2), processes).rows
    # Shared out, the weights come from the first process's CPU alone.
    if sharding == "fsdp":
        assert kept == ([] if rank else [torch.device("cpu")] * len(rows))
    else:
        assert kept == [None] * len(rows)
    return rows


@pytest.mark.parametrize(("context_parallel", "sharding"), [(2, "fsdp"), (1, "fsdp"), (1, "ddp")])
def test_several_processes_agree_on_every_row(context_parallel: int, sharding: str) -> None:
    first, second = run_processes(2, several, context_parallel, sharding)
    names = ["hybrid", "full"] + ["transformers"] * (context_parallel == 1)
    assert [row["case"] for row in first] == [f"train_step.{name}" for name in names]
    for mine, theirs in zip(first, second, strict=True):
        assert mine["value"] == theirs["value"] and mine["gpus"] == 2
        assert mine["sharding"] == sharding
        assert mine["batch"] == 2 // context_parallel
        rate = mine["batch"] * 256 / mine["value"] / 2
        assert mine["tokens_per_second_per_gpu"] == pytest.approx(rate)
        # Of all sequences, and under context parallelism of all shares of one.
        assert mine["loss"] == theirs["loss"]
    if context_parallel == 2:
        alone = bench(make_settings(variants=("hybrid",), steps=1)).rows[0]["loss"]
        assert 0.8 * alone < first[0]["loss"] < 1.05 * alone


def communicating(rank: int) -> Any:
    processes = Processes.start(1)
    run = TrainBench(make_settings(), base(), processes)
    # As on a GPU, where alone it is looked at.
    run.settings = replace(run.settings, device=torch.device("cuda"))
    calls: list[str] = []

    def profile(step: Any) -> Communication:
        step()
        return Communication(1.0 + rank, 3.0 - rank, {"AllGather": (0.5, float(rank))})

    train.profile_communication = profile
    step: Any = SimpleNamespace(
        forget_gradients=lambda: calls.append("forget"), run=lambda: calls.append("run")
    )
    found = run._communication(step)
    assert calls == ["forget", "run"]
    gathered = processes.gather(f"rank {rank}")
    processes.leave()
    assert not torch.distributed.is_initialized()
    return found, gathered


def test_communication_is_that_of_every_process() -> None:
    first, second = run_processes(2, communicating)
    assert first == second
    found, gathered = first
    assert gathered == ["rank 0", "rank 1"]
    assert (found["communication_seconds"], found["communication_exposed_seconds"]) == (2, 3)
    assert found["communication_by_process"] == [
        {"seconds": 1 + i, "exposed_seconds": 3 - i, "kinds": {"AllGather": (0.5, i)}}
        for i in range(2)
    ]
    assert ALONE.gather("all") == ["all"]
    ALONE.leave()  # of one process there is nothing to leave


def failing(rank: int) -> str:
    processes = Processes.start(1)
    original = train.make_step

    def make(settings: Any, name: str, *rest: Any) -> TrainStep:
        if name == "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(settings, name, *rest)

    train.make_step = make  # type: ignore[assignment]
    setup = replace(make_settings().setup, gpus=2, sharding="fsdp")
    with pytest.raises(UsageError) as caught:
        bench(make_settings(setup=setup, steps=1), processes)
    return str(caught.value)


def test_with_several_processes_a_failure_ends_the_run() -> None:
    for rank, sentence in enumerate(run_processes(2, failing)):
        assert f"train_step.full failed in process {rank} of 2 at 256 tokens: Out of" in sentence
