"""From a run's checkpoint to a hybrid that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longgen import __version__
from longgen.checkpoint import check_output, load_tokenizer, read_config
from longgen.convert import hybrid_config, save_hybrid
from longgen.errors import UsageError
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.train.config import ExtendConfig
from longgen.train.folder import read_run, training_folder
from longgen.train.saving import WHOLE, checkpoint_step, newest_checkpoint, read_weights
from longgen.train.sharding import empty_model


def write_hybrid(
    config: ExtendConfig,
    checkpoint: Path,
    hybrid: Any,
    tokenizer: Any,
    dtype: torch.dtype,
    out: str | Path,
    record: dict[str, Any],
) -> None:
    """Write the hybrid of a checkpoint, whole or not at all; one process does it, on its CPU.

    Args:
        config: the run's settings.
        checkpoint: one of its whole checkpoints.
        hybrid: the hybrid's config.
        tokenizer: its tokenizer.
        dtype: what the weights are written in.
        out: the folder.
        record: what is written beside it.
    """
    from transformers import GenerationConfig

    model = empty_model(hybrid)
    read_weights(model, checkpoint, dtype)
    if (Path(config.model) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(config.model)
    model.config.use_cache = True
    save_hybrid(model, tokenizer, Path(out), record)


def find_checkpoint(path: str | Path) -> tuple[Path, Path]:
    """Return a run's folder and the checkpoint to export: a given one, or the run's newest.

    Args:
        path: the folder of a run (`longgen extend --out`), or of one of its checkpoints.

    Raises:
        UsageError: if it is neither, or there is no whole checkpoint.
    """
    path = Path(path)
    if path.name.startswith("checkpoint-"):
        if not (path / WHOLE).is_file():
            raise UsageError(
                f"{path} is not a whole checkpoint ({WHOLE} is missing, which is written last). "
                "Give another, or the folder of the run for its newest whole one."
            )
        return path.absolute().parent.parent, path
    newest, _ = newest_checkpoint(training_folder(path))
    if newest is None:
        raise UsageError(
            f"There is no whole checkpoint in {training_folder(path)}. Give the --out folder of a "
            "run of `longgen extend` that has saved one, or one of its checkpoint-N folders."
        )
    return path, newest


def export(path: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the hybrid of a run that is not finished, or of any of its checkpoints.

    The model that the run began from must still be where it was: its tokenizer and config are
    taken from there.

    Args:
        path: the run's folder, for its newest whole checkpoint, or the folder of a checkpoint.
        out: folder to write, new or empty.

    Returns:
        The record that is written beside the model, with "finished" False.

    Raises:
        UsageError: for anything that the user can put right; nothing is written then.
    """
    run, checkpoint = find_checkpoint(path)
    settings = read_run(run)
    if settings is None:
        raise UsageError(
            f"{run} has no record of a run, so what {checkpoint.name} is a model of is not known. "
            "Leave checkpoints in the folder that their run made."
        )
    try:
        config = ExtendConfig(**settings)
    except TypeError as error:
        raise UsageError(
            f"The run in {run} is of another version of longgen ({error}). Export it with that one."
        ) from None
    check_output(out)
    base = read_config(config.model)
    plan = LayerPlan(config.layers, SparsePattern.from_dict(config.pattern))
    hybrid = hybrid_config(base, plan, context=config.context, rope_theta=config.rope_theta)
    record = {
        "kind": "extend",
        "longgen": __version__,
        "config": config.to_dict(),
        "rope_theta": hybrid.rope_parameters["rope_theta"],
        "original_context": base.max_position_embeddings,
        "training": {"step": checkpoint_step(checkpoint)},
        "finished": False,
    }
    tokenizer = load_tokenizer(config.model)
    dtype = base.dtype or torch.bfloat16
    write_hybrid(config, checkpoint, hybrid, tokenizer, dtype, out, record)
    return record
