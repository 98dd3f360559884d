"""A training step as a user gets it: LongGen's own path, and that of transformers' Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from longgen.bench.models import planned_config, random_model, shape_config, stock_config
from longgen.bench.train_settings import STOCK, TrainSettings
from longgen.checkpoint import read_config
from longgen.hf.head import IGNORE_INDEX
from longgen.parallel import shard
from longgen.plan import LayerPlan
from longgen.train.config import ExtendConfig
from longgen.train.loop import Held, hold_model
from longgen.train.processes import Processes
from longgen.train.sharding import choose_sharding, empty_model, shard_model

# AdamW's, as `longgen extend` has them.
_LEARNING_RATE = 1e-5
_BETAS = (0.9, 0.95)
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True)
class TrainStep:
    """Hold a model and what it is trained on.

    Attributes:
        model: in training mode, on its device, in parts where it is sharded.
        inputs: keywords of its forward pass: one row, or this process's part of it.
        optimizer: None measures forward and backward alone.
        compute: makes the context of the forward pass (autocast).
    """

    model: Any
    inputs: dict[str, Any]
    optimizer: Any
    compute: Callable[[], AbstractContextManager[Any]]

    def run(self) -> torch.Tensor:
        """Do a step and return its loss, (1,)."""
        with self.compute():
            loss = self.model(**self.inputs).loss
        loss.backward()
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRAD_NORM)
            self.optimizer.step()
        return loss.detach()

    def forget_gradients(self) -> None:
        """Free them, as an optimizer's step does in the end."""
        self.model.zero_grad(set_to_none=True)

    def check(self, loss: torch.Tensor) -> float:
        """Return the loss of the step that was just done.

        Raises:
            ArithmeticError: it or a gradient is not finite.
        """
        value = float(loss)
        if not math.isfinite(value):
            raise ArithmeticError(f"The loss is {value}.")
        norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm):
            raise ArithmeticError(f"The norm of the gradients is {norm}.")
        return value


def base_config(model: str | None, settings: TrainSettings) -> Any:
    """Return transformers' config of the model with the layers that are measured; `model` is the
    folder of a checkpoint, None a named shape."""
    if model is None:
        return shape_config(settings.shape, max(settings.lengths))
    base = stock_config(read_config(model))
    base.num_hidden_layers = settings.shape.num_hidden_layers
    types = getattr(base, "layer_types", None)
    if types is not None:
        base.layer_types = types[: base.num_hidden_layers]
    return base


def make_step(
    settings: TrainSettings,
    name: str,
    plan: LayerPlan,
    base: Any,
    length: int,
    processes: Processes,
) -> TrainStep:
    """Return the step of a variant, with random weights and tokens.

    Args:
        settings: what is measured.
        name: of the variant.
        plan: its layers.
        base: transformers' config of the model with as many layers.
        length: tokens of the sequence.
        processes: those of the run.
    """
    setup, device = settings.setup, settings.device
    is_stock = name == STOCK
    sharding = choose_sharding(setup.sharding, processes.count, on_gpu=device.type == "cuda")
    config = stock_config(base) if is_stock else planned_config(base, plan)
    # Sharded, the first process's weights come from its CPU.
    kept_on = torch.device("cpu") if sharding == "fsdp" else None

    def load() -> Any:
        return random_model(
            config, dtype=torch.float32, device=device, seed=settings.seed, kept_on=kept_on
        )

    if is_stock:
        model = _stock(settings, config, load, sharding, processes)
    else:
        recipe = ExtendConfig(
            model=settings.name,
            out=settings.name,
            context=length,
            data=("random tokens",),
            layers=plan.layers,
            pattern=plan.pattern.to_dict(),
            offload=setup.offload,
            compile="on" if setup.compile else "off",
            fp8=settings.fp8,
        )
        model = hold_model(recipe, config, load, Held(sharding, setup.checkpointing), processes)
        model.set_context_parallel(processes.group)
    model.train()
    parameters = model.parameters()
    optimizer = None
    if setup.optimizer:
        fused = {"fused": True} if device.type == "cuda" else {}
        optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, betas=_BETAS, **fused)
    if sharding == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    casts = setup.is_bf16 and sharding != "fsdp"

    def compute() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=casts)

    inputs = _inputs(settings, is_stock, config, length, processes)
    return TrainStep(model, inputs, optimizer, compute)


def _stock(
    settings: TrainSettings,
    config: Any,
    load: Callable[[], Any],
    sharding: str,
    processes: Processes,
) -> Any:
    """Return transformers' own model, checkpointed by whole layers, in sdpa attention."""
    sharded = sharding == "fsdp"
    whole: Any = processes.first(load, lambda: None) if sharded else None
    model = empty_model(config) if sharded else load()
    assert model.config._attn_implementation == "sdpa", model.config._attn_implementation
    model.config.use_cache = False
    if settings.setup.checkpointing != "off":
        # Transformers has renamed it.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if not sharded:
        return model
    return shard_model(
        model,
        lambda: whole.state_dict(),
        device_type=settings.device.type,
        dtype=torch.bfloat16 if settings.setup.is_bf16 else None,
    )


def _inputs(
    settings: TrainSettings, is_stock: bool, config: Any, length: int, processes: Processes
) -> dict[str, Any]:
    """Return one document of random tokens, another for each group of processes."""
    seed = settings.seed + processes.rank // processes.context_parallel
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (1, length), generator=generator)
    count = length - 1
    if is_stock:
        found = {"input_ids": tokens, "labels": tokens}
    else:
        labels = torch.cat([tokens[:, 1:], torch.full((1, 1), IGNORE_INDEX)], 1)
        positions = torch.arange(length)[None]
        found = {"input_ids": tokens, "position_ids": positions, "shift_labels": labels}
        if processes.group is not None:
            found = shard(found, processes.group.rank, processes.group.size)
    moved = {key: value.to(settings.device) for key, value in found.items()}
    return {**moved, "num_items_in_batch": count}
