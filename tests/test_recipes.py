"""Recipes can be read, are planned for the GPUs that their names say, and fit them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks.tables import planned_recipes
from longgen.cli.options import parse_tokens, resolve_plan
from longgen.cli.training_plan import Recipe, TrainOptions, training_figures
from longgen.shapes import load_shape
from longgen.train.config import PLAN_OPTIONS, ExtendConfig, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
PLANNED = planned_recipes()


def test_all_sizes_are_there() -> None:
    assert set(PLANNED) == {
        "llama2_7b_128k_h100x8",
        "llama2_7b_128k_h200x4",
        "llama3_8b_128k_h100x8",
        "qwen3_8b_1m_h100x8",
        "llama2_70b_128k_h100x64",
    }
    assert PLANNED["llama2_70b_128k_h100x64"].count == 64


@pytest.mark.parametrize("name", PLANNED)
def test_a_recipe_fits_its_gpus_and_has_the_papers_budget(name: str) -> None:
    path = str(RECIPES / f"{name}.toml")
    recipe, gpus = Recipe.read(path), PLANNED[name]
    shape = load_shape(recipe.model or "")
    context = parse_tokens(recipe.context or "")
    plan = resolve_plan(shape, context, recipe.plan)
    options = recipe.options(TrainOptions(), context)
    figures = training_figures(shape, plan, context, 1, gpus, options)
    assert figures["memory_per_gpu"]["fits"]
    assert figures["budget"]["tokens"] == pytest.approx(5e9, rel=0.01)
    assert figures["budget"]["steps"] == read_recipe(path)["steps"]
    assert figures["setup"]["checkpointing"] == recipe.train.checkpointing
    assert figures["setup"]["sharding"] == "fsdp"
    # All layers full it would take more, and a card half the size would not do everywhere.
    assert figures["budget"]["gpu_hours_all_full"] > 1.4 * figures["budget"]["gpu_hours"]


@pytest.mark.parametrize("name", PLANNED)
def test_extend_takes_a_recipes_settings(name: str) -> None:
    found = read_recipe(RECIPES / f"{name}.toml")
    shape = load_shape(found["model"])
    recipe = Recipe.read(str(RECIPES / f"{name}.toml"))
    plan = resolve_plan(shape, found["context"], recipe.plan)
    chosen = {"pattern", "full_layers", *PLAN_OPTIONS}
    own = {key: value for key, value in found.items() if key not in chosen}
    config = ExtendConfig(
        **own, out="out", data=("text",), layers=plan.layers, pattern=plan.pattern.to_dict()
    )
    assert config.num_sequences * config.context == config.steps * (config.batch_tokens or 0)
    names = {entry.name for entry in fields(ExtendConfig)}
    assert set(own) <= names
    groups = PLANNED[name].count // config.context_parallel
    assert config.sequences_per_step % groups == 0
