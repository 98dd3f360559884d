"""The kernels as operators of PyTorch: compilers, checkpointing and CUDA graphs see one node each.

Tables are arguments, so that an operator depends on nothing but its inputs. Where nothing looks at
operators, `attend_listed` and `attend_dense` call the kernels past them: PyTorch's handling of an
operator written in Python takes longer than the kernels need for a few thousand tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from longgen.attention.flash.plan import Mask

Tensor = torch.Tensor


@torch.library.custom_op("longgen::flash_listed", mutates_args=(), device_types="cuda")
def flash_listed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward: list[Tensor],
    backward: list[Tensor],
    strided: list[Tensor],
    mask: str,
    backward_mask: str,
    strided_mask: str,
    tile_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend by lists of tiles: q (B, T, H, D), k and v (B, S, Hkv, D) to out (B, T, H, D) and lse
    (B, H, T) in fp32. The lists are those of `plan.Tables`."""
    from longgen.attention.flash.hopper import listed_forward

    return listed_forward(q, k, v, forward, Mask.decode(mask), tile_k, scale)


@flash_listed.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("longgen::flash_listed_backward", mutates_args=(), device_types="cuda")
def flash_listed_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    backward: list[Tensor],
    strided: list[Tensor],
    mask: str,
    strided_mask: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    from longgen.attention.flash.hopper import listed_backward

    return listed_backward(
        *(grad, grad_lse, q, k, v, out, lse),
        backward,
        Mask.decode(mask),
        strided,
        Mask.decode(strided_mask) if strided_mask else None,
        scale,
    )


@flash_listed_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_listed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, forward, backward, strided, _, *ctx.masks, _, ctx.scale = inputs
    ctx.lengths = [len(x) for x in (forward, backward, strided)]
    ctx.save_for_backward(q, k, v, *output, *backward, *strided)
    ctx.set_materialize_grads(False)


def _listed_gradients(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v, out, lse, *tables = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    split = ctx.lengths[1]
    return _backward(
        flash_listed_backward,
        *(grad, grad_lse, q, k, v, out, lse),
        tables[:split],
        tables[split:],
        *ctx.masks,
        ctx.scale,
    )


def _listed_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    # PyTorch wants lists for lists.
    nothing = ([None] * length for length in ctx.lengths)
    return *_listed_gradients(ctx, *grads), *nothing, *[None] * 5


flash_listed.register_autograd(_listed_backward, setup_context=_save_listed)


@torch.library.custom_op("longgen::flash_dense", mutates_args=(), device_types="cuda")
def flash_dense(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend causally, q (B, T, H, D) to the last key of k, v (B, S, Hkv, D); or, with cumulative
    lengths, within packed documents (N, H, D). Returns out and lse (B, H, T) or (H, N) in fp32."""
    from longgen.attention.flash.hopper import dense_forward

    return dense_forward(q, k, v, cu_seqlens, scale)


@flash_dense.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("longgen::flash_dense_backward", mutates_args=(), device_types="cuda")
def flash_dense_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    from longgen.attention.flash.hopper import dense_backward

    return dense_backward(grad, grad_lse, q, k, v, out, lse, cu_seqlens, scale)


@flash_dense_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_dense(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _dense_gradients(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    taken = (grad, grad_lse, q, k, v, out, lse, cu_seqlens, ctx.scale)
    return *_backward(flash_dense_backward, *taken), None, None


flash_dense.register_autograd(_dense_gradients, setup_context=_save_dense)


class _Past(torch.autograd.Function):
    """What `flash_listed` and `flash_dense` do, without the operators.

    Without a `setup_context` too: with one, PyTorch inspects a signature at each call.
    """

    @staticmethod
    def forward(
        ctx: Any, op: Any, save: Callable[..., None], gradients: Callable[..., Any], *args: Any
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _body(op)(*args)
        save(ctx, args, found)
        ctx.gradients, ctx.number = gradients, len(args)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dq, dk, dv, *_ = ctx.gradients(ctx, *grads)
        return None, None, None, dq, dk, dv, *[None] * (ctx.number - 3)


def _body(op: Any) -> Callable[..., Any]:
    """Return the function that an operator was made of."""
    body: Callable[..., Any] = op._init_fn
    return body


def attend_listed(*args: Any) -> tuple[Tensor, Tensor]:
    """Do what `flash_listed` does."""
    return _attend(flash_listed, _save_listed, _listed_gradients, args)


def attend_dense(*args: Any) -> tuple[Tensor, Tensor]:
    """Do what `flash_dense` does."""
    return _attend(flash_dense, _save_dense, _dense_gradients, args)


def _attend(
    op: Callable[..., Any],
    save: Callable[..., None],
    gradients: Callable[..., Any],
    args: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    qkv = args[:3]
    if _is_watched(qkv):
        found: tuple[Tensor, Tensor] = op(*args)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in qkv):
        found = _Past.apply(op, save, gradients, *args)
    else:
        found = _body(op)(*args)
    return found


def _backward(op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    """Do what a backward operator does; others may look at it than at the forward one."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    # With `create_graph` gradients of gradients may be asked for, which only operators refuse.
    watched = torch.is_grad_enabled() or _is_watched(tensors) or _is_batched(tensors)
    found: tuple[Tensor, ...] = op(*args) if watched else _body(op)(*args)
    return found


def _is_watched(tensors: Iterable[Tensor]) -> bool:
    """Whether anything looks at operators: compilers and tracers, counters and other modes,
    transforms of functions, or tensors that stand for others (`is_neg`: for their negatives)."""
    return (
        torch.compiler.is_compiling()
        # This thread's modes; `is_in_torch_dispatch_mode` mixes up those of all threads.
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_neg() for x in tensors)
    )


def _is_batched(tensors: Iterable[Tensor]) -> bool:
    """Whether gradients come in batches (`is_grads_batched`), of which no type tells."""
    return any(torch._C._functorch.is_legacy_batchedtensor(x) for x in tensors)
