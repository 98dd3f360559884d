"""FSDP2: every process holds a part of weights, gradients and optimizer state, and gathers the
weights of one layer at a time.

The model is sharded before the Trainer gets it, on GPUs and CPUs alike, so that no process ever
holds more than its part on its device; the first alone reads the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def choose_sharding(asked: str, num_processes: int, *, on_gpu: bool) -> str:
    """Return how several processes hold the model, "fsdp" or "ddp"; "none" for one process.

    "auto" is FSDP2 on GPUs. On CPUs, which share their memory anyway, it is DDP.
    """
    if num_processes == 1:
        return "none"
    return asked if asked != "auto" else "fsdp" if on_gpu else "ddp"


def empty_model(config: Any) -> Any:
    """Return the model of a config with weights that have shapes but no memory (meta device);
    buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


def mixed_precision(dtype: torch.dtype | None) -> Any:
    """Return FSDP2's policy: weights are gathered and used in `dtype` (None is their own), and
    gradients added up over processes in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if dtype is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def shard_model(
    model: Any,
    weights: Callable[[], dict[str, Any]],
    *,
    device_type: str,
    dtype: torch.dtype | None,
) -> Any:
    """Spread a model over all processes, in place.

    Args:
        model: as `empty_model` makes it, on every process.
        weights: returns the whole state dict in fp32 on a CPU; called on the first process alone.
        device_type: "cpu" or "cuda"; each process uses its current device.
        dtype: what weights are computed with; None is fp32.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": mixed_precision(dtype)}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # The last in the forward pass is the first in the backward pass: kept in between. A weight
    # that both ends share must be in one group.
    tail = [model.model.norm, head]
    if embedding.weight is head.weight:
        tail.insert(0, embedding)
    else:
        fully_shard(embedding, **options)
    fully_shard(tail, reshard_after_forward=False, **options)
    fully_shard(model, **options)

    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    buffers = dict(model.named_buffers(remove_duplicate=False))
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, buffer.to(device))
    model.tie_weights()
    given: dict[str, Any] = weights() if dist.get_rank() == 0 else {}
    set_model_state_dict(
        model, given, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    # Nothing more is to be wrapped around it.
    model._is_accelerate_prepared = True
    return model
