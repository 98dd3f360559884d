"""`longgen plan --train`: figures, recipes, bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longgen.cli.training_plan import parse_budget
from longgen.errors import UsageError
from longgen.gpus import Gpu, GpuGroup, parse_gpus
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import SHAPES
from longgen.train.config import ExtendConfig
from longgen.training_memory import training_memory
from longgen.training_setup import TrainingSetup
from longgen.training_time import training_time

LLAMA = SHAPES["llama-2-7b"]
PAPER = LayerPlan.build(32, "middle:12", SparsePattern.attention_sink())
LENGTH = 131072
COMMAND = ("plan", "llama-2-7b", "--full-layers", "middle:12", "--pattern", "attention-sink")
EIGHT = (*COMMAND, "--train", "--gpus", "8xH100", "--context-parallel", "8")


def test_json_has_the_estimate_by_part(run: Callable[..., Any]) -> None:
    result = run(*EIGHT, "--batch-tokens", "4M", "--tokens", "1B", "--price", "2", "--json")
    assert result.code == 0, result.err
    shown = result.json["training"]
    setup = TrainingSetup(gpus=8, context_parallel=8, checkpointing="elementwise")
    memory = training_memory(LLAMA, LENGTH, setup, PAPER)
    assert shown["memory_per_gpu"]["parts"] == memory.parts
    assert shown["memory_per_gpu"]["phases"] == memory.phases
    assert shown["memory_per_gpu"]["fits"] is True
    step = training_time(LLAMA, PAPER, LENGTH, parse_gpus("8xH100"), setup, 32)
    assert step is not None
    assert shown["step"]["seconds"] == step.seconds and shown["step"]["parts"] == step.parts
    assert shown["step"]["sent_bytes_per_gpu"]["context"] == step.messages.context
    assert shown["step"]["tokens_per_second_per_gpu"] == step.tokens_per_second / 8
    budget = shown["budget"]
    assert budget["gpu_hours"] == step.gpu_hours(10**9) and budget["steps"] == 239
    assert budget["cost"] == 2 * budget["gpu_hours"]
    assert budget["gpu_hours_all_full"] > budget["gpu_hours"]
    # Everything does not fit, what attention and products give does.
    assert shown["setup"]["checkpointing"] == "elementwise"
    everything = replace(setup, checkpointing="off")
    assert training_memory(LLAMA, LENGTH, everything, PAPER).total > 80 << 30


def test_text_says_the_same_figures_within_80_columns(run: Callable[..., Any]) -> None:
    text = run(*EIGHT, "--price", "2.5").out
    assert max(map(len, text.splitlines())) <= 80
    for part in (
        "131,072 tokens a step, 8 GPUs share a sequence",
        "checkpointing elementwise, sharding fsdp",
        "Memory per GPU",
        "Adam moments, fp32",
        "one layer computed again",
        "the peak is in the backward of a layer",
        "GPU-hours for 5B tokens",
        "with all layers full",
        "Cost at 2.5 a GPU-hour",
        "Sent by a GPU a step (context)",
    ):
        assert part in text
    assert "Serving" not in text
    offloaded = run(*EIGHT, "--checkpointing", "full", "--offload", "--no-compile").out
    assert "kept in host memory" in offloaded and "not compiled" in offloaded
    assert "Host memory per GPU" in offloaded


def test_a_recipe_is_planned_and_the_command_line_overrides_it(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'model = "llama-3-8b"\ncontext = 65536\nfull_layers = "middle:8"\nsteps = 10\n'
        "batch_tokens = 524288\ncontext-parallel = 2\ngradient_checkpointing = 'on'\n"
        "compile = 'off'\nblock_size = 64\nlearning_rate = 1e-5\n"
    )
    found = run("plan", "--recipe", recipe, "--gpus", "4xH200", "--json").json
    assert found["model"]["name"] == "llama-3-8b" and found["context"] == 65536
    assert found["layers"].count("F") == 8 and found["pattern"]["block_size"] == 64
    training = found["training"]
    assert training["batch_tokens"] == 524288 and training["budget"]["tokens"] == 5242880
    setup = training["setup"]
    assert (setup["context_parallel"], setup["checkpointing"]) == (2, "full")
    assert setup["compile"] is False and setup["gpus"] == 4
    other = ("--context-parallel", 4, "--checkpointing", "off", "--full-layers", "top:4")
    found = run("plan", "--recipe", recipe, "--gpus", "4xH200", "--json", *other).json
    setup = found["training"]["setup"]
    assert (setup["context_parallel"], setup["checkpointing"]) == (4, "off")
    assert found["layers"].endswith("FFFF") and found["pattern"]["block_size"] == 64
    # As many steps, of another size.
    found = run("plan", "--recipe", recipe, "--json", "--batch-tokens", "1M").json
    assert found["training"]["budget"]["tokens"] == 10 << 20
    # Another model, with the recipe's settings.
    found = run("plan", "qwen3-8b", "--recipe", recipe, "--gpus", "4xH200", "--json").json
    assert found["model"]["name"] == "qwen3-8b" and found["context"] == 65536


def test_a_recipe_without_batch_tokens_has_the_step_that_training_has(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "llama-3-8b"\ncontext = "32K"\nsteps = 3\n')
    found = run("plan", "--recipe", recipe, "--gpus", "2xH200", "--json").json["training"]
    config = ExtendConfig(
        model="m", out="o", context=32768, data=("d",), layers="F", pattern={}, steps=3
    )
    assert found["batch_tokens"] == config.batch_tokens
    assert found["budget"]["tokens"] == 3 * found["batch_tokens"]


def test_a_context_that_gpus_cannot_share_is_refused(refused: Callable[..., str]) -> None:
    assert "cannot be cut into 8 equal parts" in refused(*EIGHT, "--context", 131071)
    assert "and checkpointing is off" in refused(*EIGHT, "--checkpointing", "off", "--offload")


def test_products_in_fp8_are_not_planned_to_be_kept(
    run: Callable[..., Any], refused: Callable[..., str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("fp8 = true\n")
    plan = (*EIGHT, "--recipe", recipe)
    assert run(*plan, "--json").json["training"]["setup"]["checkpointing"] == "selective"
    error = refused(*plan, "--checkpointing", "elementwise")
    assert "--checkpointing is elementwise" in error and "leave fp8 out" in error


def test_offloading_leaves_the_choice_of_checkpointing(run: Callable[..., Any]) -> None:
    """As `longgen extend` does: attention's outputs are kept too where they fit."""
    shown = run(*EIGHT, "--offload", "--json").json["training"]["setup"]
    assert (shown["checkpointing"], shown["offload"]) == ("selective", True)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('steps = "many"', "steps is 'many'; give a whole number"),
        ("steps = 0", "steps is 0; give at least 1"),
        ('context_parallel = "x"', "context_parallel is 'x'; give a whole number"),
        ('offload = "yes"', "offload is 'yes'; give true or false"),
        ("compile = true", "compile is True; give text"),
        ("full_layers = 3", "full_layers is 3; give text"),
        ('block_size = "64"', "block_size is '64'; give a whole number"),
        ("gradient_checkpointing = 'some'", "give auto, off, elementwise, selective or full"),
        ("data = 3", "data is 3; give a list of paths"),
        ("context = 1.5", "context is 1.5; give a whole number"),
    ],
)
def test_values_that_training_would_refuse_are_refused_in_a_plan(
    refused: Callable[..., str], tmp_path: Path, line: str, sentence: str
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'model = "llama-2-7b"\n{line}\n')
    error = refused("plan", "--recipe", recipe)
    assert sentence in error and str(recipe) in error
    assert sentence in refused("extend", "--recipe", recipe, "--out", tmp_path / "out")


