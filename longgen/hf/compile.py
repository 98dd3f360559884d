"""Compiling decoder layers: what lies between matrix products and attention in a few kernels."""

from __future__ import annotations

from typing import Any

# One token's matrix products, which only read weights, become kernels that do so at nearly the
# speed of a copy, fused with what surrounds them, instead of calls of a library that don't.
_OPTIONS = {"coordinate_descent_tuning": True}


def compile_layers(model: Any) -> None:
    """Have `torch.compile` fuse norms, rotary embedding, gates and residuals of a decoder.

    One graph serves all layers, and any number of tokens but one, which has a second. Attention
    stays outside: its kernels are compiled on their own. Calling it again changes nothing.

    Args:
        model: a causal language model of transformers.
    """
    for module in (*model.model.layers, model.model.norm):
        if module._compiled_call_impl is None:
            module.compile(dynamic=True, options=_OPTIONS)
