from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longgen.bench.inference_settings import TINY, TINY_PATTERN
from longgen.bench.models import (
    parameter_bytes,
    planned_config,
    random_model,
    shape_config,
    stock_config,
    variant_of,
)
from longgen.checkpoint import load_model
from longgen.plan import LayerPlan
from longgen.shapes import SHAPES, ModelShape

CPU = torch.device("cpu")


def small(name: str) -> ModelShape:
    """Return a shape of the same family and settings, small enough for a test."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    return replace(SHAPES[name], **sizes, **heads)


def logits(model: Any, length: int = 100) -> torch.Tensor:
    tokens = torch.randint(128, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("name", ["llama-3-8b", "mistral-7b", "qwen2.5-7b", "qwen3-8b"])
def test_variants_are_one_model(name: str) -> None:
    """Over the same parameters all full is transformers' own model, and the hybrid is another."""
    shape = small(name)
    base = random_model(shape_config(shape, 5000), dtype=torch.float32, device=CPU, seed=0)
    assert base.config.max_position_embeddings >= max(5000, shape.max_position_embeddings)
    assert sum(p.numel() for p in base.parameters()) == shape.num_parameters
    assert parameter_bytes(base) == 4 * shape.num_parameters
    plan = LayerPlan("SFS", TINY_PATTERN)
    hybrid = variant_of(base, planned_config(base.config, plan))
    full = variant_of(hybrid, planned_config(hybrid.config, LayerPlan.build(3, "all")))
    stock = variant_of(hybrid, stock_config(hybrid.config), "sdpa")
    assert hybrid.config.layer_plan == plan and stock.config._attn_implementation == "sdpa"
    assert type(stock) is type(base)
    for other in (hybrid, full, stock):
        pairs = zip(base.parameters(), other.parameters(), strict=True)
        assert all(a is b for a, b in pairs)
    expected = logits(base)
    assert expected.isfinite().all()
    assert torch.equal(logits(full), expected) and torch.equal(logits(stock), expected)
    assert not torch.allclose(logits(hybrid), expected)


def test_tied_parameters_stay_one() -> None:
    shape = small("smollm2-135m")
    base = random_model(shape_config(shape, 512), dtype=torch.bfloat16, device=CPU, seed=0)
    other = variant_of(base, planned_config(base.config, LayerPlan.build(3, "all")))
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert parameter_bytes(other) == 2 * shape.num_parameters
    assert other.dtype == torch.bfloat16 and other.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_seed_decides_the_weights() -> None:
    a, b, c = (
        random_model(shape_config(TINY, 64), dtype=torch.float32, device=CPU, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(logits(a), logits(b)) and not torch.equal(logits(a), logits(c))


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-7b", "qwen3-8b"])
def test_weights_drawn_one_by_one_are_like_transformers_own(name: str) -> None:
    """Ties, biases of zero, norms of one, and the same spread; drawn by the seed."""
    how: Any = {"dtype": torch.float32, "device": CPU}
    config = planned_config(shape_config(small(name), 512), LayerPlan.build(3))
    expected = random_model(config, seed=0, **how)
    found, again, other = (
        random_model(config, seed=seed, kept_on=CPU, **how) for seed in (0, 0, 1)
    )
    assert type(found) is type(expected) and found.config.layer_plan == config.layer_plan
    tied = found.lm_head.weight is found.model.embed_tokens.weight
    assert tied == (name == "smollm2-135m")
    theirs = dict(expected.named_parameters())
    assert theirs.keys() == dict(found.named_parameters()).keys()
    for key, weight in found.named_parameters():
        assert weight.dtype == torch.float32 and weight.requires_grad
        if weight.ndim == 1:
            assert torch.equal(weight, theirs[key]), key
        else:
            for drawn in (weight, theirs[key]):
                # Five standard errors of a spread, and of a mean.
                error = 5 / (2 * drawn.numel()) ** 0.5
                assert float(drawn.detach().std()) == pytest.approx(
                    config.initializer_range, rel=error
                )
                assert abs(drawn.detach().mean()) < 2 * error * config.initializer_range, key
    assert torch.equal(logits(found), logits(again)) and logits(found).isfinite().all()
    assert not torch.equal(logits(found), logits(other))


def test_a_checkpoint_keeps_its_rotary_base(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint(
        tmp_path / "m",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    base = load_model(folder, device="cpu")
    full = variant_of(base, planned_config(base.config, LayerPlan.build(3, "all")))
    assert torch.equal(logits(full, 50), logits(base, 50))
