"""One set of weights for all variants of a model: hybrid, all layers full, and transformers' own.

The variants are modules over the same parameters, so that a model, however large, is there once.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longgen.convert import hybrid_config
from longgen.hf import is_hybrid
from longgen.plan import LayerPlan
from longgen.shapes import HYBRID_PREFIX, ModelShape

# What a hybrid's config has beside its base's.
_LAYERS = "model.layers."
_OWN_FIELDS = ("model_type", "architectures", "auto_map", "layer_types", "longgen")


def shape_config(shape: ModelShape, context: int) -> Any:
    """Return transformers' config of a named shape, for sequences of up to `context` tokens."""
    fields: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max(context, shape.max_position_embeddings),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tie_word_embeddings,
        # Its tokens' meanings are not known.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if shape.family == "mistral":
        fields["sliding_window"] = shape.sliding_window
    for name in ("attention_bias", "mlp_bias"):
        if getattr(shape, name):
            fields[name] = True
    return AutoConfig.for_model(shape.family, **fields)


def random_model(
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    resident_layers: int | None = None,
    kept_on: torch.device | None = None,
) -> Any:
    """Make a model with random weights on its device: none of them ever is on the CPU for a GPU,
    unless `kept_on` says so.

    They are drawn as transformers does for a model that is to be trained, under which activations
    stay finite in every dtype; how long a model takes doesn't depend on them.

    Args:
        config: of the model.
        dtype: of weights.
        device: where they are.
        seed: of weights.
        resident_layers: layers that have weights; the others use theirs over again, in turn. A
            layer's weights are far larger than any cache of the device, so that it takes as long as
            with its own. None is all.
        kept_on: where the weights go, each when it is drawn, if not to the device: a CPU for what
            is to be shared out among GPUs and fits none of them. All layers then have their own.
    """
    torch.manual_seed(seed)
    if kept_on is not None:
        assert resident_layers is None
        return _drawn_one_by_one(config, dtype, device, kept_on)
    total = config.num_hidden_layers
    few = copy.deepcopy(config)
    if resident_layers is not None and resident_layers < total:
        few.num_hidden_layers = resident_layers
        if getattr(few, "layer_types", None):
            few.layer_types = few.layer_types[:resident_layers]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(few, dtype=dtype).eval()
    if few.num_hidden_layers == total:
        return model
    state = model.state_dict(keep_vars=True)
    for name in list(state):
        head, _, rest = name.partition(_LAYERS)
        first, _, rest = rest.partition(".")
        if rest and not head:
            for layer in range(int(first), total, few.num_hidden_layers):
                state[f"{_LAYERS}{layer}.{rest}"] = state[name]
    return _with_parameters(config, state, dtype, device)


def _drawn_one_by_one(
    config: Any, dtype: torch.dtype, device: torch.device, kept_on: torch.device
) -> Any:
    """Return a model whose weights are drawn on a device, which is fast on a GPU, and kept on
    another.

    Transformers draws where a weight is to stay. Its families' own are these: norms of one, biases
    of zero, all else normal (tests/bench/test_models.py compares them).
    """
    with torch.device("meta"):
        shapes: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    drawn: dict[torch.Tensor, torch.nn.Parameter] = {}
    state = {}
    for name, meta in shapes.state_dict(keep_vars=True).items():
        if meta not in drawn:  # tied ones are one
            values = torch.empty(meta.shape, dtype=meta.dtype, device=device)
            if meta.ndim > 1:
                values.normal_(0, config.initializer_range)
            else:
                values.fill_(0 if name.endswith("bias") else 1)
            drawn[meta] = torch.nn.Parameter(values.to(kept_on))
        state[name] = drawn[meta]
    return _with_parameters(config, state, dtype, kept_on)


def stock_config(config: Any) -> Any:
    """Return the config of transformers' own model, given that or its hybrid's."""
    if not is_hybrid(config):
        return copy.deepcopy(config)
    fields = {k: v for k, v in config.to_dict().items() if k not in _OWN_FIELDS}
    return AutoConfig.for_model(config.model_type.removeprefix(HYBRID_PREFIX), **fields)


def planned_config(config: Any, plan: LayerPlan) -> Any:
    """Return the config of the hybrid with a plan, given that of any variant of the model."""
    return hybrid_config(stock_config(config), plan)


def variant_of(model: Any, config: Any, attn_implementation: str | None = None) -> Any:
    """Return a model of another config over the same parameters.

    Args:
        model: whose parameters they are, on their device.
        config: of a variant: the names and shapes of its parameters are the same.
        attn_implementation: None is the variant's own.
    """
    chosen = {"attn_implementation": attn_implementation} if attn_implementation else {}
    state = model.state_dict(keep_vars=True)
    return _with_parameters(config, state, model.dtype, model.device, **chosen)


def _with_parameters(
    config: Any, state: dict[str, Any], dtype: torch.dtype, device: torch.device, **chosen: str
) -> Any:
    """Return a model of a config that has the parameters of a state, by their names."""
    with torch.device("meta"):
        other: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
    # The parameters themselves, so that tied ones stay one.
    other.load_state_dict(state, assign=True)
    with torch.device(device):
        # Frequencies are no parameters, and aren't in the state.
        other.model.rotary_emb = type(other.model.rotary_emb)(config=other.config)
    absent = [name for name, x in (*other.named_parameters(), *other.named_buffers()) if x.is_meta]
    assert not absent, f"{type(other).__name__} has no weights for {absent}"
    return other.eval()


def parameter_bytes(model: Any) -> int:
    """Return the bytes of a model's parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())
