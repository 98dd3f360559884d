"""Hugging Face transformers integration; importing it registers the LongGen model types with the
Auto classes."""

from longgen.hf.cache import CACHE_NAME, HybridCache, SparseLayer, cache_bytes
from longgen.hf.families import (
    CONFIG_CLASSES,
    FAMILIES,
    LongGenLlamaConfig,
    LongGenLlamaForCausalLM,
    LongGenLlamaModel,
    LongGenMistralConfig,
    LongGenMistralForCausalLM,
    LongGenMistralModel,
    LongGenQwen2Config,
    LongGenQwen2ForCausalLM,
    LongGenQwen2Model,
    LongGenQwen3Config,
    LongGenQwen3ForCausalLM,
    LongGenQwen3Model,
    is_hybrid,
)
from longgen.hf.head import LMHead, linear_cross_entropy

__all__ = [
    "CACHE_NAME",
    "CONFIG_CLASSES",
    "FAMILIES",
    "HybridCache",
    "LMHead",
    "LongGenLlamaConfig",
    "LongGenLlamaForCausalLM",
    "LongGenLlamaModel",
    "LongGenMistralConfig",
    "LongGenMistralForCausalLM",
    "LongGenMistralModel",
    "LongGenQwen2Config",
    "LongGenQwen2ForCausalLM",
    "LongGenQwen2Model",
    "LongGenQwen3Config",
    "LongGenQwen3ForCausalLM",
    "LongGenQwen3Model",
    "SparseLayer",
    "cache_bytes",
    "is_hybrid",
    "linear_cross_entropy",
]
