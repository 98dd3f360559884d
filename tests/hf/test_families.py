"""The families: all-full hybrids are their base models; checkpoints stay what they are."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import longgen.hf
from longgen.errors import UsageError
from longgen.hf import CONFIG_CLASSES, FAMILIES, LMHead, is_hybrid
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def twins(family: str, build: Make, build_base: Make) -> tuple[Any, Any]:
    """The family's own model, and the hybrid with its weights in which every layer is full."""
    base = build_base(family)
    hybrid = build(family, layers="FFF", seed=1)
    hybrid.load_state_dict(base.state_dict(), strict=True)
    return base, hybrid


@pytest.mark.parametrize("length", [1, 50, 300])
def test_all_full_logits_are_the_base_models_bits(twins: Any, tokens: Make, length: int) -> None:
    base, hybrid = twins
    assert base.config._attn_implementation == "sdpa"
    ids = tokens(2, length)
    for kwargs in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(ids)}):
        assert torch.equal(hybrid(ids, **kwargs).logits, base(ids, **kwargs).logits)
    positions = torch.arange(length)[None]
    assert torch.equal(hybrid(ids, position_ids=positions).logits, base(ids).logits)


def test_all_full_generation_is_the_base_models_bits(twins: Any, tokens: Make) -> None:
    outs = [
        model.generate(
            tokens(2, 40),
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for model in twins
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert torch.equal(torch.stack(outs[0].logits), torch.stack(outs[1].logits))
    caches = [out.past_key_values.layers for out in outs]
    for a, b in zip(*caches, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_all_full_batches_with_left_padding(twins: Any, expect: Make, tokens: Make) -> None:
    """Padding takes another path than transformers': the tokens are the same, the logits nearly."""
    base, hybrid = twins
    rows = [tokens(40, seed=1), tokens(27, seed=2)]
    ids = torch.stack([rows[0], torch.cat([torch.full((13,), 5), rows[1]])])
    mask = (torch.arange(40) >= torch.tensor([0, 13])[:, None]).long()
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(hybrid.generate(ids, **options), base.generate(ids, **options))
    logits = hybrid(ids, attention_mask=mask).logits
    expected = expect(hybrid, rows)
    expected.check("whole row", logits[0], 0)
    expected.check("padded row", logits[1, 13:], 1)


@pytest.mark.parametrize("pattern", [SparsePattern(), SparsePattern(block_size=4, local_blocks=13)])
def test_a_document_inside_the_window_is_dense(
    build: Make, build_base: Make, tokens: Make, family: str, pattern: SparsePattern
) -> None:
    base, hybrid = build_base(family), build(family, pattern, "SFS", seed=1)
    hybrid.load_state_dict(base.state_dict())
    assert torch.equal(hybrid(tokens(2, 50)).logits, base(tokens(2, 50)).logits)


def test_every_family_is_registered(family: str, config: Make) -> None:
    own = config(family)
    assert own.model_type == f"longgen_{family}" and is_hybrid(own)
    assert type(AutoConfig.for_model(own.model_type)) is CONFIG_CLASSES[family]
    model = AutoModelForCausalLM.from_config(own)
    name = FAMILIES[family][0]
    assert type(model) is getattr(longgen.hf, f"LongGen{name}ForCausalLM")
    assert isinstance(model, getattr(transformers, f"{name}ForCausalLM"))
    assert type(model.model) is getattr(longgen.hf, f"LongGen{name}Model")
    assert type(model.lm_head) is LMHead
    assert not is_hybrid(getattr(transformers, f"{name}Config")())


def test_the_default_plan_is_the_middle_third() -> None:
    config = longgen.hf.LongGenLlamaConfig(num_hidden_layers=7)
    assert config.layer_plan == LayerPlan.build(7) and config.layer_plan.layers == "SSFFFSS"


def test_sliding_windows_are_switched_off(config: Make) -> None:
    """The base families' own windows would hide tokens from the full layers."""
    for family in ("mistral", "qwen2", "qwen3"):
        own = config(family, sliding_window=16)
        assert own.sliding_window is None
    assert config("qwen2", sliding_window=16, use_sliding_window=True).use_sliding_window is False


def test_models_can_be_copied_and_pickled(build: Make, tokens: Make, family: str) -> None:
    model, ids = build(family), tokens(1, 30)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), copy.deepcopy(model)):
        assert type(twin) is type(model) and type(twin.model) is type(model.model)
        assert torch.equal(twin(ids).logits, model(ids).logits)
    assert pickle.loads(pickle.dumps(model.config)).layer_plan == model.config.layer_plan


@pytest.fixture
def checkpoint(build: Make, tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "hybrid")
    return tmp_path / "hybrid"


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = checkpoint / "config.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    return checkpoint


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_save_and_reload(
    build: Make, tokens: Make, tmp_path: Path, family: str, tied: bool
) -> None:
    pattern = SparsePattern(block_size=4, local_blocks=1, stride_blocks=3, head_shift=2)
    model = build(family, pattern, "SFFSF", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == f"longgen_{family}"
    assert fields["layer_types"] == model.config.layer_plan.layer_types
    assert fields["longgen"] == {"pattern": pattern.to_dict()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and type(again.lm_head) is LMHead
    assert again.config.layer_plan == model.config.layer_plan
    assert again.config._attn_implementation == "longgen"
    wanted = model(tokens(1, 50))
    assert torch.equal(again(tokens(1, 50)).logits, wanted.logits)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is type(model.model)
    assert torch.equal(model.lm_head(decoder(tokens(1, 50)).last_hidden_state), wanted.logits)


def test_a_base_checkpoint_loads_into_a_hybrid(
    build_base: Make, config: Make, tokens: Make, tmp_path: Path, family: str
) -> None:
    base = build_base(family)
    base.save_pretrained(tmp_path)
    hybrid, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=config(family, layers="FFF"), output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(hybrid(tokens(1, 50)).logits, base(tokens(1, 50)).logits)


def test_defaults_are_written_out(tmp_path: Path) -> None:
    """A checkpoint made with today's default pattern must not change when the default does."""
    longgen.hf.LongGenLlamaConfig().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["longgen"]["pattern"] == SparsePattern().to_dict()
    assert fields["layer_types"] == LayerPlan.build(32).layer_types


def test_rope_scaling_survives(config: Make, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    config(rope_parameters=rope).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a pattern field of the future": (
        lambda fields: fields["longgen"]["pattern"].update(spiral=2),
        r"\['spiral'\].*does not know",
    ),
    "a field of the future": (lambda fields: fields["longgen"].update(spiral=2), "longgen"),
    "no pattern": (lambda fields: fields.pop("longgen"), "longgen"),
    "an empty record": (lambda fields: fields.update(longgen={}), "longgen"),
    "a null pattern": (lambda fields: fields["longgen"].update(pattern=None), "pattern"),
    "a size in words": (
        lambda fields: fields["longgen"]["pattern"].update(block_size="4"),
        "block_size is '4'",
    ),
    "a list of sizes": (lambda fields: fields["longgen"]["pattern"].update(block_size=[4]), "4"),
    "no layer types": (lambda fields: fields.pop("layer_types"), "layer_types"),
    "too few layer types": (
        lambda fields: fields["layer_types"].pop(),
        "2 layer_types for 3 layers",
    ),
    "a layer type of another model": (
        lambda fields: fields["layer_types"].__setitem__(0, "sliding_attention"),
        "sliding_attention",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_configs_that_cannot_be_meant_are_refused(checkpoint: Path, name: str) -> None:
    """At load: weights of a model that would then run some other pattern are not even read."""
    change, message = BROKEN[name]
    edit(checkpoint, change)
    with pytest.raises(UsageError, match=message):
        AutoConfig.from_pretrained(checkpoint)
    with pytest.raises(UsageError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_transformers_own_classes_refuse_a_hybrid(build: Make, tmp_path: Path, family: str) -> None:
    """They only warn of the model type; the layer type keeps them from running it densely."""
    build(family).save_pretrained(tmp_path)
    name = FAMILIES[family][0]
    with pytest.raises(Exception, match=r"(?s)layer_types.*longgen_sparse"):
        getattr(transformers, f"{name}ForCausalLM").from_pretrained(tmp_path)


def stubs(checkpoint: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in checkpoint.glob("*.py")}


def test_stubs_name_the_classes(checkpoint: Path) -> None:
    written = stubs(checkpoint)
    assert set(written) == {"configuration_longgen.py", "modeling_longgen.py"}
    for text in written.values():
        exec(compile(text, "stub", "exec"), {})
    fields = json.loads((checkpoint / "config.json").read_text())
    for reference in fields["auto_map"].values():
        module, name = reference.split(".")
        assert name in written[f"{module}.py"] and hasattr(longgen.hf, name)


@pytest.mark.parametrize("repository", ["org/name", "org/name-1.7B"])
def test_a_checkpoint_from_a_repository_can_be_saved(
    checkpoint: Path, tmp_path: Path, repository: str
) -> None:
    """transformers writes the repository that code came from into the map."""

    def as_downloaded(fields: dict[str, Any]) -> None:
        fields["auto_map"] = {k: f"{repository}--{v}" for k, v in fields["auto_map"].items()}
        fields["auto_map"]["AutoTokenizer"] = ["tokenization_other.OtherTokenizer", None]

    wanted = stubs(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(edit(checkpoint, as_downloaded))
    model.save_pretrained(tmp_path / "again")
    assert stubs(tmp_path / "again") == wanted
    again = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert again["AutoModelForCausalLM"] == "modeling_longgen.LongGenLlamaForCausalLM"
