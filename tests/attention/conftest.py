"""Attention tests run with uninitialised memory full of NaN, and on one thread."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def poisoned(nan_in_empty: None) -> None:
    """Poison every test of this folder."""
