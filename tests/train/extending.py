"""What test processes do: extension runs, whole, interrupted and refused."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longgen.errors import UsageError
from longgen.train.config import ExtendConfig
from longgen.train.extend import extend
from longgen.train.trainer import Progress


def extend_twice(rank: int, whole: ExtendConfig, stopped: ExtendConfig) -> dict[str, Any]:
    """Run `whole`; run `stopped` with Ctrl-C on the last process alone, copy it, then resume it.

    Returns:
        The lines printed and the records of the three.
    """
    lines: list[str] = []
    records = [extend(whole, say=lines.append)]
    batches = 0
    count = Progress.count

    def strike(progress: Progress, position_ids: torch.Tensor) -> None:
        nonlocal batches
        batches += 1
        if rank and batches == 2 * stopped.sequences_per_step + 1:
            signal.raise_signal(signal.SIGINT)
        count(progress, position_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "count", strike)
        records.append(extend(stopped, say=lines.append))
    if not rank:
        shutil.copytree(stopped.out, f"{stopped.out}-copy")
    records.append(extend(stopped, resume=True, say=lines.append))
    return {"lines": lines, "records": records}


def extend_wrongly(rank: int, config: ExtendConfig) -> list[tuple[str, str]]:
    """Return the kinds and sentences of what two processes refuse."""
    Path(config.out).mkdir(exist_ok=True)
    (Path(config.out) / "notes.txt").touch()
    refused = []
    for changes in (
        {},
        {"context_parallel": 3},
        {"context_parallel": 2, "context": 129, "batch_tokens": 129},
        {"batch_tokens": 128 * 3},
    ):
        try:
            extend(replace(config, **changes), say=lambda line: None)
        except UsageError as error:
            refused.append((type(error).__name__, str(error)))
    return refused
