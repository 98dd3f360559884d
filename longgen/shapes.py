"""What size a model has (`ModelShape`), known from its config alone: no weights, no network.

Planning and accounting need nothing else, so that a run can be judged before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longgen.errors import UsageError
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan

HYBRID_PREFIX = "longgen_"

# What transformers fills in where a family's config.json is silent.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}
FAMILIES = tuple(_FAMILY_DEFAULTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Hold the numbers of a decoder model that decide its cost, under their Hugging Face names.

    Attributes:
        model_type: the config's model type: "llama", "mistral", "qwen2", "qwen3", or one of them
            behind "longgen_".
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads.
        head_dim: size of one head.
        vocab_size: rows of the embedding table.
        max_position_embeddings: context length of the model, in tokens.
        rope_theta: base of the rotary position embedding.
        rope_type: "default", or how transformers rescales the rotary embedding.
        tie_word_embeddings: whether the output projection is the embedding table.
        attention_bias: whether all four attention projections have a bias (Qwen2 has three of them
            regardless).
        mlp_bias: whether the MLP projections have a bias.
        sliding_window: tokens that the model's own sliding-window layers see; None if it has no
            such layers.
        plan: the layer plan of a model that is a LongGen hybrid already, otherwise None.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_type: str = "default"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    plan: LayerPlan | None = None

    @property
    def family(self) -> str:
        """The architecture without LongGen's prefix: "llama", "mistral", "qwen2" or "qwen3"."""
        return self.model_type.removeprefix(HYBRID_PREFIX)

    @property
    def is_hybrid(self) -> bool:
        """Whether the model is a LongGen hybrid already."""
        return self.plan is not None

    @property
    def layer_linear_parameters(self) -> int:
        """Weights of one decoder layer that take part in a matrix product with every token."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)

    @property
    def embedding_parameters(self) -> int:
        """Entries of the embedding table, which are also those of the output projection."""
        return self.vocab_size * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """All parameters of one decoder layer: weights, biases and norms."""
        query, key_value = (
            heads * self.head_dim for heads in (self.num_attention_heads, self.num_key_value_heads)
        )
        extra = 2 * self.hidden_size
        if self.attention_bias or self.family == "qwen2":
            extra += query + 2 * key_value
        if self.attention_bias:
            extra += self.hidden_size
        if self.mlp_bias:
            extra += 2 * self.intermediate_size + self.hidden_size
        if self.family == "qwen3":
            extra += 2 * self.head_dim
        return self.layer_linear_parameters + extra

    @property
    def num_parameters(self) -> int:
        """All parameters of the model, a tied embedding counted once."""
        tables = 1 if self.tie_word_embeddings else 2
        layers = self.num_hidden_layers * self.layer_parameters
        return layers + tables * self.embedding_parameters + self.hidden_size

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read the shape of a transformers config of a supported family or of its hybrid.

        Raises:
            UsageError: if the architecture is not supported or the config is incomplete.
        """
        return shape_from_fields(config.to_dict(), "The model's config")


def shape_from_fields(fields: Mapping[str, Any], source: str) -> ModelShape:
    """Read the shape from the fields of a config.json; `source` begins the sentences of errors."""
    model_type = str(fields.get("model_type") or "")
    family = model_type.removeprefix(HYBRID_PREFIX)
    if family not in FAMILIES:
        raise UsageError(
            f"{source} has the architecture {model_type!r}, which LongGen does not support. "
            f"Give a model of one of these: {', '.join(FAMILIES)}."
        )
    given = {**_FAMILY_DEFAULTS[family], **fields}

    def number(name: str, fallback: int | None = None) -> int:
        value = given.get(name)
        value = fallback if value is None else value
        if not isinstance(value, int) or value < 1:
            raise UsageError(
                f"{source} has {name} = {value!r}; a {model_type} model needs a whole number of at "
                "least 1 there."
            )
        return value

    heads = number("num_attention_heads")
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    return ModelShape(
        model_type=model_type,
        hidden_size=number("hidden_size"),
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", number("hidden_size") // heads),
        vocab_size=number("vocab_size"),
        max_position_embeddings=number("max_position_embeddings"),
        rope_theta=float(rope.get("rope_theta") or given.get("rope_theta") or 10000.0),
        rope_type=str(rope.get("rope_type") or rope.get("type") or "default"),
        tie_word_embeddings=bool(given.get("tie_word_embeddings")),
        attention_bias=family in ("llama", "qwen3") and bool(given.get("attention_bias")),
        mlp_bias=family == "llama" and bool(given.get("mlp_bias")),
        sliding_window=_sliding_window(family, given),
        plan=_hybrid_plan(given, source) if model_type != family else None,
    )


def _sliding_window(family: str, fields: Mapping[str, Any]) -> int | None:
    """Return the window that layers really use: Qwen configs carry one that is switched off."""
    window = fields.get("sliding_window")
    if family == "llama" or not window:
        return None
    if family == "mistral":
        return int(window)
    types = fields.get("layer_types")
    if types is not None:
        return int(window) if "sliding_attention" in types else None
    first = fields.get("max_window_layers", 28)
    used = fields.get("use_sliding_window") and first < fields["num_hidden_layers"]
    return int(window) if used else None


def _hybrid_plan(fields: Mapping[str, Any], source: str) -> LayerPlan:
    pattern, layer_types = (fields.get("longgen") or {}).get("pattern"), fields.get("layer_types")
    if not pattern or not layer_types:
        raise UsageError(
            f"{source} is of type {fields['model_type']} but lacks its layer_types or its longgen "
            "pattern. Convert the original model again."
        )
    return LayerPlan.from_layer_types(layer_types, SparsePattern.from_dict(pattern))


def load_shape(model: str | Path) -> ModelShape:
    """Return the shape of a named model, or of the checkpoint in a folder (from its config.json).

    Raises:
        UsageError: if `model` is neither, or the folder's model cannot be used.
    """
    named = SHAPES.get(str(model).lower())
    if named is not None:
        return named
    path = Path(model).expanduser() / "config.json"
    if not path.is_file():
        raise UsageError(
            f"{str(model)!r} is neither a named model nor a folder with a config.json. "
            f"The named models are {', '.join(SHAPES)}; a model of the Hugging Face hub has to be "
            "downloaded first."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not readable JSON ({error}). Download it again.") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{path} does not hold a JSON object. Download it again.")
    return shape_from_fields(fields, str(path))


SHAPES: dict[str, ModelShape] = {
    "llama-2-7b": ModelShape(
        model_type="llama",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    "llama-2-70b": ModelShape(
        model_type="llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    "llama-3-8b": ModelShape(
        model_type="llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    ),
    # Version 0.3: the first Mistral 7B (0.1) has a sliding window of 4,096 tokens in every layer.
    "mistral-7b": ModelShape(
        model_type="mistral",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32768,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
    ),
    "qwen3-8b": ModelShape(
        model_type="qwen3",
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
    ),
    "qwen2.5-7b": ModelShape(
        model_type="qwen2",
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=152064,
        max_position_embeddings=131072,
        rope_theta=1000000.0,
    ),
    "smollm2-135m": ModelShape(
        model_type="llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
}
