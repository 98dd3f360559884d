"""Attention under a sparse pattern; `api.attention` is the one public function."""

from longgen.attention.api import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
