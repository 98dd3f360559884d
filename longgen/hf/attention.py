"""The attention function that transformers calls in every layer, and where it finds what the layer
sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.modeling_utils import AttentionInterface

from longgen.attention import IMPLEMENTATIONS, attention
from longgen.errors import UsageError
from longgen.layout import Layout
from longgen.parallel import ContextLayouts
from longgen.plan import LayerPlan

# "longgen" chooses by itself; "longgen_reference" and so on ask for one implementation by name.
ATTENTION_NAMES = {
    "longgen" if impl == "auto" else f"longgen_{impl}": impl for impl in IMPLEMENTATIONS
}


@dataclass(frozen=True, slots=True)
class LayerLayouts:
    """Carry one forward pass's layouts to all its layers."""

    plan: LayerPlan
    full: Layout
    sparse: Layout

    def of_layer(self, layer_idx: int) -> Layout:
        """Return where one layer's queries and keys stand."""
        return self.full if self.plan.layers[layer_idx] == "F" else self.sparse

    def attend(
        self,
        layer_idx: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        impl: str,
    ) -> torch.Tensor:
        """Attend in one layer: q (B, T, H, D), k and v (B, S, Hkv, D) to (B, T, H, D)."""
        return attention(
            q,
            k,
            v,
            pattern=self.plan.pattern_of(layer_idx),
            layout=self.of_layer(layer_idx),
            scale=scale,
            impl=impl,
        )


class AttentionStep(Protocol):
    """What an engine with a cache of its own passes through the model to do the attending."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Attend in one layer: q (B, H, T, D), k and v (B, Hkv, T, D) to (B, T, H, D)."""
        ...


def check_attention_name(requested: str | None) -> str:
    """Return the attention to use, refusing any that does not know the pattern."""
    if requested is None:
        return "longgen"
    if requested not in ATTENTION_NAMES:
        raise UsageError(
            f'attn_implementation="{requested}" would ignore the sparse pattern that this model '
            "was trained with and run it densely. Leave it out, or choose one of "
            f"{', '.join(ATTENTION_NAMES)}."
        )
    return requested


# What it does depends on the layer's number and on documents that differ from batch to batch: a
# compiler would make a graph for each.
@torch.compiler.disable
def longgen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    longgen_layouts: LayerLayouts | ContextLayouts | None = None,
    longgen_step: AttentionStep | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in one layer; query (B, H, T, D), key and value (B, Hkv, S, D), rotary applied;
    returns (B, T, H, D)."""
    config: Any = module.config
    layer_idx: Any = module.layer_idx
    if longgen_step is not None:
        return longgen_step.attend(layer_idx, query, key, value, scaling), None
    if longgen_layouts is None:
        raise UsageError(
            f"The longgen attention runs only inside LongGen models; {type(module).__name__} was "
            "called by another. Convert the checkpoint with `longgen convert` first."
        )
    if dropout:
        raise UsageError(
            f"attention_dropout is {dropout}; LongGen's kernels have no dropout. Set "
            "config.attention_dropout = 0."
        )
    if key.shape[1] != config.num_key_value_heads:
        raise UsageError(
            f"The layer got {key.shape[1]} of {config.num_key_value_heads} key/value heads: "
            "transformers' tensor parallelism is not supported, because the pattern goes by "
            "global head numbers. Load without tp_plan."
        )
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embedding leaves fp32 behind under autocast; the kernels would run at a fraction of
        # their speed.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (states.to(dtype) for states in (query, key, value))
    out = longgen_layouts.attend(
        layer_idx,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scaling,
        ATTENTION_NAMES[config._attn_implementation],
    )
    return out, None


for _name in ATTENTION_NAMES:
    AttentionInterface.register(_name, longgen_attention)
