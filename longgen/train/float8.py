"""Matrix products of the decoder layers in fp8, by torchao (extra `fp8`)."""

from __future__ import annotations

from typing import Any

import torch

from longgen.errors import UsageError

# Tensor cores of Ada, Hopper and later GPUs have fp8.
_CAPABILITY = (8, 9)
# cuBLAS takes fp8 matrices whose sides are multiples of this.
_MULTIPLE = 16


def float8_obstacle(device_type: str) -> str | None:
    """Say what keeps this machine from fp8 products, or return None."""
    if device_type != "cuda" or torch.version.hip:
        return "they need an NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY:
        return (
            f"they need compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} (Ada, Hopper or "
            f"later), and {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
        )
    return None


def check_float8(device_type: str) -> None:
    """Refuse fp8 where it cannot run.

    Raises:
        UsageError: if the GPU has no fp8, or torchao is not installed.
    """
    obstacle = float8_obstacle(device_type)
    if obstacle:
        raise UsageError(f"fp8 products cannot run here: {obstacle}. Leave --fp8 out.")
    _torchao()


def _torchao() -> Any:
    try:
        import torchao.float8
    except ImportError as error:
        raise UsageError(
            f"fp8 products need torchao ({error}). Install it with: pip install 'longgen[fp8]'"
        ) from None
    return torchao.float8


def use_float8(model: Any, *, emulate: bool = False) -> int:
    """Turn the projections of all decoder layers into fp8 products, with one scale a tensor.

    Embeddings, norms and the output projection stay as they are, and so do weights: the master
    weights are fp32, and names and checkpoints do not change.

    Args:
        model: a causal language model of transformers.
        emulate: compute with numbers rounded to fp8 on any device; for tests.

    Returns:
        How many projections were turned.

    Raises:
        UsageError: if torchao is not installed.
    """
    float8 = _torchao()

    turned = 0

    def fits(module: torch.nn.Module, name: str) -> bool:
        nonlocal turned
        assert isinstance(module, torch.nn.Linear)
        taken = module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0
        turned += taken
        return taken

    config = float8.Float8LinearConfig(emulate=emulate)
    float8.convert_to_float8_training(model.model.layers, config=config, module_filter_fn=fits)
    if not turned:
        raise UsageError(
            "No projection of the model has sides that are multiples of 16, as fp8 products need. "
            "Leave --fp8 out."
        )
    return turned
