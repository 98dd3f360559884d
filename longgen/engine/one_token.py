"""A model's pass over one token of one sequence, in as few launches as it takes.

transformers' layers, compiled, run any number of tokens; for a single one, which is bound by
reading weights, this takes their weights and goes its own way: five launches a sparse layer, or six
where strides move tokens.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils import output_capturing

from longgen.engine.decode import DecodeBatch
from longgen.engine.linear import Norm, Rotary, project, project_gated
from longgen.hf import FAMILIES
from longgen.hf import compile as compiling
from longgen.hf.head import LMHead
from longgen.shapes import HYBRID_PREFIX

# Classes of a family's layers in transformers, behind its prefix.
_CLASSES = ("DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
# Whose hooks do nothing that is missing here.
_HOOKS_OF = (compiling.__name__, output_capturing.__name__)


def can_run(model: Any) -> bool:
    """Whether a model is what this module computes: a family of ours in transformers' own layers,
    with nothing put in their place or added (quantised products, adapters, hooks), on one device,
    whose weights lie in memory as PyTorch makes them."""
    family = model.config.model_type.removeprefix(HYBRID_PREFIX)
    if family not in FAMILIES:
        return False
    decoder, (prefix, _) = model.model, FAMILIES[family]
    modeling = sys.modules[getattr(transformers, f"{prefix}Model").__module__]
    known = {getattr(modeling, prefix + name) for name in _CLASSES}
    known |= {nn.Linear, nn.Embedding, nn.ModuleList, type(ACT2FN["silu"]), type(decoder)}
    return (
        type(model.lm_head) is LMHead
        and all(type(module) in known for module in decoder.modules())
        and not any(map(_is_changed, (*decoder.modules(), model.lm_head)))
        # Quantised weights and parts of them are tensors of classes of their own.
        and all(type(x) is nn.Parameter and x.is_contiguous() for x in model.parameters())
        and len({x.device for x in model.parameters()}) == 1
        and all(_has_known_biases(layer) for layer in decoder.layers)
    )


def _is_changed(module: nn.Module) -> bool:
    """Whether a module does more than its class says."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return "forward" in vars(module) or any(
        getattr(hook, "__module__", None) not in _HOOKS_OF for hook in hooks
    )


def _has_known_biases(layer: Any) -> bool:
    """Whether queries, keys and values all have a bias or none has, and the gate has none."""
    attention, mlp = layer.self_attn, layer.mlp
    ways = attention.q_proj, attention.k_proj, attention.v_proj
    return (
        len({way.bias is None for way in ways}) == 1
        and mlp.gate_proj.bias is None
        and mlp.up_proj.bias is None
    )


def logits_of(model: Any, batch: DecodeBatch, token: torch.Tensor) -> torch.Tensor:
    """Put one new token of a sequence through a model.

    Args:
        model: a LongGen causal language model for which `can_run` is true.
        batch: the sequence and the place of its token.
        token: (1,), on the device.

    Returns:
        logits (1, vocabulary).
    """
    # Kernels that begin early read of it before they wait for the one ahead.
    batch.prepare()
    decoder = model.model
    hidden: torch.Tensor = decoder.embed_tokens(token)
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
            out.view(1, -1), [attention.o_proj.weight], [attention.o_proj.bias], residual=hidden
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
