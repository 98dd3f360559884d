"""Turn a pretrained checkpoint into a hybrid one: weights untouched, layer types, pattern and
rotary base set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from longgen import __version__
from longgen.checkpoint import (
    RECORD,
    check_output,
    check_weights,
    load_tokenizer,
    read_config,
    refuse_hybrid,
    staged_checkpoint,
    write_json,
)
from longgen.data.corpus import check_vocabulary
from longgen.errors import UsageError
from longgen.hf import CONFIG_CLASSES
from longgen.plan import LayerPlan
from longgen.rope import rope_theta_for, rope_theta_of


def hybrid_config(
    base: Any, plan: LayerPlan, *, context: int | None = None, rope_theta: float | None = None
) -> Any:
    """Return the hybrid's config for a base model's config.

    Args:
        base: config of a llama, mistral, qwen2 or qwen3 model.
        plan: which layers stay full and what the others see.
        context: target length in tokens; None keeps the model's.
        rope_theta: rotary base; None follows `longgen.rope.rope_theta_for`.

    Raises:
        UsageError: if plan and model have different numbers of layers, the context is below the
            model's own, or the rotary base cannot be raised.
    """
    if plan.num_layers != base.num_hidden_layers:
        raise UsageError(
            f"The plan has {plan.num_layers} layers, the model {base.num_hidden_layers}."
        )
    original = base.max_position_embeddings
    context = context or original
    if context < original:
        raise UsageError(
            f"The context of {context:,} tokens is below the {original:,} that the model has "
            "already; leave it out or give a longer one."
        )
    if rope_theta is not None and not 0 < rope_theta < float("inf"):
        raise UsageError(f"The rotary base is {rope_theta}; give a number above 0.")
    head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    theta = rope_theta or rope_theta_for(rope_theta_of(base), original, context, head_dim)
    fields = base.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "layer_types"):
        fields.pop(name, None)
    fields.update(
        max_position_embeddings=context,
        rope_parameters={**base.rope_parameters, "rope_theta": theta},
        layer_types=plan.layer_types,
        longgen={"pattern": plan.pattern.to_dict()},
        # Its kernels have none; 0 is also what every released model of these families has.
        attention_dropout=0.0,
    )
    if "sliding_window" in fields:
        fields.update(sliding_window=None)
    if "use_sliding_window" in fields:
        fields.update(use_sliding_window=False)
    return CONFIG_CLASSES[base.model_type](**fields)


def load_as_hybrid(
    model: str | Path,
    plan: LayerPlan,
    *,
    context: int | None = None,
    rope_theta: float | None = None,
    dtype: torch.dtype | str = "auto",
) -> Any:
    """Load a plain checkpoint's weights into its hybrid; arguments as in `hybrid_config`.

    Raises:
        UsageError: if the checkpoint is a hybrid already, of an unknown architecture, or lacks
            weights.
    """
    base = read_config(model)
    refuse_hybrid(base, model)
    config = hybrid_config(base, plan, context=context, rope_theta=rope_theta)
    check_weights(model)
    hybrid, loading = AutoModelForCausalLM.from_pretrained(
        model, config=config, dtype=dtype, output_loading_info=True
    )
    absent = sorted(loading["missing_keys"]) + sorted(loading["mismatched_keys"])
    if absent:
        raise UsageError(
            f"The checkpoint in {model} lacks {len(absent)} weights that its config.json asks for "
            f"({absent[0]}, ...). Download it again."
        )
    return hybrid


def save_hybrid(model: Any, tokenizer: Any, folder: Path, record: dict[str, Any]) -> None:
    """Write a hybrid checkpoint with its tokenizer and the record of how it was made, whole or not
    at all."""
    with staged_checkpoint(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        write_json(staging / RECORD, record)


def convert(
    model: str | Path,
    out: str | Path,
    plan: LayerPlan,
    *,
    context: int | None = None,
    rope_theta: float | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint without training and write it to `out`; returns the record that lies
    beside it.

    The result computes what the pattern lets it see; without training it is not yet good at it.

    Args:
        model: folder of the base checkpoint.
        out: folder to write, new or empty.
        plan: which layers stay full and what the others see.
        context: length in tokens that the result is for; None keeps the model's.
        rope_theta: rotary base; None follows `longgen.rope.rope_theta_for`.

    Raises:
        UsageError: for anything that the user can put right; nothing is written then.
    """
    folder = check_output(out)
    base = read_config(model)
    refuse_hybrid(base, model)
    tokenizer = load_tokenizer(model)
    check_vocabulary(tokenizer, base.vocab_size)
    hybrid = load_as_hybrid(model, plan, context=context, rope_theta=rope_theta)
    record = {
        "kind": "convert",
        "longgen": __version__,
        "model": str(model),
        "context": hybrid.config.max_position_embeddings,
        "original_context": base.max_position_embeddings,
        "rope_theta": hybrid.config.rope_parameters["rope_theta"],
        "layers": plan.layers,
        "pattern": plan.pattern.to_dict(),
    }
    save_hybrid(hybrid, tokenizer, folder, record)
    return record
