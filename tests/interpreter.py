"""Running tests again with Triton's interpreter in place of the plain PyTorch paths."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from longgen.engine.kernels import HAS_TRITON


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where TRITON_INTERPRET makes the kernels run; without Triton the test is left
    out."""
    if not HAS_TRITON:
        pytest.skip("Triton isn't installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=1800
    )


def assert_passes(file: str) -> None:
    """Assert that all tests of a file pass there too; the interpreter itself leaves it out."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is the interpreter already")
    done = interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", file)
    assert done.returncode == 0, done.stdout[-4000:]
