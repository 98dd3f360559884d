"""A small text to train on, and runs over it that differ in a few settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longgen.pattern import SparsePattern
from longgen.train.config import ExtendConfig

PATTERN = SparsePattern(block_size=16, sink_blocks=1, local_blocks=2)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide GPUs: only on a CPU is a resumed run bound to equal the other bit for bit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 24 text files of uneven length, about 30,000 characters in all."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(24):
        lines = [
            f"{j}: the river of {i} runs past {i * j} mills in the rain.\n"
            for j in range(i * 2 + 3)
        ]
        (folder / f"{i:02}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def settings(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> Callable[..., ExtendConfig]:
    """Return a maker of runs of 6 steps of 4 sequences of 128 tokens: (name="run", **changes)."""

    def make(name: str = "run", **changes: Any) -> ExtendConfig:
        fields: dict[str, Any] = {
            "model": str(tiny_checkpoint),
            "out": str(tmp_path / name),
            "context": 128,
            "data": (str(text),),
            "layers": "SFS",
            "pattern": PATTERN.to_dict(),
            "steps": 6,
            "batch_tokens": 512,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "save_steps": 2,
            "log_steps": 1,
            **changes,
        }
        return ExtendConfig(**fields)

    return make
