"""Gradient checkpointing: what of a layer is kept for the backward pass, and where."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from longgen.attention.keep import keep_attention
from longgen.train.products import keep_products_of

# Smaller tensors are not worth a transfer of their own.
_SMALLEST_BYTES = 1 << 20


def set_recompute(
    model: Any, mode: str, *, offload: bool = False, smallest_bytes: int = _SMALLEST_BYTES
) -> None:
    """Have a model's layers recomputed in the backward pass.

    Args:
        model: a causal language model of transformers.
        mode: "off" keeps everything; "full" keeps each layer's input; "selective" keeps the
            attention's output and log-sum-exp as well, so that attention is not run again;
            "elementwise" keeps results of matrix products too, and runs neither again.
        offload: keep all that in host memory (for "selective" and "full").
        smallest_bytes: what stays on the device even so.
    """
    if mode == "off":
        return
    hold = partial(to_host, smallest_bytes=smallest_bytes)
    keep = partial(keep_attention, hold) if offload else keep_attention
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = keep
    elif mode == "elementwise":
        keep_products_of(model)
        options["context_fn"] = partial(keep_attention, products=True)

    def run(function: Callable[..., Any], *args: Any) -> Any:
        with _in_host_memory(hold) if offload else nullcontext():
            return checkpoint(function, *args, **options)

    # Transformers has renamed it; the Trainer's own setting warns in one release or the other.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = run


def _in_host_memory(
    hold: Callable[[torch.Tensor], Callable[[], torch.Tensor]],
) -> AbstractContextManager[None]:
    """Hold the tensors that autograd saves; of a checkpointed layer these are its inputs."""
    return saved_tensors_hooks(hold, lambda get: get())


@lru_cache(maxsize=8)
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def to_host(
    tensor: torch.Tensor, *, smallest_bytes: int = _SMALLEST_BYTES
) -> Callable[[], torch.Tensor]:
    """Copy a tensor to host memory and return a function that brings it back.

    From a GPU it is copied beside the computation, into pinned memory. Tensors of integers, and
    small ones, stay where they are.
    """
    if not tensor.is_floating_point() or tensor.nbytes < smallest_bytes:
        return lambda: tensor
    if tensor.device.type != "cuda":
        copy = tensor.clone()
        return lambda: copy
    device, stream = tensor.device, _stream(tensor.device)
    # Dense in any order of dimensions is copied as it lies.
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)
    done = stream.record_event()

    def back() -> torch.Tensor:
        torch.cuda.current_stream(device).wait_event(done)
        return host.to(device, non_blocking=True)

    return back
