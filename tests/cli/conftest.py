"""A tiny hybrid, and a way to run the command line that keeps its streams apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from longgen.cli import main
from longgen.convert import convert
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide GPUs: results are compared with those of the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Return a function that runs `longgen` with some arguments."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(run: Callable[..., Result]) -> Callable[..., str]:
    """Return a function that runs `longgen`, sees that it refuses in one line, and returns that."""

    def call(*arguments: object) -> str:
        result = run(*arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("error: ") and result.err.count("\n") == 1
        return result.err

    return call


@pytest.fixture(scope="session")
def tiny_hybrid(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a hybrid of 1,024 tokens, untrained and not to be written to."""
    folder = tmp_path_factory.mktemp("hybrid") / "hybrid"
    pattern = SparsePattern(block_size=16, sink_blocks=1, local_blocks=2)
    convert(tiny_checkpoint, folder, LayerPlan("SFS", pattern), context=1024)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text file of about 3,000 characters, which are nearly as many tokens."""
    file = tmp_path_factory.mktemp("text") / "river.txt"
    file.write_text("".join(f"Line {i} of the text: rain on {i * i} mills.\n" for i in range(75)))
    return file
