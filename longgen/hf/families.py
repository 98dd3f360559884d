"""The model families: one factory makes a config and model classes for each and registers them with
transformers.

Each family has a `model_type` of its own ("longgen_llama", ...), so that software that does not
know it refuses to load the checkpoint instead of running it densely.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from longgen.errors import UsageError
from longgen.hf.model import HybridCausalLMMixin, HybridModelMixin
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import HYBRID_PREFIX

# Base model type -> prefix of transformers' class names, and whether its decoder looks masks up by
# layer type.
FAMILIES = {
    "llama": ("Llama", False),
    "mistral": ("Mistral", False),
    "qwen2": ("Qwen2", True),
    "qwen3": ("Qwen3", True),
}

_STUB = '''"""Lets this checkpoint load with trust_remote_code=True, given `pip install longgen`."""

from longgen.hf import {names}

__all__ = [{listed}]
'''


class HybridConfigMixin:
    """Add the layer plan to a transformers config.

    Two fields are stored in config.json: `layer_types`, one string a layer, and `longgen`,
    {"pattern": {...}}.
    """

    layer_types: list[str] | None
    longgen: dict[str, Any] | None
    num_hidden_layers: int

    @property
    def layer_plan(self) -> LayerPlan:
        """Which layers are full, and what the others see."""
        pattern = (self.longgen or {}).get("pattern", {})
        return _layer_plan(tuple(self.layer_types or ()), tuple(sorted(pattern.items())))

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        modules: dict[str, list[str]] = {}
        for reference in self.auto_map.values():  # type: ignore[attr-defined]
            module, name = reference.split(".")
            modules.setdefault(module, []).append(name)
        for module, names in modules.items():
            stub = _STUB.format(names=", ".join(names), listed=", ".join(f'"{n}"' for n in names))
            (Path(save_directory) / f"{module}.py").write_text(stub, encoding="utf-8")


def _check_plan(config: Any) -> None:
    """Refuse a config whose plan cannot be what its checkpoint was trained with."""
    if config.layer_types is None or config.longgen is None:
        missing, other = ("layer_types", "longgen")[:: 1 if config.layer_types is None else -1]
        raise UsageError(
            f"The config has {other} but no {missing}; a hybrid needs both. Take the config.json "
            "that the checkpoint was saved with."
        )
    if set(config.longgen) != {"pattern"} or not isinstance(config.longgen["pattern"], dict):
        raise UsageError(
            f"The config's longgen entry is {config.longgen!r}; this version knows "
            '{"pattern": {...}} alone. Update longgen, or take the config.json that the checkpoint '
            "was saved with."
        )
    SparsePattern.from_dict(config.longgen["pattern"])
    LayerPlan.from_layer_types(config.layer_types, SparsePattern())
    if len(config.layer_types) != config.num_hidden_layers:
        raise UsageError(
            f"The config lists {len(config.layer_types)} layer_types for "
            f"{config.num_hidden_layers} layers."
        )


@lru_cache(maxsize=64)
def _layer_plan(layer_types: tuple[str, ...], pattern: tuple[tuple[str, int], ...]) -> LayerPlan:
    return LayerPlan.from_layer_types(layer_types, SparsePattern.from_dict(dict(pattern)))


def _make(base_type: str) -> tuple[type, type, type]:
    prefix, by_layer_type = FAMILIES[base_type]
    base_config: Any = getattr(transformers, f"{prefix}Config")
    base_model: Any = getattr(transformers, f"{prefix}Model")
    base_lm: Any = getattr(transformers, f"{prefix}ForCausalLM")
    name = f"LongGen{prefix}"

    def post_init(self: Any, **kwargs: Any) -> None:
        # transformers does not store the attention in a checkpoint; without this it would come back
        # as dense sdpa.
        kwargs.setdefault("attn_implementation", "longgen")
        if self.layer_types is None and self.longgen is None:
            plan = LayerPlan.build(self.num_hidden_layers)
            self.layer_types = plan.layer_types
            self.longgen = {"pattern": plan.pattern.to_dict()}
        _check_plan(self)
        if getattr(self, "sliding_window", None) is not None:
            self.sliding_window = None
        if hasattr(self, "use_sliding_window"):
            self.use_sliding_window = False
        base_config.__post_init__(self, **kwargs)
        # After it, since a checkpoint from a repository brings a map that names that repository.
        self.auto_map = {
            "AutoConfig": f"configuration_longgen.{name}Config",
            "AutoModel": f"modeling_longgen.{name}Model",
            "AutoModelForCausalLM": f"modeling_longgen.{name}ForCausalLM",
        }

    config_class: Any = strict(
        type(
            f"{name}Config",
            (HybridConfigMixin, base_config),
            {
                "__doc__": f"Configure a LongGen hybrid of the {prefix} family.",
                "__module__": __name__,
                "__annotations__": {"layer_types": list[str] | None, "longgen": dict | None},
                "__post_init__": post_init,
                "layer_types": None,
                "longgen": None,
                "model_type": HYBRID_PREFIX + base_type,
                # The base class allows only transformers' own layer types.
                "validate_layer_type": lambda self: None,
            },
        )
    )
    model_class: Any = type(
        f"{name}Model",
        (HybridModelMixin, base_model),
        {
            "__doc__": f"Decoder of a LongGen hybrid of the {prefix} family.",
            "__module__": __name__,
            "config_class": config_class,
            "masks_by_layer_type": by_layer_type,
        },
    )
    lm_class = type(
        f"{name}ForCausalLM",
        (HybridCausalLMMixin, base_lm),
        {
            "__doc__": f"LongGen hybrid of the {prefix} family with its language-model head.",
            "__module__": __name__,
            "config_class": config_class,
            "decoder_class": model_class,
        },
    )
    # transformers notes what a class can record (output_hidden_states) when a model of it is built,
    # by the name of the class; our decoders are built as the base class.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(model_class), model_class._can_record_outputs)
    AutoConfig.register(HYBRID_PREFIX + base_type, config_class)
    AutoModel.register(config_class, model_class)
    AutoModelForCausalLM.register(config_class, lm_class)
    return config_class, model_class, lm_class


LongGenLlamaConfig, LongGenLlamaModel, LongGenLlamaForCausalLM = _make("llama")
LongGenMistralConfig, LongGenMistralModel, LongGenMistralForCausalLM = _make("mistral")
LongGenQwen2Config, LongGenQwen2Model, LongGenQwen2ForCausalLM = _make("qwen2")
LongGenQwen3Config, LongGenQwen3Model, LongGenQwen3ForCausalLM = _make("qwen3")

CONFIG_CLASSES = {
    "llama": LongGenLlamaConfig,
    "mistral": LongGenMistralConfig,
    "qwen2": LongGenQwen2Config,
    "qwen3": LongGenQwen3Config,
}


def is_hybrid(config: Any) -> bool:
    """Whether a config is that of a LongGen hybrid."""
    return str(config.model_type).startswith(HYBRID_PREFIX)
