"""What lies between the matrix products of a decoder layer, in few kernels and in bf16."""

from __future__ import annotations

import inspect
import logging
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

import torch

Tensor = torch.Tensor

_ROTARY = "apply_rotary_pos_emb"
_logger = logging.getLogger(__name__)


def compile_elementwise(model: Any, *, projections: bool = False, final_norm: bool = True) -> None:
    """Compile what lies between the matrix products of a decoder layer: norms, rotary embedding and
    the gate of the MLP.

    One graph of each serves all layers. Attention stays outside: its kernels are compiled on their
    own. So do matrix products, whose results may be kept.

    Args:
        model: a causal language model of transformers.
        projections: compile products too, which have something to fuse in fp8.
        final_norm: compile the norm behind the layers, which FSDP2 has hooks on.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, *norms):
            if norm is not None:
                norm.compile()
        _fuse_rotary(attention)
        if projections:
            mlp.compile()
            for one in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                one.compile()
        else:
            mlp.forward = partial(_gated_mlp, mlp)
    if final_norm:
        model.model.norm.compile()


def norms_follow_autocast(model: Any) -> None:
    """Have norms give what autocast computes in.

    With weights in fp32 they give fp32, of which every projection behind them makes a copy of its
    own, forward and backward; the numbers that enter products are the same.

    Args:
        model: a causal language model of transformers.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm_in_autocast, module)


def _norm_in_autocast(norm: Any, x: Tensor) -> Tensor:
    # No hook, which would be compiled apart: a kernel more, and the norm's output in fp32 between.
    out = type(norm).forward(norm, x)
    kind = out.device.type
    out = out.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else out
    return out  # type: ignore[no-any-return]


def _gate(activation: Any, gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _compiled_gate() -> Any:
    return torch.compile(_gate)


def _gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    """Run a gated MLP, as every family has it, with its element-wise part compiled."""
    gated = _compiled_gate()(mlp.act_fn, mlp.gate_proj(x), mlp.up_proj(x))
    return mlp.down_proj(gated)  # type: ignore[no-any-return]


@lru_cache(maxsize=8)
def _forward_with_fused_rotary(forward: FunctionType) -> FunctionType | None:
    """Return an attention module's forward that rotates in a compiled function; None, said once for
    all layers, if it does not call transformers' by its name."""
    if _ROTARY not in forward.__code__.co_names:
        _logger.warning(
            "%s does not rotate by transformers' %s; its rotary embedding is not compiled.",
            forward.__qualname__,
            _ROTARY,
        )
        return None
    compiled = torch.compile(partial(forward.__globals__[_ROTARY], unsqueeze_dim=2))

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # (B, H, T, D), but in memory heads follow each other token by token. In that order, which
        # attention and projections work in, nothing has to be copied, forward or backward; the
        # compiled function has to see it, or gradients that come to it would be.
        q, k = compiled(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    names = {**forward.__globals__, _ROTARY: rotate}
    fused = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def _fuse_rotary(attention: Any) -> None:
    """Rotate queries and keys of an attention module in one kernel instead of ten."""
    # Without what decorates it, which takes old names of arguments: a layer's call has new ones.
    fused = _forward_with_fused_rotary(inspect.unwrap(type(attention).forward))
    if fused is not None:
        attention.forward = fused.__get__(attention)
