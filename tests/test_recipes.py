"""Recipes can be read, are planned for the GPUs that their names say, and fit them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training_tables import planned_recipes
from longgen.cli.options import parse_tokens, resolve_plan
from longgen.cli.sources import read_data_recipe
from longgen.cli.training_plan import Recipe, TrainOptions, training_figures
from longgen.data.packed import PackOptions
from longgen.gpus import parse_gpus
from longgen.shapes import load_shape
from longgen.train.config import PLAN_OPTIONS, ExtendConfig, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
PLANNED = planned_recipes()
TWINS = ("smollm2_135m_128k", "smollm2_135m_128k_full")
DATA_RECIPES = sorted((RECIPES / "data").glob("*.toml"))


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


def test_twins_differ_in_their_layers_alone() -> None:
    hybrid, full = (read_recipe(RECIPES / f"{name}.toml") for name in TWINS)
    assert (hybrid.pop("full_layers"), hybrid.pop("pattern")) == ("middle", "default")
    assert full.pop("full_layers") == "all"
    assert hybrid == full
    assert hybrid["steps"] * hybrid["batch_tokens"] >= 30e6


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_fits_the_card_that_its_recipe_names(name: str) -> None:
    recipe = Recipe.read(str(RECIPES / f"{name}.toml"))
    shape = load_shape(recipe.model or "")
    plan = resolve_plan(shape, parse_tokens(recipe.context or ""), recipe.plan)
    gpus = parse_gpus("1xH100")

    def figures(checkpointing: str | None) -> dict[str, Any]:
        train = replace(recipe.train, checkpointing=checkpointing)
        return training_figures(shape, plan, 131072, 1, gpus, train)

    # What its comment says of the two ways.
    chosen, other = figures(recipe.train.checkpointing), figures("off")
    assert chosen["setup"]["checkpointing"] == "elementwise"
    assert chosen["memory_per_gpu"]["total"] / 2**30 == pytest.approx(49, abs=0.5)
    assert other["memory_per_gpu"]["total"] / 2**30 == pytest.approx(70, abs=0.5)
    assert 1.01 < chosen["step"]["seconds"] / other["step"]["seconds"] < 1.035


@pytest.mark.parametrize("path", DATA_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_data_can_be_packed(path: Path) -> None:
    recipe = read_data_recipe(path)
    assert sum(source["weight"] for source in recipe.sources.values()) == pytest.approx(1)
    long = 0.0
    for source in recipe.sources.values():
        names = ("min_length", "max_length", "whole", "heldout_tokens")
        chosen = {key: source[key] for key in names if key in source}
        options = PackOptions(context=recipe.context or 0, **chosen)
        long += source["weight"] * (options.min_length == recipe.context)
        assert all(place.startswith("PATH/") for place in source["data"])
    # Both say 60 % of long documents in words.
    assert long == pytest.approx(0.6)
    assert any(source.get("heldout_tokens") != 0 for source in recipe.sources.values())


def test_sources_of_the_same_code_hold_out_the_same() -> None:
    sources = read_data_recipe(RECIPES / "data" / "books_code_128k.toml").sources
    by_data: dict[str, set[tuple[object, ...]]] = {}
    for source in sources.values():
        settings = (source["heldout_tokens"], source.get("join_folders", False))
        by_data.setdefault(str(source["data"]), set()).add(settings)
    assert len(by_data) == 2
    assert all(len(settings) == 1 for settings in by_data.values())
