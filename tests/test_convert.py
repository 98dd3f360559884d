"""Conversion: weights stay bit for bit, the config says what is sparse, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import longgen
from longgen.checkpoint import RECORD
from longgen.convert import convert, hybrid_config
from longgen.errors import UsageError
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.rope import rope_theta_for

PLAN = LayerPlan("SFS", SparsePattern(block_size=8, sink_blocks=1, local_blocks=2))
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_stay_bit_for_bit(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    base = make_checkpoint(tmp_path / "base", family, torch.bfloat16)
    record = convert(base, tmp_path / "hybrid", PLAN, context=256)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "hybrid" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(tensor, after[name]), name

    config = AutoConfig.from_pretrained(tmp_path / "hybrid")
    assert config.model_type == f"longgen_{family}"
    assert config.layer_plan == PLAN
    assert config.max_position_embeddings == 256
    theta = rope_theta_for(10000.0, 64, 256, 8)
    assert config.rope_parameters["rope_theta"] == record["rope_theta"] == theta
    assert record == json.loads((tmp_path / "hybrid" / RECORD).read_text())
    assert (record["kind"], record["layers"]) == ("convert", "SFS")
    assert (record["context"], record["original_context"]) == (256, 64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hybrid")
    assert (
        tokenizer("rain")["input_ids"] == AutoTokenizer.from_pretrained(base)("rain")["input_ids"]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_layer_full_it_computes_what_the_original_does(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    base = make_checkpoint(tmp_path / "base", family)
    convert(base, tmp_path / "full", LayerPlan.build(3, "all"))
    ids = torch.arange(60)[None]
    original = AutoModelForCausalLM.from_pretrained(base)
    with torch.inference_mode():
        logits = longgen.load_model(tmp_path / "full", device="cpu")(ids).logits
        assert torch.equal(logits, original(ids).logits)
    # Without a longer context nothing about positions changes either.
    config = AutoConfig.from_pretrained(tmp_path / "full")
    assert config.rope_parameters == original.config.rope_parameters
    assert config.max_position_embeddings == 64


def test_a_rotary_base_can_be_given(tiny_checkpoint: Path, tmp_path: Path) -> None:
    record = convert(tiny_checkpoint, tmp_path / "hybrid", PLAN, context=128, rope_theta=777777.0)
    assert record["rope_theta"] == 777777.0
    base = AutoConfig.from_pretrained(tiny_checkpoint)
    for theta in (0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="rotary base"):
            hybrid_config(base, PLAN, rope_theta=theta)


def test_a_hybrid_is_not_converted_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "hybrid", PLAN)
    with pytest.raises(UsageError, match=r"is a hybrid already \(SFS\)"):
        convert(tmp_path / "hybrid", tmp_path / "again", PLAN)
    assert not (tmp_path / "again").exists()


def test_a_model_with_a_sliding_window_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint(tmp_path / "base", "mistral", sliding_window=16)
    with pytest.raises(UsageError, match="sparse model already"):
        convert(base, tmp_path / "hybrid", PLAN)
    assert not (tmp_path / "hybrid").exists()


@pytest.mark.parametrize(
    ("plan", "context", "words"),
    [
        (LayerPlan("SFSS", PLAN.pattern), None, "4 layers, the model 3"),
        (PLAN, 32, "32 tokens is below the 64"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, plan: LayerPlan, context: int | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        convert(tiny_checkpoint, tmp_path / "hybrid", plan, context=context)
    assert not (tmp_path / "hybrid").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint(tmp_path / "base", vocab_size=261)
    with pytest.raises(UsageError, match=r"ids up to 261.*only 261 rows"):
        convert(base, tmp_path / "hybrid", PLAN)


def test_weights_that_are_not_there_are_not_made_up(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["num_hidden_layers"] = 4
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"lacks 9 weights.*model\.layers\.3"):
        convert(base, tmp_path / "hybrid", LayerPlan("SFFS", PLAN.pattern))
    assert not (tmp_path / "hybrid").exists()
