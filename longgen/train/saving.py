"""Checkpoints of a run: weights and optimizer state in parts, which any number of processes can
read.

The format is PyTorch's distributed checkpoint, with one process too. Each process writes what it
holds, and reads what it needs, so a run can be gone on with by more or fewer processes and with
another sharding. A checkpoint counts only with its mark, which is written last.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from longgen.errors import UsageError

WHOLE = "whole.json"
WEIGHTS, OPTIMIZER = "weights", "optimizer"


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest checkpoint that was written to its end, and newer ones that were not."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    cut_off: list[Path] = []
    for _, path in sorted(found, reverse=True):
        if (path / WHOLE).is_file():
            return path, cut_off
        cut_off.append(path)
    return None, cut_off


def mark_whole(checkpoint: Path, step: int) -> None:
    """Say that a checkpoint is written to its end."""
    staging = checkpoint / f"{WHOLE}.partial"
    staging.write_text(json.dumps({"step": step}), encoding="utf-8")
    staging.replace(checkpoint / WHOLE)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step after which a whole checkpoint was written."""
    return int(json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))["step"])


def save_weights(model: Any, checkpoint: str | Path) -> None:
    """Write a model's weights; every process must call it."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    _save(get_model_state_dict(model), Path(checkpoint) / WEIGHTS)


def load_weights(model: Any, checkpoint: str | Path) -> None:
    """Read weights into a model, sharded or not; every process must call it.

    Raises:
        UsageError: if there are none in the checkpoint, or they cannot be read.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    state = get_model_state_dict(model)
    _load(state, Path(checkpoint) / WEIGHTS)
    set_model_state_dict(model, state)


def save_optimizer(model: Any, optimizer: Any, checkpoint: str | Path) -> None:
    """Write the state of a model's optimizer; every process must call it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    _save(get_optimizer_state_dict(model, _bare(optimizer)), Path(checkpoint) / OPTIMIZER)


def load_optimizer(model: Any, optimizer: Any, checkpoint: str | Path) -> None:
    """Read the state of a model's optimizer; every process must call it.

    Raises:
        UsageError: if there is none in the checkpoint, or it cannot be read.
    """
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    optimizer = _bare(optimizer)
    state = get_optimizer_state_dict(model, optimizer)
    _load(state, Path(checkpoint) / OPTIMIZER)
    set_optimizer_state_dict(model, optimizer, state)


def read_weights(model: Any, checkpoint: str | Path, dtype: torch.dtype) -> None:
    """Give a model without memory (`empty_model`) the weights of a checkpoint, on this process
    alone and its CPU.

    Args:
        model: of the checkpoint's shapes.
        checkpoint: its folder.
        dtype: what the weights become.

    Raises:
        UsageError: if there are none in the checkpoint, or they cannot be read.
    """
    state = {
        name: torch.empty(weight.shape, dtype=dtype) for name, weight in model.state_dict().items()
    }
    _load(state, Path(checkpoint) / WEIGHTS, alone=True)
    model.load_state_dict(state, assign=True)
    model.tie_weights()


def _bare(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's, whose steps wait for the end of accumulation."""
    return getattr(optimizer, "optimizer", optimizer)


def _save(state: dict[str, Any], folder: Path) -> None:
    with _quietly():
        distributed_checkpoint.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def _load(state: dict[str, Any], folder: Path, alone: bool = False) -> None:
    if not folder.is_dir():
        raise UsageError(
            f"{folder.parent} has no {folder.name} in it, so it is not a checkpoint of this "
            "version of longgen. Begin another run, or go on with the version that wrote it."
        )
    with readable(folder.parent), _quietly():
        distributed_checkpoint.load(
            state, checkpoint_id=folder, no_dist=alone or not dist.is_initialized()
        )


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint's files are read into a sentence.

    Raises:
        UsageError: with the cause; every process raises it.
    """
    try:
        yield
    except CheckpointException as error:
        causes = (
            str(cause).strip() or type(cause).__name__ for cause, _ in error.failures.values()
        )
        raise _unreadable(checkpoint, next(causes)) from error
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, UnpicklingError) as error:
        raise _unreadable(checkpoint, str(error) or type(error).__name__) from error


def _unreadable(checkpoint: Path, cause: str) -> UsageError:
    return UsageError(
        f"{checkpoint} cannot be read ({cause.splitlines()[0]}). If it is damaged, remove that "
        "folder to go on from the checkpoint before it."
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep back PyTorch's notes on running without a process group and on its own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
