"""Running tests again with Triton's interpreter in place of the plain PyTorch paths."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache

import pytest

from longgen.engine.kernels import HAS_TRITON


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=1800
    )


@lru_cache(maxsize=1)
def _obstacle() -> str | None:
    """Say why Triton's interpreter cannot run kernels here, whatever they do."""
    if not HAS_TRITON:
        return "Triton isn't installed"
    # Triton 3.6 fails at every loop with NumPy 2.3 and later.
    probe = _run("-m", "tests.interpreted_loop")
    return probe.stderr.strip().rpartition("\n")[2] if probe.returncode else None


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where TRITON_INTERPRET makes the kernels run; where that cannot be, the test is
    left out."""
    obstacle = _obstacle()
    if obstacle:
        pytest.skip(obstacle)
    return _run(*arguments)


def assert_passes(file: str) -> None:
    """Assert that all tests of a file pass there too; the interpreter itself leaves it out."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is the interpreter already")
    done = interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", file)
    assert done.returncode == 0, done.stdout[-4000:]
