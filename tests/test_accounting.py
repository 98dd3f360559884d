"""Accounting against brute force: dense masks, a real model's matrices, a real cache's tensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from longgen.accounting import (
    MemoryEstimate,
    check_fits,
    decode_bytes,
    expected_speedups,
    fits,
    forward_flops,
    forward_flops_per_token,
    full_plan,
    kv_bytes,
    kv_bytes_by_layer,
    serving_memory,
    training_flops,
    training_flops_per_token,
)
from longgen.errors import UsageError
from longgen.gpus import CATALOGUE, GIB, parse_gpus
from longgen.hf import CONFIG_CLASSES, cache_bytes
from longgen.layout import Layout
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import SHAPES, ModelShape

SMALL = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "vocab_size": 101,
    "max_position_embeddings": 512,
}
SHAPE = ModelShape(model_type="llama", **SMALL)  # type: ignore[arg-type]
LLAMA = SHAPES["llama-2-7b"]
PAPER = LayerPlan.build(32, "middle:12", SparsePattern.attention_sink())
CONTEXT = 131072


@st.composite
def plans(draw: st.DrawFn) -> LayerPlan:
    stride = draw(st.integers(0, 5))
    pattern = SparsePattern(
        block_size=draw(st.integers(1, 9)),
        sink_blocks=draw(st.integers(0, 3)),
        local_blocks=draw(st.integers(1, 5)),
        stride_blocks=stride,
        head_shift=draw(st.integers(0, 7)) if stride else 0,
    )
    return LayerPlan(draw(st.text("FS", min_size=3, max_size=3)), pattern)


def dense_masks(plan: LayerPlan, length: int) -> list[np.ndarray]:
    """Return one layer's mask after another: bool (Hkv, length, length)."""
    heads, layout = SHAPE.num_key_value_heads, Layout.causal(length)
    masks = (
        layout.dense_mask(plan.pattern_of(layer), heads)[0] for layer in range(plan.num_layers)
    )
    return [np.broadcast_to(mask, (heads, length, length)) for mask in masks]


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 90), st.integers(1, 3))
def test_kv_bytes_are_what_the_next_query_sees(plan: LayerPlan, length: int, batch: int) -> None:
    # One token more than the cache has seen: the last row is the next query, without itself.
    seen = [mask[:, -1, :-1].sum(-1).max() for mask in dense_masks(plan, length + 1)]
    both = 2 * SHAPE.num_key_value_heads * SHAPE.head_dim * batch
    assert kv_bytes_by_layer(SHAPE, plan, length, batch, 4) == [both * 4 * kept for kept in seen]
    assert kv_bytes(SHAPE, plan, length, batch) == both * 2 * sum(seen)


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 90))
def test_attention_flops_count_every_visible_pair(plan: LayerPlan, length: int) -> None:
    group = SHAPE.num_attention_heads // SHAPE.num_key_value_heads
    pairs = group * sum(int(mask.sum()) for mask in dense_masks(plan, length))
    # Two matrix products, a multiplication and an addition for each of head_dim entries.
    attention = 4 * SHAPE.head_dim * pairs
    config = LlamaConfig(**SMALL)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    flops = forward_flops(SHAPE, plan, length)
    assert flops == pytest.approx(attention + 2 * weights * length, rel=1e-12)
    logits = 2 * model.lm_head.weight.numel()
    prefill = forward_flops(SHAPE, plan, length, prefill_logits=True)
    assert flops - prefill == pytest.approx(logits * (length - 1), rel=1e-9, abs=1e-3)
    assert training_flops(SHAPE, plan, length) == 3 * flops
    assert forward_flops_per_token(SHAPE, plan, length) == flops / length
    assert training_flops_per_token(SHAPE, plan, length) == 3 * flops / length


