"""A model's pass over one token of one sequence or of a few, in as few launches as it takes.

transformers' layers, compiled, run any number of tokens; for a single one, which is bound by
reading weights, this takes their weights and goes its own way: five launches a sparse layer, or six
where strides move tokens. A few tokens take two more, for the norms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from longgen.engine.decode import DecodeBatch
from longgen.engine.linear import Norm, Rotary, project, project_gated
from longgen.hf import FAMILIES
from longgen.hf.head import LMHead
from longgen.shapes import HYBRID_PREFIX

_PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# Of sequences that go this way together. Up to `triton_few.MOST_TOKENS` can; from two on it has not
# been measured whether that is faster than the compiled layers.
MOST_TOKENS = 1


def can_run(model: Any) -> bool:
    """Whether a model is what this module computes: a family of ours, whose products are plain
    (not quantised, no adapters) and lie in memory as PyTorch makes them."""
    config = model.config
    if config.model_type.removeprefix(HYBRID_PREFIX) not in FAMILIES or config.hidden_act != "silu":
        return False
    products = [
        module for name, module in model.model.layers.named_modules() if name.endswith(_PRODUCTS)
    ]
    return (
        len(products) == len(_PRODUCTS) * len(model.model.layers)
        and all(type(module) is nn.Linear for module in products)
        and type(model.lm_head) is LMHead
        and all(module.weight.is_contiguous() for module in (*products, model.lm_head))
        and all(layer.mlp.gate_proj.bias is None for layer in model.model.layers)
        and len({x.device for x in model.parameters()}) == 1
    )


def logits_of(model: Any, batch: DecodeBatch, tokens: torch.Tensor) -> torch.Tensor:
    """Put one new token of each of a few sequences through a model.

    Args:
        model: a LongGen causal language model for which `can_run` is true.
        batch: the sequences and the places of their tokens.
        tokens: (N,), on the device.

    Returns:
        logits (N, vocabulary).
    """
    # Kernels that begin early read of it before they wait for the one ahead.
    batch.prepare()
    decoder = model.model
    hidden: torch.Tensor = decoder.embed_tokens(tokens)
    cos, sin = (x[0] for x in decoder.rotary_emb(hidden[None], batch.lengths[None] - 1))
    for index, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        ways = attention.q_proj, attention.k_proj, attention.v_proj
        qkv = project(
            hidden,
            [way.weight for way in ways],
            [way.bias for way in ways],
            norm=Norm.of(layer.input_layernorm),
        )
        rotary = Rotary(cos, sin)
        if hasattr(attention, "q_norm"):
            # Qwen3 norms its heads.
            rotary = Rotary(cos, sin, Norm.of(attention.q_norm), Norm.of(attention.k_norm))
        out = batch.rotate_and_attend(index, qkv, rotary, attention.scaling)
        hidden = project(
            out.view(len(tokens), -1),
            [attention.o_proj.weight],
            [attention.o_proj.bias],
            residual=hidden,
        )
        gated = project_gated(
            hidden,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            norm=Norm.of(layer.post_attention_layernorm),
        )
        hidden = project(gated, [mlp.down_proj.weight], [mlp.down_proj.bias], residual=hidden)
    head = model.lm_head
    return project(hidden, [head.weight], [head.bias], norm=Norm.of(decoder.norm))
