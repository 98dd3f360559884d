"""Attention tests run with uninitialised memory full of NaN, and on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned(nan_in_empty: None) -> None:
    """Poison every test of this folder."""


@pytest.fixture(scope="module", autouse=True)
def one_thread(two_threads: None) -> Iterator[None]:
    """Run small tensors on one thread: on busy cores, two wait longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
