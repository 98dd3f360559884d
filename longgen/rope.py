"""The rotary base for a longer context."""

from __future__ import annotations

from typing import Any

from longgen.errors import UsageError

# How far above the NTK-aware value the base goes. Twice that value is decisive for ProLong (arXiv
# 2410.02660); published bases for 64K to 128K lie between 2 and 30 times it. docs/experiments.md
# has what was measured here.
MARGIN = 8.0

_SCALED = ("default", "llama3")


def rope_theta_for(theta: float, original: int, context: int, head_dim: int) -> float:
    """Return the rotary base for `context` tokens of a model trained at `original` tokens with base
    `theta`.

    The rule: NTK-aware scaling, theta * (context / original) ** (head_dim / (head_dim - 2)), which
    stretches the slowest rotation to the new length, times `MARGIN`, rounded to two figures. A
    context within the original keeps its base.
    """
    if context <= original:
        return theta
    raised = theta * (context / original) ** (head_dim / (head_dim - 2)) * MARGIN
    return float(f"{raised:.1e}")


def rope_theta_of(config: Any) -> float:
    """Return the rotary base of a transformers config.

    Raises:
        UsageError: for rotary embeddings whose frequencies are rescaled in a way that a new base
            does not extend.
    """
    parameters = config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    if kind not in _SCALED:
        raise UsageError(
            f"The model's rotary embedding is of type {kind!r}, which stretches positions in its "
            f"own way. Give a model with one of {', '.join(_SCALED)}, usually the one before its "
            "own context extension."
        )
    return float(parameters["rope_theta"])
