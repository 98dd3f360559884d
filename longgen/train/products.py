"""Matrix products that run once in a checkpointed layer: their results are kept, what lies between
them is computed again.

A product's backward pass needs what went into it, which is cheap to compute again (norms, rotary
embedding, gates), and not its result. `torch.utils.checkpoint` runs a layer a second time for all
of that; here the second run gets the results of the first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from longgen.attention.keep import within

Tensor = torch.Tensor


class _Product(torch.autograd.Function):
    """x W^T + b, or a result that is there already; keeps x and W alone, in this order, in both
    runs of a layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: tuple[Tensor] | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias) if kept is None else kept[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            grad @ weight if of_x else None,
            rows.t() @ x.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
            None,
        )


def _product_once(linear: nn.Linear, is_last: bool, x: Tensor) -> Tensor:
    """Return the linear layer's output, (..., in) to (..., out).

    Args:
        linear: the layer.
        is_last: whether nothing behind it is computed again, so that its result is not kept.
        x: its input.
    """
    run = within()
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if run is None or not run.products or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        # By hand: autocast does not reach into a function with a backward pass of its own.
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        if not run.again:
            out = _Product.apply(x, weight, bias, None)
            if not is_last:
                run.layer.outputs.append((run.layer.hold(out.detach()),))
            return out  # type: ignore[no-any-return]
        if is_last:
            # Any numbers do; these take no memory.
            kept = (x.new_zeros(()).expand(*x.shape[:-1], len(weight)),)
        else:
            kept = run.layer.next()  # type: ignore[assignment]
        return _Product.apply(x, weight, bias, kept)  # type: ignore[no-any-return]


def keep_products_of(model: Any) -> None:
    """Have the linear layers of a model's decoder keep their results in checkpointed layers.

    Args:
        model: a causal language model of transformers, with projections as `nn.Linear`.

    Raises:
        TypeError: if a projection is of another class (fp8, say), whose product is its own affair.
    """
    for layer in model.model.layers:
        for module in layer.modules():
            if not isinstance(module, nn.Linear):
                continue
            if type(module) is not nn.Linear:
                raise TypeError(f"{type(module).__name__} computes its product by itself.")
            module.forward = partial(_product_once, module, module is layer.mlp.down_proj)  # type: ignore[method-assign]
