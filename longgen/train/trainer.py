"""The Hugging Face Trainer with LongGen's data order, figures, and interruption that loses
nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler, get_worker_info
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from longgen.accounting import training_flops
from longgen.errors import UsageError
from longgen.gpus import peak_flops
from longgen.parallel import ContextGroup, shard
from longgen.plan import LayerPlan
from longgen.shapes import ModelShape
from longgen.train.processes import Processes
from longgen.train.saving import (
    load_optimizer,
    load_weights,
    mark_whole,
    readable,
    save_optimizer,
    save_weights,
)

_SCHEDULER = "scheduler.pt"

Say = Callable[[str], None]


class TrainingSequences(Dataset[dict[str, torch.Tensor]]):
    """Serve the first `count` sequences of an endless, index-addressed stream, with the keys that
    the Trainer wants.

    Cut into shards, item i is shard i % num_shards of sequence i // num_shards. The Trainer deals
    items out to processes in turn, so that neighbours get the shards of one sequence, and counts
    each label once.
    """

    def __init__(self, packed: Any, count: int, num_shards: int = 1) -> None:
        self.packed = packed
        self.count = count
        self.num_shards = num_shards

    def __len__(self) -> int:
        return self.count * self.num_shards

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if get_worker_info() is not None:
            # The threads of tokenizers, which recall text takes, are not there in a forked process:
            # where they are asked for by this variable, it would wait for them for ever.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        item = self.packed.item(index // self.num_shards)
        keys = ("input_ids", "position_ids", "shift_labels")
        part = shard({key: item[key] for key in keys}, index % self.num_shards, self.num_shards)
        # The Trainer counts tokens only where there are "labels"; the model trains on shift_labels.
        return {**part, "labels": part["shift_labels"]}


class LongGenTrainer(Trainer):
    """Train on sequences in the order of their index, so that a resumed run sees what it would have
    seen.

    Args:
        group: the processes that share a sequence, whose shards `train_dataset` deals out
            (`TrainingSequences` with as many shards); None if each has whole ones.

    Other arguments are the Trainer's.
    """

    progress: Progress

    def __init__(self, *args: Any, group: ContextGroup | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group
        if self.args.world_size > 1 and not self.args.average_tokens_across_devices:
            raise UsageError(
                "average_tokens_across_devices is off: the loss would be a mean of means over "
                "uneven numbers of tokens. Leave it on."
            )
        if group is None:
            return
        if self.args.per_device_train_batch_size != 1:
            raise UsageError(
                f"per_device_train_batch_size is {self.args.per_device_train_batch_size}; under "
                "context parallelism each process takes its part of one sequence at a time. Set "
                "it to 1 and use gradient_accumulation_steps."
            )
        self.model.set_context_parallel(group)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        positions = inputs["position_ids"]
        self.progress.count(positions if self.group is None else self.group.gather(positions))
        return super().training_step(model, inputs, *args, **kwargs)

    # Checkpoints are the distributed kind whatever holds the model (longgen/train/saving.py), so
    # that they can be read by any number of processes.
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or self.args.output_dir
        if _internal_call:
            save_weights(self.model, folder)
        else:
            super().save_model(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self.model, self.optimizer, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        with readable(folder):
            # The Trainer reads it again, later.
            TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        load_weights(self.model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self.model, self.optimizer, checkpoint)
            with readable(Path(checkpoint)):
                state = torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True)
            self.lr_scheduler.load_state_dict(state)


class Progress(TrainerCallback):
    """Report loss, speed and remaining time; keep a log; stop cleanly on Ctrl-C; mark whole
    checkpoints.

    Args:
        shape: the model's shape, for its FLOPs.
        plan: its layer plan.
        folder: where `log.jsonl` goes.
        log_steps: steps between lines.
        card: the card's name, for its peak rate; None on CPU.
        say: prints one line.
        processes: those of the run; None is this one alone.
    """

    def __init__(
        self,
        shape: ModelShape,
        plan: LayerPlan,
        folder: Path,
        log_steps: int,
        card: str | None,
        say: Say,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.shape, self.plan = shape, plan
        self.log_path = folder / "log.jsonl"
        self.log_steps = log_steps
        peak = peak_flops(card) if card else None
        self.peak = peak * self.processes.count if peak else None
        self.say = say
        self.interrupted = False
        self.flops = 0.0
        self.tokens = 0
        self.speeds: list[dict[str, float]] = []
        self._flops_of: dict[int, float] = {}
        self._since = 0.0
        self._began = 0.0
        self._old_handler: Any = None
        self._process = os.getpid()

    def count(self, position_ids: torch.Tensor) -> None:
        """Add up the tokens and model FLOPs of one batch of whole rows: those of its documents, not
        of the packed length."""
        for row in position_ids.cpu().numpy():
            starts = np.flatnonzero(row == 0)
            for length in np.diff(np.append(starts, len(row))).tolist():
                if length not in self._flops_of:
                    self._flops_of[length] = training_flops(self.shape, self.plan, length)
                self.flops += self._flops_of[length]
            self.tokens += len(row)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = self._since = time.perf_counter()
        self._first_step = state.global_step
        if state.is_world_process_zero:
            self._forget_steps_after(state.global_step)
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGINT, self._interrupt)

    def _forget_steps_after(self, step: int) -> None:
        """Drop from the log the steps after a checkpoint that the run goes back to."""
        if not self.log_path.is_file():
            return
        kept = []
        for line in self.log_path.read_text(encoding="utf-8").splitlines(keepends=True):
            # A run that was killed may have left half a line.
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        staging = self.log_path.with_suffix(".partial")
        staging.write_text("".join(kept), encoding="utf-8")
        staging.replace(self.log_path)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A terminal sends Ctrl-C to data workers too, which have inherited this handler.
            return
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        # The signal may have come in the middle of another line's output.
        with suppress(RuntimeError):
            self.say("stopping after this step and saving; Ctrl-C again stops at once, unsaved")
            if self.processes.count > 1:
                self.say("(torchrun may kill the run before that, by default after 30 s)")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # The signal reaches processes in different steps; they must stop in the same one.
        if self.processes.any(self.interrupted):
            self.interrupted = True
            control.should_save = True
            control.should_log = True
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not self.tokens:
            return
        # Before the step is saved: weights that such gradients moved are lost.
        for name, value in (("loss", logs["loss"]), ("gradients' norm", logs.get("grad_norm"))):
            if value is not None and not math.isfinite(value):
                raise UsageError(
                    f"The {name} became {value} at step {state.global_step}: the training "
                    "diverged. Start again with a lower learning rate."
                )
        # Each process has counted the rows of its group.
        shares = self.processes.context_parallel
        tokens, flops = (n / shares for n in self.processes.sum([self.tokens, self.flops]))
        self.tokens, self.flops = 0, 0.0
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        speed = tokens / seconds
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "tokens_per_second": speed,
            "mfu": flops / seconds / self.peak if self.peak else None,
            "seconds": seconds,
            "tokens": int(tokens),
        }
        self.speeds.append({"tokens": tokens, "seconds": seconds, "flops": flops})
        if not state.is_world_process_zero:
            return
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if state.global_step % self.log_steps == 0 or state.global_step in (
            self._first_step + 1,
            state.max_steps,
        ):
            done = state.global_step - self._first_step
            eta = (now - self._began) / done * (state.max_steps - state.global_step)
            parts = [
                f"step {state.global_step}/{state.max_steps}",
                f"loss {logs['loss']:.4f}",
                f"{speed / 1000:.1f}K tok/s",
                *([f"MFU {line['mfu']:.0%}"] if line["mfu"] else []),
                f"{eta / 60:.0f} min left" if eta >= 90 else f"{eta:.0f} s left",
            ]
            self.say("  ".join(parts))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # Every process has written its part.
        self.processes.wait()
        if state.is_world_process_zero:
            mark_whole(folder, state.global_step)

    def medians(self) -> dict[str, float | None]:
        """Return the median speed of the steps after the first, which compiles."""
        speeds = self.speeds[1:] or self.speeds
        if not speeds:
            return {"tokens_per_second": None, "mfu": None}
        rate = statistics.median(entry["tokens"] / entry["seconds"] for entry in speeds)
        flops = statistics.median(entry["flops"] / entry["seconds"] for entry in speeds)
        return {"tokens_per_second": rate, "mfu": flops / self.peak if self.peak else None}

    def release(self) -> None:
        """Give Ctrl-C back to whoever had it before the training."""
        if self._old_handler is not None:
            signal.signal(signal.SIGINT, self._old_handler)
            self._old_handler = None
