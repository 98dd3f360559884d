"""Compiling decoder layers: what lies between matrix products and attention in a few kernels."""

from __future__ import annotations

from typing import Any

import torch

# One token's matrix products, which only read weights, become kernels that do so at nearly the
# speed of a copy, fused with what surrounds them, instead of calls of a library that don't.
_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}


@torch.compiler.disable
def _end_graph(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing that a compiler can look into."""


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
            # In a graph by itself: for one token, every program of the product would compute the
            # gate anew.
            down.register_forward_pre_hook(_end_graph)
        module.compile(dynamic=True, options=_OPTIONS)
