"""What `longgen bench inference` measures, and how little of it with `--quick`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from longgen.bench.settings import DTYPES
from longgen.bench.timing import Budget, quick_ceiling
from longgen.errors import UsageError
from longgen.evaluate.cost import WARMUP_STEPS
from longgen.evaluate.results import say_bytes
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import SHAPES, ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Say how a variant runs the model.

    Attributes:
        is_sparse: whether it follows the hybrid's plan; otherwise every layer is full.
        is_stock: whether it is transformers' own model; otherwise the engine runs it.
        kv_dtype: of the engine's keys and values; None is the model's.
    """

    is_sparse: bool = False
    is_stock: bool = False
    kv_dtype: str | None = None


# By the names that `case` gets, in the order of tables.
VARIANTS = {
    "hybrid": Variant(is_sparse=True),
    "hybrid_fp8": Variant(is_sparse=True, kv_dtype="fp8"),
    "full": Variant(),
    "full_fp8": Variant(kv_dtype="fp8"),
    "transformers": Variant(is_stock=True),
}
DEFAULT_VARIANTS = ("hybrid", "full", "transformers")
# As many sequences as fit.
MOST = "max"
MOST_SEQUENCES = 256

TINY = ModelShape(
    model_type="llama",
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=512,
    max_position_embeddings=512,
)
TINY_PATTERN = SparsePattern(block_size=16, sink_blocks=1, local_blocks=4)

_CPU_LENGTHS = (256, 1024)
_GPU_LENGTHS = (16384,)
_GPU_SHAPES = ("llama-2-7b", "smollm2-135m")
_SECONDS = 35.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceSettings:
    """Say what to measure.

    Attributes:
        name: of the model's shape, or its folder.
        shape: the model.
        plan: the hybrid's.
        lengths: tokens of prompts and of sequences that decode.
        variants: of `VARIANTS`.
        batches: sequences that decode at once; `MOST` is as many as fit.
        decode_tokens: timed tokens of each sequence.
        prefill_chunk: tokens of a prompt in a step of the engine.
        dtype: "bf16", "fp16" or "fp32".
        device: where.
        seed: of weights, prompts and cache contents.
        repeats: timed prefills, after one that isn't timed.
        seconds_each: the repeats of one prefill together, at most: a slower one is timed once.
        budget: how long to measure what the device itself reaches.
        matmul_size: side of the matrix product that is the ceiling.
        copy_bytes: size of the copy whose bandwidth is measured.
        resident_layers: layers of random weights; the others use theirs over again. None is all.
        seconds: begin nothing new after this time; None is no limit.
    """

    name: str
    shape: ModelShape
    plan: LayerPlan
    lengths: tuple[int, ...]
    device: torch.device
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    batches: tuple[int | str, ...] = (1, 4, MOST)
    decode_tokens: int = 32
    prefill_chunk: int = 8192
    dtype: str = "bf16"
    seed: int = 0
    repeats: int = 3
    seconds_each: float = 90.0
    budget: Budget = field(default_factory=Budget)
    matmul_size: int = 8192
    copy_bytes: int = 1 << 32
    resident_layers: int | None = None
    seconds: float | None = None

    @property
    def resident_shape(self) -> ModelShape:
        """The shape whose weights are there."""
        layers = self.resident_layers
        return replace(self.shape, num_hidden_layers=layers) if layers else self.shape

    @property
    def absent_bytes(self) -> int:
        """Bytes of the weights that the whole model has and that aren't there."""
        absent = self.shape.num_parameters - self.resident_shape.num_parameters
        return absent * self.torch_dtype.itemsize

    @property
    def resident_note(self) -> str:
        """Say in a sentence which weights are there; "" where all are."""
        if not self.resident_layers:
            return ""
        return (
            f"The weights of {self.resident_layers} of {self.shape.num_hidden_layers} layers are "
            "there, and all layers use them in turn: times and keys and values are those of the "
            f"whole model, free memory is not ({say_bytes(self.absent_bytes)} of weights are "
            "absent)."
        )

    @property
    def room(self) -> int:
        """Tokens that a sequence grows by: those before the timed ones, and one more."""
        return room_for(self.decode_tokens)

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths) + self.room

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format of weights, keys and values."""
        return DTYPES[self.dtype]


def room_for(decode_tokens: int) -> int:
    """Return the tokens that a sequence grows by when `decode_tokens` of them are timed."""
    return WARMUP_STEPS + decode_tokens + 1


def quick_shape(device: torch.device, dtype: str) -> tuple[str, ModelShape]:
    """Return the shape of a quick run, by name: tiny on a CPU, on a GPU the first whose weights
    take less than half of what is free."""
    if device.type != "cuda":
        return "tiny", TINY
    free, _ = torch.cuda.mem_get_info(device)
    fits = (n for n in _GPU_SHAPES if SHAPES[n].num_parameters * DTYPES[dtype].itemsize < free / 2)
    name = next(fits, _GPU_SHAPES[-1])
    return name, SHAPES[name]


def quick_lengths(device: torch.device, most: int | None, decode_tokens: int) -> tuple[int, ...]:
    """Return the lengths of a quick run of a model whose context is `most` tokens; None is no
    limit."""
    lengths = _GPU_LENGTHS if device.type == "cuda" else _CPU_LENGTHS
    if most is None:
        return lengths
    most -= room_for(decode_tokens)
    return tuple(n for n in lengths if n <= most) or (max(most, 1),)


def quick_settings(settings: InferenceSettings) -> InferenceSettings:
    """Return settings that measure the same with less patience."""
    ceiling = quick_ceiling(settings.device, settings.torch_dtype, rounds=1)
    patience = 6.0 if settings.device.type == "cuda" else 4.0
    return replace(settings, seconds=_SECONDS, seconds_each=patience, **ceiling)


def check_context(name: str, context: int, lengths: tuple[int, ...], decode_tokens: int) -> None:
    """Refuse lengths that a checkpoint was not made for.

    Raises:
        UsageError: naming the longest length that it was.
    """
    room = room_for(decode_tokens)
    if max(lengths) + room > context:
        raise UsageError(
            f"--lengths has {max(lengths):,} tokens, and {room:,} more are written, but {name} has "
            f"a context of {context:,}. Give at most {context - room:,}, or --shape, whose random "
            "weights have no context."
        )


def check_resident(layers: int | None, shape: str | None) -> None:
    """Refuse a number of layers with weights that makes no sense for a named shape.

    Raises:
        UsageError: if there is no shape, or it has no more layers.
    """
    if layers is None:
        return
    if shape is None:
        raise UsageError(
            "--resident-layers is for the random weights of --shape: a checkpoint's layers have "
            "their own. Leave it out."
        )
    total = SHAPES[shape.lower()].num_hidden_layers
    if layers >= total:
        raise UsageError(
            f"--resident-layers is {layers}, but {shape} has {total} layers; give fewer, or leave "
            "it out."
        )
