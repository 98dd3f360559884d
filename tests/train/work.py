"""What test processes do: the same few training steps, alone or shared out."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from longgen.hf import LongGenLlamaConfig, LongGenLlamaForCausalLM
from longgen.parallel import ContextGroup
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import ModelShape
from longgen.train.processes import Processes
from longgen.train.recompute import set_recompute
from longgen.train.sharding import empty_model, shard_model
from longgen.train.trainer import LongGenTrainer, Progress, TrainingSequences

CONTEXT, STEPS, SEQUENCES = 128, 6, 4


@dataclass(frozen=True)
class Training:
    """One training run of six steps of four sequences."""

    pattern: SparsePattern
    heads: tuple[int, int]
    packed: bool
    recompute: str = "off"
    offload: bool = False
    tied: bool = False
    full_mode: str = "auto"
    context: int = CONTEXT
    head_dim: int = 8
    device: str = "cpu"
    bf16: bool = False
    attention: str = "longgen"


class Sequences:
    """Serve sequences of documents of any length, with very uneven numbers of labels."""

    def __init__(self, packed: bool, context: int = CONTEXT) -> None:
        self.packed, self.context = packed, context

    def item(self, index: int) -> dict[str, torch.Tensor]:
        rng, length = np.random.default_rng(index), self.context
        ids = torch.from_numpy(rng.integers(0, 97, length))
        borders = sorted(rng.integers(1, length, 4).tolist()) if self.packed else []
        positions = torch.cat(
            [torch.arange(b - a) for a, b in zip([0, *borders], [*borders, length], strict=True)]
        )
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        labels[:-1][positions[1:] == 0] = -100
        labels[: int(rng.integers(0, length - 1))] = -100
        return {"input_ids": ids, "position_ids": positions, "shift_labels": labels}


class Losses(TrainerCallback):
    """Keep what the Trainer logs, in full precision."""

    def __init__(self) -> None:
        self.logged: list[tuple[float, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.logged.append((logs["loss"], logs["grad_norm"]))


def make_model(run: Training) -> Any:
    """Return a tiny hybrid with random weights, the same every time."""
    torch.manual_seed(0)
    heads, kv_heads = run.heads
    config = LongGenLlamaConfig(
        vocab_size=97,
        hidden_size=run.head_dim * heads,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=run.head_dim,
        max_position_embeddings=run.context,
        # Wider layers with weights as large would make noise of rounding grow from step to step.
        initializer_range=0.2 * (8 / run.head_dim) ** 0.5,
        layer_types=LayerPlan.build(3).layer_types,
        longgen={"pattern": run.pattern.to_dict()},
        use_cache=False,
        tie_word_embeddings=run.tied,
    )
    model = LongGenLlamaForCausalLM(config).float()
    model.set_attn_implementation(run.attention)
    return model


class Sharded(TrainingArguments):
    """Leave the model where it is: FSDP2 has put its parts there."""

    @property
    def place_model_on_device(self) -> bool:
        return False


class CallCounter(TorchDispatchMode):
    """Count the attention kernels that run, forward and backward, recomputation included."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.__name__
        if "attention" in name:
            self.backward += "backward" in name
            self.forward += "backward" not in name
        return function(*args, **(kwargs or {}))


def train(run: Training, processes: Processes, sharding: str = "ddp") -> dict[str, Any]:
    """Train, and return the logged losses, the tokens counted, the calls of attention kernels and
    the weights."""
    model = make_model(run)
    if sharding == "fsdp":
        whole = model.state_dict()
        model = shard_model(
            empty_model(model.config),
            lambda: whole,
            device_type=run.device,
            dtype=torch.bfloat16 if run.bf16 else None,
        ).train()
        model.set_attn_implementation(run.attention)
        # Each process really holds a part.
        assert {type(p).__name__ for p in model.parameters()} == {"DTensor"}
    set_recompute(model, run.recompute, offload=run.offload, smallest_bytes=0)
    group = processes.group
    if group is not None:
        group = ContextGroup(group.rank, group.size, group.process_group, run.full_mode)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Sharded if sharding == "fsdp" else TrainingArguments)(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=SEQUENCES // processes.data_parallel,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=run.device == "cpu",
            bf16=run.bf16 and sharding != "fsdp",
            ddp_backend="gloo" if processes.count > 1 and run.device == "cpu" else None,
            disable_tqdm=True,
            remove_unused_columns=False,
            # AdamW would make steps of full size out of gradients that are rounding noise.
            optim="sgd",
            learning_rate=0.1,
        )
        # The Trainer would spread each batch over all GPUs that it sees.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        losses = Losses()
        shards = processes.context_parallel
        trainer = LongGenTrainer(
            model=model,
            args=arguments,
            group=group,
            train_dataset=TrainingSequences(
                Sequences(run.packed, run.context), STEPS * SEQUENCES, shards
            ),
            data_collator=default_collate,
            callbacks=[losses],
        )
        trainer.remove_callback(PrinterCallback)
        shape = ModelShape.from_config(model.config)
        plan = model.config.layer_plan
        trainer.progress = Progress(
            shape, plan, Path(folder), 1, None, lambda line: None, processes
        )
        calls = CallCounter()
        # Compilers, of FlexAttention on GPUs, do not work under such a mode.
        with calls if run.device == "cpu" else nullcontext():
            trainer.train()
        tokens, flops = processes.sum([trainer.progress.tokens, trainer.progress.flops])
    return {
        "logged": losses.logged,
        "tokens": tokens / shards,
        "flops": flops / shards,
        "calls": (calls.forward, calls.backward),
        "weights": {name: whole_tensor(value) for name, value in model.state_dict().items()},
    }


def whole_tensor(value: torch.Tensor) -> np.ndarray:
    """Put a tensor's parts together; every process must call it."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().numpy()


def train_all(rank: int, runs: list[tuple[Training, int, str]]) -> list[dict[str, Any]]:
    """Do every run with its size of the context-parallel groups and its sharding."""
    return [train(run, Processes.start(size), sharding) for run, size, sharding in runs]
