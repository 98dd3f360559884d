"""The training itself: the model as its processes hold it, in the Hugging Face Trainer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from longgen.data.mixture import Mixture
from longgen.data.packing import PackedDataset
from longgen.errors import UsageError
from longgen.plan import LayerPlan
from longgen.shapes import ModelShape
from longgen.train.config import ExtendConfig
from longgen.train.elementwise import compile_elementwise, norms_follow_autocast
from longgen.train.float8 import use_float8
from longgen.train.folder import training_folder
from longgen.train.processes import Processes
from longgen.train.recompute import set_recompute
from longgen.train.sharding import empty_model, shard_model
from longgen.train.trainer import LongGenTrainer, Progress, Say, TrainingSequences


@dataclass(frozen=True, slots=True)
class Held:
    """Say how the processes hold the model.

    Attributes:
        sharding: "fsdp", "ddp", or "none" for one process.
        recompute: what layers compute again in the backward pass, of
            `longgen.training_setup.CHECKPOINTING`.
    """

    sharding: str
    recompute: str


def hold_model(
    config: ExtendConfig,
    hybrid: Any,
    load: Callable[[], Any],
    held: Held,
    processes: Processes,
) -> Any:
    """Return the model ready for the Trainer, on every process.

    Args:
        config: the run's settings.
        hybrid: the hybrid's config.
        load: loads its weights in fp32, on a CPU.
        held: how processes hold it.
        processes: those of the run.

    Raises:
        UsageError: what `load` raises.
    """
    on_gpu = torch.cuda.is_available()
    sharded = held.sharding == "fsdp"
    # Of several that share the weights the first alone reads them.
    whole: Any = processes.first(load, lambda: None) if sharded else None
    model = empty_model(hybrid) if sharded else load()
    if config.fp8:
        use_float8(model)
    set_recompute(model, held.recompute, offload=config.offload)
    if not sharded:
        norms_follow_autocast(model)
    if config.compile == "on" or (config.compile == "auto" and on_gpu):
        compile_elementwise(model, projections=config.fp8, final_norm=not sharded)
    if not sharded:
        return model
    return shard_model(
        model,
        lambda: whole.state_dict(),
        device_type="cuda" if on_gpu else "cpu",
        dtype=torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else None,
    )


def run_training(
    config: ExtendConfig,
    model: Any,
    packed: PackedDataset | Mixture,
    shape: ModelShape,
    plan: LayerPlan,
    held: Held,
    checkpoint: Path | None,
    processes: Processes,
    say: Say,
) -> dict[str, Any]:
    """Train to the last step or to Ctrl-C, from a checkpoint if there is one; returns figures.

    Args:
        config: the run's settings.
        model: as `hold_model` returns it.
        packed: its sequences.
        shape: the model's shape.
        plan: its layer plan.
        held: how processes hold the model.
        checkpoint: where to go on from.
        processes: those of the run.
        say: prints one line of progress.
    """
    from transformers import PrinterCallback, ProgressCallback, TrainingArguments

    class Arguments(TrainingArguments):
        # A model in parts is where it belongs.
        @property
        def place_model_on_device(self) -> bool:
            return held.sharding != "fsdp"

    on_gpu = torch.cuda.is_available()
    folder = training_folder(config.out)
    arguments = Arguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_lr_ratio},
        warmup_steps=min(config.warmup_steps, max(config.steps - 1, 0)),
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        # FSDP2 gathers weights in bf16; autocast is for weights that are there in fp32.
        bf16=held.sharding != "fsdp" and on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
        dataloader_num_workers=2 if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        ddp_backend=None if on_gpu or processes.count == 1 else "gloo",
        ddp_find_unused_parameters=False if held.sharding == "ddp" else None,
    )
    # The Trainer would wrap the model in DataParallel over all GPUs, which breaks packed sequences.
    if arguments.n_gpu > 1:
        say(f"training on 1 of {arguments.n_gpu} GPUs")
        arguments._n_gpu = 1
    arguments.gradient_accumulation_steps = config.sequences_per_step // processes.data_parallel
    card = torch.cuda.get_device_name() if on_gpu else None
    progress = Progress(shape, plan, folder, config.log_steps, card, say, processes)
    trainer = LongGenTrainer(
        model=model,
        args=arguments,
        group=processes.group,
        train_dataset=TrainingSequences(packed, config.num_sequences, processes.context_parallel),
        data_collator=default_collate,
        callbacks=[progress, *(_tensorboard(folder) if processes.is_first else [])],
    )
    trainer.progress = progress
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"The GPU ran out of memory at step {trainer.state.global_step + 1} "
            f"({torch.cuda.max_memory_allocated() / 2**30:.1f} GiB were in use). Resume the run "
            "with --gradient-checkpointing full --offload, or begin another with a shorter context."
        ) from error
    finally:
        progress.release()
    model.set_context_parallel(None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "interrupted": progress.interrupted and trainer.state.global_step < config.steps,
        "step": trainer.state.global_step,
        "tokens": trainer.state.global_step * int(config.batch_tokens or 0),
        "seconds": time.perf_counter() - began,
        "first_loss": losses[0] if losses else None,
        "last_loss": statistics.mean(losses[-10:]) if losses else None,
        "gradient_checkpointing": held.recompute,
        "sharding": held.sharding,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        **progress.medians(),
    }


def _tensorboard(folder: Path) -> list[Any]:
    """Return the callback that writes TensorBoard events to `folder`, if TensorBoard is
    installed."""
    from transformers.integrations import TensorBoardCallback, is_tensorboard_available

    if not is_tensorboard_available():
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(log_dir=str(folder / "tensorboard")))]
