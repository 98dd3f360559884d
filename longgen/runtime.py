"""What runs a model when it generates: the engine for hybrids, transformers for all others."""

from __future__ import annotations

from typing import Any

from longgen.hf import is_hybrid

# As results name them.
ENGINE = "longgen.engine"
TRANSFORMERS = "transformers"


def runtime_of(model: Any) -> str:
    """Return the name of what a causal language model generates with."""
    return ENGINE if is_hybrid(model.config) else TRANSFORMERS
