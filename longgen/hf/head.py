"""Next-token loss without logits: the output projection and the cross-entropy in one chunked step.

At 32K tokens and 49K words the logits alone would take 6.4 GB in fp32. Here a chunk of them exists
at a time, in the forward pass, where its gradients are taken at once; the backward pass only scales
them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IGNORE_INDEX = -100
_CHUNK_BYTES = 512 << 20


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `hidden @ weight.T`, with gradients computed chunk by chunk in the
    forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk: int,
        with_grad: bool,
    ) -> torch.Tensor:
        # Autocast is applied by hand: inside it every chunk would cast the whole weight again.
        dtype = _compute_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            needs = [with_grad and needed for needed in ctx.needs_input_grad]
            grad_hidden = torch.empty_like(h) if needs[0] else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None  # type: ignore[arg-type]
            total = hidden.new_zeros((), dtype=torch.float32)
            for start in range(0, len(h), chunk):
                rows = slice(start, start + chunk)
                valid = targets[rows] != IGNORE_INDEX
                # Only -100 is left out; any other label outside the vocabulary is an error.
                index = targets[rows].masked_fill(~valid, 0)[:, None]
                logits = F.linear(h[rows], w).float()
                if bias is not None:
                    logits += bias.float()
                lse = torch.logsumexp(logits, -1, keepdim=True)
                total += ((lse - logits.gather(1, index))[:, 0] * valid).sum()
                if not any(needs[:3]):
                    continue
                # d loss / d logits = softmax - one_hot, zero in ignored rows.
                delta = logits.sub_(lse).exp_()
                delta.scatter_add_(1, index, -torch.ones_like(index, dtype=delta.dtype))
                delta *= valid[:, None]
                if grad_bias is not None:
                    grad_bias += delta.sum(0)
                delta = delta.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = delta @ w
                if grad_weight is not None:
                    grad_weight += delta.T @ h[rows]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_hidden is None else (grad_hidden * scale).to(ctx.dtypes[0]),
            None if grad_weight is None else (grad_weight * scale).to(ctx.dtypes[1]),
            None if grad_bias is None else (grad_bias * scale).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Return the sum over tokens of -log softmax(hidden @ weight.T + bias)[target], in fp32 nats.

    Args:
        hidden: (N, D) last hidden states.
        weight: (V, D) output projection.
        targets: (N,) token ids; -100 is left out of the sum.
        bias: (V,) or None.
        chunk_tokens: rows of logits that exist at a time; None chooses about 512 MiB of them.
    """
    chunk = chunk_tokens or max(64, _CHUNK_BYTES // (4 * weight.shape[0]))
    # Inside a Function gradients are always off, so it has to be told whether they are wanted.
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk, torch.is_grad_enabled())


@lru_cache(maxsize=1)
def liger_loss() -> Any:
    """Return Liger's fused linear cross-entropy (extra `liger`), or None where it is not
    installed."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    return liger_fused_linear_cross_entropy


def fused_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what `linear_cross_entropy` does: on a GPU by Liger's kernels if they are
    installed."""
    liger = liger_loss() if hidden.device.type == "cuda" else None
    if liger is None:
        return linear_cross_entropy(hidden, weight, targets, bias)
    return _by_liger(liger, hidden, weight, targets, bias)


def _by_liger(
    liger: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    dtype = _compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        # By default it would add up the chunks' gradients in half precision.
        total: torch.Tensor = liger(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            None if bias is None else bias.to(dtype),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            accum_dtype=torch.float32,
        )
    return total.float()


class LMHead(nn.Linear):
    """Project to the vocabulary, or, given labels, go straight to the loss.

    The loss is computed inside this module's forward so that FSDP2, which gathers a module's
    weights around its forward, has them there.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        num_items: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return logits (..., V), or the loss: a mean over labelled tokens, or their sum divided by
        `num_items`."""
        if shift_labels is None:
            return super().forward(hidden)
        targets = shift_labels.reshape(-1).to(hidden.device)
        total = fused_loss(hidden.flatten(0, -2), self.weight, targets, self.bias)
        if num_items is None:
            num_items = (targets != IGNORE_INDEX).sum().clamp(min=1)
        elif torch.is_tensor(num_items):
            num_items = num_items.to(total.device)
        return total / num_items


def shift(labels: torch.Tensor) -> torch.Tensor:
    """Turn labels (B, T) aligned with the inputs into those of the next token; the last column has
    none."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
