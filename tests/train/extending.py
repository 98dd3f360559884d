"""What test processes do: extension runs, whole, interrupted and refused."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint

from longgen.errors import UsageError
from longgen.gpus import Gpu, GpuGroup
from longgen.train import extend as extend_module
from longgen.train.config import ExtendConfig
from longgen.train.extend import extend
from longgen.train.saving import OPTIMIZER
from longgen.train.trainer import LongGenTrainer, Progress


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


def extend_by_sgd(rank: int, config: ExtendConfig, resume: bool = False) -> dict[str, Any]:
    """Extend by SGD with momentum, and return the record.

    Adam makes steps of full size out of gradients that are rounding noise; here a step is as exact
    as its gradients, and there is a state to be saved all the same.
    """

    def create(trainer: LongGenTrainer, model: Any = None) -> torch.optim.Optimizer:
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-2, momentum=0.9)
        return trainer.optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LongGenTrainer, "create_optimizer", create)
        return extend(config, resume=resume, say=lambda line: None)


def extend_and_die(rank: int, config: ExtendConfig, step: int) -> None:
    """Extend by SGD; the last process kills itself while the optimizer of one checkpoint is
    written."""
    save = distributed_checkpoint.save

    def die(state: Any, **kwargs: Any) -> None:
        folder = Path(kwargs["checkpoint_id"])
        last = rank == torch.distributed.get_world_size() - 1
        if last and folder.parts[-2:] == (f"checkpoint-{step}", OPTIMIZER):
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_checkpoint, "save", die)
        extend_by_sgd(rank, config)


def extend_on_uneven_cards(rank: int, config: ExtendConfig, sizes: list[int]) -> str:
    """Extend where the estimate sees a card of `sizes[rank]` bytes; return the checkpointing."""
    group = GpuGroup(1, Gpu(name="Tiny Card", memory_bytes=sizes[rank]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extend_module, "machine_gpus", lambda: group)
        record = extend(config, say=lambda line: None)
    return str(record["training"]["gradient_checkpointing"])


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
