"""ModelShape: parameters counted against real models, configs read as transformers reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from longgen.errors import UsageError
from longgen.hf import CONFIG_CLASSES, FAMILIES
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import FAMILIES as SHAPE_FAMILIES
from longgen.shapes import SHAPES, ModelShape, load_shape, shape_from_fields

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
# Odd on purpose: no two of the numbers may be exchanged unnoticed.
SMALL = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}


def count_parameters(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_parameters_equal_a_real_model(family: str, extra: dict[str, Any], tied: bool) -> None:
    config = CONFIGS[family](**SMALL, **extra, tie_word_embeddings=tied)
    shape = ModelShape.from_config(config)
    assert shape.num_parameters == count_parameters(config)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As counted in the published weights.
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("mistral-7b", 7_248_023_552),
        ("qwen3-8b", 8_190_735_360),
        ("qwen2.5-7b", 7_615_616_512),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_named_shapes_have_the_published_parameters(name: str, parameters: int) -> None:
    assert load_shape(name).num_parameters == parameters
    assert load_shape(name.upper()) is SHAPES[name]


@pytest.mark.parametrize("family", SHAPE_FAMILIES)
def test_silent_configs_mean_what_transformers_takes_them_to_mean(family: str) -> None:
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    fields = {name: SMALL[name] for name in needed} | {"num_attention_heads": 4}
    assert shape_from_fields({"model_type": family, **fields}, "It") == ModelShape.from_config(
        CONFIGS[family](**fields)
    )


def test_the_families_are_those_of_the_transformers_integration() -> None:
    assert SHAPE_FAMILIES == tuple(FAMILIES) == tuple(CONFIG_CLASSES)


@pytest.mark.parametrize(
    ("fields", "theta", "kind"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, "default"),
        ({"rope_theta": 1e6}, 1e6, "default"),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}, 1e6, "linear"),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"}}, 5e5, "llama3"),
        ({"rope_theta": 2e4, "rope_scaling": None}, 2e4, "default"),
        ({}, 1e4, "default"),
    ],
)
def test_rope_is_read_from_new_and_old_fields(
    fields: dict[str, Any], theta: float, kind: str
) -> None:
    shape = shape_from_fields({"model_type": "llama", **SMALL, **fields}, "It")
    assert (shape.rope_theta, shape.rope_type) == (theta, kind)


@pytest.mark.parametrize(
    ("family", "fields", "window"),
    [
        ("mistral", {"sliding_window": 32}, 32),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {}, 4096),
        ("qwen2", {"sliding_window": 32}, None),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, 32),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True}, None),
        ("qwen3", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}, 32),
        ("llama", {}, None),
    ],
)
def test_sliding_window_counts_only_where_layers_use_it(
    family: str, fields: dict[str, Any], window: int | None
) -> None:
    assert (
        shape_from_fields({"model_type": family, **SMALL, **fields}, "It").sliding_window == window
    )
    assert ModelShape.from_config(CONFIGS[family](**SMALL, **fields)).sliding_window == window


@pytest.mark.parametrize("family", SHAPE_FAMILIES)
def test_saved_hybrids_carry_their_plan(family: str, tmp_path: Path) -> None:
    plan = LayerPlan.build(3, "1", SparsePattern(block_size=4, local_blocks=2))
    config = CONFIG_CLASSES[family](
        **SMALL, layer_types=plan.layer_types, longgen={"pattern": plan.pattern.to_dict()}
    )
    config.save_pretrained(tmp_path)
    shape = load_shape(tmp_path)
    assert shape.is_hybrid and shape.plan == plan
    assert shape.model_type == f"longgen_{family}" and shape.family == family
    assert shape == ModelShape.from_config(config)
    base = ModelShape.from_config(CONFIGS[family](**SMALL))
    assert not base.is_hybrid and base.num_parameters == shape.num_parameters


def test_a_folder_needs_nothing_but_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    assert load_shape(str(tmp_path)) == shape_from_fields({"model_type": "llama", **SMALL}, "It")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "gpt2"}', "architecture 'gpt2'.*llama, mistral, qwen2, qwen3"),
        ("{}", "architecture ''"),
        ('{"model_type": "longgen_gpt2"}', "architecture 'longgen_gpt2'"),
        ('{"model_type": "llama"}', "num_attention_heads = None"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "num_attention_heads = 0"),
        ("not json", "not readable JSON"),
        ("[]", "not hold a JSON object"),
        (json.dumps({"model_type": "longgen_llama", **SMALL}), "lacks its layer_types"),
    ],
)
def test_unusable_configs_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        load_shape(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    for model in ("llama-9-1b", str(tmp_path)):
        with pytest.raises(UsageError) as caught:
            load_shape(model)
        assert all(word in str(caught.value) for word in (repr(model), *SHAPES))
