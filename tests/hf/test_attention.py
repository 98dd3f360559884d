"""Which attention a hybrid runs: ours by default, ours by name, and no other by any way in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import longgen.hf.attention as hf_attention
from longgen.attention import IMPLEMENTATIONS, attention
from longgen.errors import UsageError
from longgen.hf.attention import ATTENTION_NAMES

Make = Callable[..., Any]
OTHERS = ["sdpa", "eager", "flash_attention_2", "flex_attention", "org/kernel"]
REFUSED = r"would ignore the sparse pattern"


@pytest.fixture(autouse=True)
def kernels_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers believe that it has fetched any kernel it is asked for."""
    monkeypatch.setattr(
        transformers.modeling_utils, "lazy_import_flash_attention", lambda *args, **kwargs: None
    )


@pytest.fixture(scope="module")
def checkpoint(build: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid")
    build().save_pretrained(path)
    return path


def in_config(checkpoint: Path, name: Any) -> Any:
    config = AutoConfig.from_pretrained(checkpoint)
    config._attn_implementation = name
    return config


WAYS: dict[str, Callable[[Path, Any], Any]] = {
    "from_pretrained": lambda path, name: AutoModelForCausalLM.from_pretrained(
        path, attn_implementation=name
    ),
    "decoder alone": lambda path, name: AutoModel.from_pretrained(path, attn_implementation=name),
    "from_config": lambda path, name: AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(path), attn_implementation=name
    ),
    "named in the config": lambda path, name: AutoModelForCausalLM.from_pretrained(
        path, config=AutoConfig.from_pretrained(path, attn_implementation=name)
    ),
    "written into the config": lambda path, name: AutoModelForCausalLM.from_config(
        in_config(path, name)
    ),
    "later": lambda path, name: AutoModelForCausalLM.from_pretrained(path).set_attn_implementation(
        name
    ),
    "later, decoder": lambda path, name: AutoModelForCausalLM.from_pretrained(
        path
    ).model.set_attn_implementation(name),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*OTHERS, {"": "sdpa"}], ids=str)
def test_other_attention_is_refused(checkpoint: Path, name: Any, way: str) -> None:
    with pytest.raises(UsageError, match=REFUSED):
        WAYS[way](checkpoint, name)


@pytest.mark.parametrize("name", OTHERS)
def test_a_name_written_into_a_live_config_is_refused(build: Make, tokens: Make, name: str) -> None:
    model = build()
    model.config._attn_implementation = name
    with pytest.raises(UsageError, match=REFUSED):
        model(tokens(1, 20))


def test_the_refusal_names_the_way_out(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r'attn_implementation="sdpa".*longgen_reference'):
        AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa")


def test_every_implementation_has_a_name() -> None:
    assert set(ATTENTION_NAMES.values()) == set(IMPLEMENTATIONS)
    assert ATTENTION_NAMES["longgen"] == "auto"


@pytest.mark.parametrize("name", ["longgen", "longgen_reference", "longgen_blocked"])
def test_our_implementations_agree(hybrid: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each, asked for by name, runs and is right; none is replaced by another."""
    asked = []

    def spy(*args: Any, impl: str, **kwargs: Any) -> torch.Tensor:
        asked.append(impl)
        return attention(*args, impl=impl, **kwargs)

    monkeypatch.setattr(hf_attention, "attention", spy)
    model = hybrid.model
    model.set_attn_implementation(name)
    try:
        for row, ids in enumerate(hybrid.rows):
            with torch.no_grad():
                cache = model(ids[None, :-2]).past_key_values
                hybrid.check(name, model(ids[None]).logits[0], row)
                last = model(ids[None, -2:], past_key_values=cache).logits[0]
            hybrid.check(f"{name} with a cache", last, row, len(ids) - 2)
        assert set(asked) == {ATTENTION_NAMES[name]}
    finally:
        model.set_attn_implementation("longgen")


@pytest.mark.parametrize("way", ["from_pretrained", "from_config", "named in the config"])
def test_our_names_are_accepted_at_load(checkpoint: Path, way: str) -> None:
    model = WAYS[way](checkpoint, "longgen_reference")
    assert model.config._attn_implementation == "longgen_reference"
    assert model.model.config._attn_implementation == "longgen_reference"


def test_plain_models_cannot_run_ours(build_base: Make, tokens: Make) -> None:
    model = build_base("llama")
    model.set_attn_implementation("longgen")
    with pytest.raises(UsageError, match="longgen convert"):
        model(tokens(1, 20))


def test_dropout_is_refused_where_it_would_act(build: Make, tokens: Make) -> None:
    model = build(attention_dropout=0.1)
    model(tokens(1, 20))
    with pytest.raises(UsageError, match=r"attention_dropout is 0\.1"):
        model.train()(tokens(1, 20))


def test_a_share_of_the_heads_is_refused(build: Make, tokens: Make) -> None:
    """Tensor parallelism hands each layer some of the heads, without saying which."""
    model = build(heads=4, key_value_heads=4)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(layer.self_attn, name)
            projection.weight = torch.nn.Parameter(projection.weight[:16])
        layer.self_attn.o_proj.weight = torch.nn.Parameter(layer.self_attn.o_proj.weight[:, :16])
    with pytest.raises(UsageError, match="2 of 4 key/value heads"):
        model(tokens(1, 20))
