"""Compiling decoder layers: what lies between matrix products and attention in a few kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.test_operators import realize

# One token's matrix products, which only read weights, become kernels that do so at nearly the
# speed of a copy, fused with what surrounds them, instead of calls of a library that don't.
_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}


def _settle(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Have a product's input in memory before it begins: for one token, every program of the
    product would otherwise compute the gate anew."""
    return (realize(args[0]), *args[1:])


def compile_layers(model: Any) -> None:
    """Have `torch.compile` fuse norms, rotary embedding, gates and residuals of a decoder.

    One set of graphs serves all layers, and any number of tokens but one, which has a second.
    Attention stays outside: its kernels are compiled on their own. Calling it again changes
    nothing.

    Args:
        model: a causal language model of transformers.
    """
    for module in (*model.model.layers, model.model.norm):
        if module._compiled_call_impl is not None:
            continue
        down = getattr(getattr(module, "mlp", None), "down_proj", None)
        if down is not None:
            down.register_forward_pre_hook(_settle)
        module.compile(dynamic=True, options=_OPTIONS)
