"""Tiny random hybrids for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from longgen.pattern import SparsePattern
from tests.hf.conftest import SINK, STRIDED, build, tokens

PATTERNS = {
    "sink": SINK,
    "strided": STRIDED,
    # Blocks of three, sinks and strides at once, shifts that wrap.
    "both": SparsePattern(
        block_size=3, sink_blocks=2, local_blocks=2, stride_blocks=2, head_shift=3
    ),
    "window": SparsePattern(block_size=4, sink_blocks=0, local_blocks=2),
}


@pytest.fixture(scope="session", params=PATTERNS.values(), ids=PATTERNS.keys())
def pattern(request: pytest.FixtureRequest) -> SparsePattern:
    return request.param


@pytest.fixture(scope="session", name="build")
def build_fixture() -> Callable[..., Any]:
    """Build a hybrid: (family, pattern, layers, heads, key_value_heads) -> model."""
    return build


@pytest.fixture(scope="session", name="tokens")
def tokens_fixture() -> Callable[..., Any]:
    """Draw token ids: (length, seed) -> (1, length)."""
    return tokens


@pytest.fixture(scope="session")
def model(pattern: SparsePattern) -> Any:
    """A llama hybrid with a pattern, four query and two key/value heads."""
    return build(pattern=pattern)