def test_without_gpus_as_many_as_share_a_sequence_are_planned_for(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longgen.cli.options.machine_gpus", lambda: None)
    recipe = Path(__file__).parents[2] / "recipes/llama2_7b_128k_h100x8.toml"
    assert run("plan", "--recipe", recipe, "--json").json["gpus"]["count"] == 8
    shared = (*COMMAND, "--train", "--context-parallel", "4", "--json")
    assert run(*shared).json["gpus"]["count"] == 4
    assert run(*COMMAND, "--train", "--json").json["gpus"]["count"] == 1
    # A machine with more of them is planned for as it is, and one with fewer as if it had enough.
    own = parse_gpus("8xH200")
    monkeypatch.setattr("longgen.cli.options.machine_gpus", lambda: own)
    assert run(*shared).json["gpus"] == run(*shared, "--gpus", "8xH200").json["gpus"]
    own = parse_gpus("1xH200")
    assert run(*shared).json["gpus"] == run(*shared, "--gpus", "4xH200").json["gpus"]


def test_a_card_that_is_not_known_has_memory_and_no_speed(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = GpuGroup(1, Gpu(name="Own Card", memory_bytes=1 << 40))
    monkeypatch.setattr("longgen.cli.options.machine_gpus", lambda: own)
    result = run(*COMMAND, "--train")
    assert result.code == 0
    assert "no estimate" in result.out and "Memory per GPU" in result.out
    assert run(*COMMAND, "--train", "--json").json["training"]["step"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*COMMAND, "--price", "2"), "--price say how to train; add --train"),
        (("plan", "--train"), "Give MODEL, the folder of a checkpoint or one of llama-2-7b"),
        ((*COMMAND, "--train", "--gpus", "4xH100", "--context-parallel", "3"), "groups of 3"),
        ((*EIGHT, "--batch-tokens", "100K"), "--batch-tokens is 102,400; give a multiple"),
        ((*EIGHT, "--checkpointing", "some"), "--checkpointing is 'some'; choose from auto, off"),
        ((*EIGHT, "--sharding", "zero"), "sharding is 'zero'; choose from auto, fsdp, ddp"),
        ((*EIGHT, "--tokens", "lots"), "--tokens is 'lots'"),
        (("plan", "--recipe", "no-such.toml"), "no-such.toml cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    refused: Callable[..., str], arguments: tuple[object, ...], words: str
) -> None:
    assert words in refused(*arguments)


def test_budgets_are_decimal() -> None:
    assert [parse_budget(text) for text in ("5B", "1.5m", "300", "2T")] == [
        5 * 10**9,
        1_500_000,
        300,
        2 * 10**12,
    ]
    for text in ("", "0", "-1", "5G", "0.1"):
        with pytest.raises(UsageError, match="5B or 300M"):
            parse_budget(text)