@pytest.mark.parametrize("length", [1, 7, 50, 121])
@pytest.mark.parametrize(
    "pattern",
    [
        SparsePattern(block_size=4, sink_blocks=1, local_blocks=3),
        SparsePattern(block_size=3, sink_blocks=0, local_blocks=2, stride_blocks=5, head_shift=2),
    ],
)
def test_a_real_cache_holds_these_bytes(pattern: SparsePattern, length: int) -> None:
    plan = LayerPlan("SFS", pattern)
    config = CONFIG_CLASSES["llama"](
        **SMALL, layer_types=plan.layer_types, longgen={"pattern": pattern.to_dict()}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.ones(2, length, dtype=torch.long), use_cache=True).past_key_values
    assert cache_bytes(cache) == kv_bytes(SHAPE, plan, length, batch=2, bytes_per_element=4)


def test_the_papers_plan_saves_61_5_percent() -> None:
    saved = 1 - kv_bytes(LLAMA, PAPER, CONTEXT) / kv_bytes(LLAMA, full_plan(LLAMA), CONTEXT)
    assert round(100 * saved, 1) == 61.5
    assert kv_bytes(LLAMA, full_plan(LLAMA), CONTEXT) == 64 * GIB


def test_the_papers_plan_has_the_known_ceilings() -> None:
    speedups = expected_speedups(LLAMA, PAPER, CONTEXT)
    assert speedups.prefill == pytest.approx(1.77, rel=0.02)
    assert speedups.training == pytest.approx(1.77, rel=0.02)
    assert speedups.decode == pytest.approx(2.07, rel=0.02)


def test_every_layer_full_gains_nothing() -> None:
    speedups = expected_speedups(LLAMA, full_plan(LLAMA), CONTEXT, batch=3)
    assert (speedups.prefill, speedups.training, speedups.decode) == (1, 1, 1)


def test_decode_reads_weights_once_and_every_cache() -> None:
    weights = 2 * (SHAPE.num_parameters - SHAPE.embedding_parameters - 7 * SHAPE.hidden_size)
    plan = full_plan(SHAPE)
    assert decode_bytes(SHAPE, plan, 10, batch=5) == weights + 5 * kv_bytes(SHAPE, plan, 10)
    # A tied table is read as the output projection.
    tied = replace(SHAPE, tie_word_embeddings=True)
    assert decode_bytes(tied, plan, 10) == decode_bytes(SHAPE, plan, 10)


def test_serving_memory_holds_the_weights_and_the_cache() -> None:
    estimate = serving_memory(LLAMA, PAPER, CONTEXT, batch=2)
    assert estimate.parts["weights, bf16"] == 2 * LLAMA.num_parameters
    assert estimate.parts["KV cache, bf16"] == kv_bytes(LLAMA, PAPER, CONTEXT, batch=2)
    assert estimate.total == sum(estimate.parts.values())
    halves = serving_memory(LLAMA, PAPER, CONTEXT, batch=2, gpus=2).parts
    for name in ("weights, bf16", "KV cache, bf16"):
        assert halves[name] == estimate.parts[name] // 2
    # A prompt shorter than the chunk needs less of it.
    short, shorter = (serving_memory(LLAMA, PAPER, n).parts for n in (8192, 4096))
    assert shorter["prompt chunk at work"] < short["prompt chunk at work"]


def test_what_does_not_fit_is_refused_with_the_numbers_unless_forced() -> None:
    group = parse_gpus("1xH100")
    full = MemoryEstimate({"weights": 60 * GIB, "cache": 20 * GIB})
    assert fits(full, group.gpu)
    check_fits(full, group, "Serving")
    over = MemoryEstimate({"weights": 60 * GIB, "cache": 21 * GIB})
    assert not fits(over, group.gpu)
    check_fits(over, group, "Serving", force=True)
    with pytest.raises(UsageError) as caught:
        check_fits(over, group, "Serving 2 tokens")
    for word in ("Serving 2 tokens", "81.0 GiB", "80.0 GiB", "60.0 GiB", "1 x H100", "--force"):
        assert word in str(caught.value)
    assert CATALOGUE["H100-80GB"].memory_bytes == 80 * GIB


def test_a_plan_for_another_model_and_no_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="32 layers and the model 3"):
        kv_bytes(SHAPE, PAPER, 10)
    with pytest.raises(UsageError, match="0 tokens"):
        forward_flops(LLAMA, PAPER, 0)
