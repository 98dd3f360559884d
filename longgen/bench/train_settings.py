"""What `longgen bench train` measures, and how little of it with `--quick`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from longgen.bench.timing import Budget, quick_ceiling
from longgen.errors import UsageError
from longgen.plan import LayerPlan
from longgen.shapes import SHAPES, ModelShape
from longgen.training_setup import TrainingSetup

# By the names that `case` gets, in the order of tables.
VARIANTS = ("hybrid", "full", "transformers")
STOCK = "transformers"

_CPU_LENGTHS = (256, 512)
_GPU_LENGTHS = (32768,)
_QUICK_LAYERS = 4
_QUICK_SHAPE = "llama-2-7b"
_SECONDS = 35.0
# Of a layer's weight in training: itself and its gradient in fp32, and a copy in bf16.
_BYTES_PER_WEIGHT = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Say what to measure.

    Attributes:
        name: of the model's shape, or its folder.
        shape: the model, cut to the layers that are measured.
        plan: the hybrid's, cut likewise.
        whole_layers: layers of the uncut model.
        lengths: tokens of a sequence.
        device: where.
        variants: of `VARIANTS`.
        setup: how it is trained; under "transformers" every checkpointing is of whole layers.
        chooses_checkpointing: have each variant and length compute as little again as fits, in
            place of what `setup` says.
        fp8: whether the layers' matrix products are in fp8 (not those of transformers).
        steps: timed steps, after one that isn't.
        seconds_each: begin no further step of a variant and length after this time.
        budget: how long to measure what the device itself reaches.
        matmul_size: side of the matrix product that is the ceiling.
        copy_bytes: size of the copy whose bandwidth is measured.
        seed: of weights and tokens.
        seconds: begin nothing new after this time; None is no limit.
        force: measure what does not fit by the plan, with several processes too.
    """

    name: str
    shape: ModelShape
    plan: LayerPlan
    whole_layers: int
    lengths: tuple[int, ...]
    device: torch.device
    variants: tuple[str, ...] = VARIANTS
    setup: TrainingSetup = field(default_factory=TrainingSetup)
    chooses_checkpointing: bool = False
    fp8: bool = False
    steps: int = 5
    seconds_each: float = 90.0
    budget: Budget = field(default_factory=Budget)
    matmul_size: int = 8192
    copy_bytes: int = 1 << 32
    seed: int = 0
    seconds: float | None = None
    force: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The number format of activations; weights are fp32."""
        return torch.bfloat16 if self.setup.is_bf16 else torch.float32


def cut(plan: LayerPlan, layers: int) -> LayerPlan:
    """Return the plan of a model with fewer layers: each is of the kind that stands at its place in
    the whole, so that the share of full ones stays and they stay where they are.

    12 full layers in the middle of 32 become 3 in the middle of 8.

    Raises:
        UsageError: if the model has not as many.
    """
    whole = plan.num_layers
    if not 1 <= layers <= whole:
        raise UsageError(f"--layers is {layers}; the model has {whole}, so give 1 to {whole}.")
    kinds = (plan.layers[(2 * i + 1) * whole // (2 * layers)] for i in range(layers))
    return LayerPlan("".join(kinds), plan.pattern)


def quick_model(device: torch.device) -> tuple[str, ModelShape, int | None]:
    """Return the shape of a quick run, by name, and how many layers of it: tiny on a CPU."""
    from longgen.bench.inference_settings import TINY

    if device.type != "cuda":
        return "tiny", TINY, None
    shape = SHAPES[_QUICK_SHAPE]
    free, _ = torch.cuda.mem_get_info(device)
    small = replace(shape, num_hidden_layers=_QUICK_LAYERS)
    if small.num_parameters * _BYTES_PER_WEIGHT < free // 2:
        return _QUICK_SHAPE, shape, _QUICK_LAYERS
    return "smollm2-135m", SHAPES["smollm2-135m"], None


def quick_lengths(device: torch.device) -> tuple[int, ...]:
    """Return the lengths of a quick run."""
    return _GPU_LENGTHS if device.type == "cuda" else _CPU_LENGTHS


def quick_settings(settings: TrainSettings) -> TrainSettings:
    """Return settings that measure the same with less patience."""
    ceiling = quick_ceiling(settings.device, settings.dtype, rounds=1)
    steps, patience = (3, 8.0) if settings.device.type == "cuda" else (2, 4.0)
    return replace(settings, steps=steps, seconds=_SECONDS, seconds_each=patience, **ceiling)
