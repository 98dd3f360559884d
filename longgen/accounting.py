"""What a plan costs and saves, in closed form: KV bytes, FLOPs, expected speed-ups, memory per GPU.

Pure functions of a `ModelShape`, a `LayerPlan` and a length in tokens. The pattern's own counts
come from `SparsePattern`; nothing here knows its rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from longgen.coefficients import COEFFICIENTS
from longgen.errors import UsageError
from longgen.gpus import GIB, Gpu, GpuGroup
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import ModelShape

BF16 = 2
FP32 = 4

# The part of an estimate that is no tensor's.
RESERVE = "CUDA context, fragments"


def full_plan(shape: ModelShape) -> LayerPlan:
    """Return the plan that everything is compared with: every layer full."""
    return LayerPlan.build(shape.num_hidden_layers, "all")


def _check(shape: ModelShape, plan: LayerPlan, length: int) -> None:
    if plan.num_layers != shape.num_hidden_layers:
        raise UsageError(
            f"The plan has {plan.num_layers} layers and the model {shape.num_hidden_layers}; "
            "build the plan for this model."
        )
    if length < 1:
        raise UsageError(f"The length is {length} tokens; give at least 1.")


def _patterns(plan: LayerPlan) -> dict[str, SparsePattern]:
    """Return the pattern of each kind of layer that the plan has."""
    return {kind: plan.pattern_of(plan.layers.index(kind)) for kind in set(plan.layers)}


def kv_bytes_by_layer(
    shape: ModelShape,
    plan: LayerPlan,
    length: int,
    batch: int = 1,
    bytes_per_element: int = BF16,
) -> list[int]:
    """Return the bytes of keys and values that each layer's cache holds after `length` tokens.

    A layer holds 2 (keys and values) x num_key_value_heads x head_dim x bytes_per_element for each
    token kept: all of them in a full layer, `SparsePattern.cache_length` in a sparse one. Not
    counted: what a cache allocates ahead, and the tokens of a prompt's chunk while it is being
    read.
    """
    _check(shape, plan, length)
    heads = shape.num_key_value_heads
    token = 2 * heads * shape.head_dim * bytes_per_element * batch
    kept = {kind: pattern.cache_length(length, heads) for kind, pattern in _patterns(plan).items()}
    return [token * kept[kind] for kind in plan.layers]


def kv_bytes(
    shape: ModelShape,
    plan: LayerPlan,
    length: int,
    batch: int = 1,
    bytes_per_element: int = BF16,
) -> int:
    """Return the bytes that all layers hold after `length` tokens: see `kv_bytes_by_layer`."""
    return sum(kv_bytes_by_layer(shape, plan, length, batch, bytes_per_element))


def forward_flops(
    shape: ModelShape, plan: LayerPlan, length: int, *, prefill_logits: bool = False
) -> float:
    """Return the FLOPs of one forward pass over one document of `length` tokens.

    Formula: 2 x (weights of all linear layers) x length, plus 2 x vocab_size x hidden_size for
    every token that gets logits, plus 4 x head_dim x num_attention_heads x (visible query-key
    pairs) for each layer: length x (length + 1) / 2 pairs in a full layer,
    `SparsePattern.mean_visible_pairs` in a sparse one.

    Not counted: norms, biases, rotary embedding, activations, softmax, the embedding look-up, and
    pairs that a kernel computes and then masks. Packed documents are the sum over their lengths.

    Args:
        prefill_logits: count logits for the last token alone, as reading a prompt does;
            otherwise for every token.
    """
    _check(shape, plan, length)
    linear = 2 * shape.num_hidden_layers * shape.layer_linear_parameters * length
    logits = 2 * shape.embedding_parameters * (1 if prefill_logits else length)
    heads = shape.num_key_value_heads
    pairs = sum(
        plan.layers.count(kind) * pattern.mean_visible_pairs(length, heads)
        for kind, pattern in _patterns(plan).items()
    )
    return linear + logits + 4 * shape.head_dim * shape.num_attention_heads * pairs


def forward_flops_per_token(
    shape: ModelShape, plan: LayerPlan, length: int, *, prefill_logits: bool = False
) -> float:
    """Return `forward_flops` divided by the tokens: the mean over a document of `length` tokens."""
    return forward_flops(shape, plan, length, prefill_logits=prefill_logits) / length


def training_flops(shape: ModelShape, plan: LayerPlan, length: int) -> float:
    """Return the FLOPs to train on one document of `length` tokens: 3 x `forward_flops`.

    The backward pass has two matrix products for each one of the forward pass. These are model
    FLOPs: what activation checkpointing or an attention kernel computes again, and the optimizer's
    step, are not counted.
    """
    return 3 * forward_flops(shape, plan, length)


def training_flops_per_token(shape: ModelShape, plan: LayerPlan, length: int) -> float:
    """Return `training_flops` divided by the tokens."""
    return training_flops(shape, plan, length) / length


def decode_bytes(
    shape: ModelShape,
    plan: LayerPlan,
    length: int,
    batch: int = 1,
    bytes_per_element: int = BF16,
) -> int:
    """Return the bytes that generating one token reads after `length` tokens, for a whole batch.

    Formula: all linear weights and the output projection once, plus `kv_bytes`. Not counted: the
    input embedding (one row of it), norms, biases, activations, and the new token's own key and
    value.
    """
    weights = shape.num_hidden_layers * shape.layer_linear_parameters + shape.embedding_parameters
    return weights * bytes_per_element + kv_bytes(shape, plan, length, batch, bytes_per_element)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedups:
    """Hold how many times as fast a plan is as every layer full, by kind of work."""

    prefill: float
    training: float
    decode: float


def expected_speedups(shape: ModelShape, plan: LayerPlan, length: int, batch: int = 1) -> Speedups:
    """Return the speed-ups over the same model with every layer full, at equal kernel efficiency.

    Prefill and training are ratios of FLOPs, decode is a ratio of the bytes read, in bf16, at the
    end of `length` tokens. They assume that full and sparse layers reach the same FLOP/s and
    bytes/s, and that everything not counted takes no time: ceilings, not promises. Llama-2-7B with
    12 of 32 layers full and the paper's sink pattern at 131,072 tokens comes to 1.78, 1.78, 2.07.
    """
    full = full_plan(shape)
    return Speedups(
        prefill=forward_flops(shape, full, length, prefill_logits=True)
        / forward_flops(shape, plan, length, prefill_logits=True),
        training=training_flops(shape, full, length) / training_flops(shape, plan, length),
        decode=decode_bytes(shape, full, length, batch) / decode_bytes(shape, plan, length, batch),
    )


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Hold the estimated peak memory of one GPU, in bytes, by named part.

    Attributes:
        parts: bytes by name.
        phases: of what goes through several, the bytes of tensors in each; `parts` are those of the
            greatest.
    """

    parts: dict[str, int]
    phases: dict[str, int] = field(default_factory=dict)

    @classmethod
    def with_reserve(
        cls,
        parts: dict[str, int],
        outside: int,
        fragments: float,
        phases: dict[str, int] | None = None,
    ) -> MemoryEstimate:
        """Add to the parts what the card needs beside tensors: `outside` the allocator, and a share
        of the tensors that it loses to `fragments`."""
        reserve = outside + int(fragments * sum(parts.values()))
        return cls({**parts, RESERVE: reserve}, phases or {})

    @property
    def total(self) -> int:
        """Sum of the parts in bytes."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """Bytes of the tensors alone: what `torch.cuda.max_memory_allocated` is to be."""
        return self.total - self.parts.get(RESERVE, 0)


def serving_memory(
    shape: ModelShape,
    plan: LayerPlan,
    length: int,
    *,
    batch: int = 1,
    gpus: int = 1,
    prefill_chunk: int = 8192,
) -> MemoryEstimate:
    """Estimate one GPU's peak memory for generating up to `length` tokens in bf16.

    An estimate, to be calibrated on measured runs. Weights (2 bytes a parameter) and `kv_bytes` are
    taken to be spread evenly over `gpus`. The work on a prompt's chunk adds 14 hidden_size + 4 x
    (num_attention_heads + 2 x num_key_value_heads) x head_dim + 6 intermediate_size bytes for each
    token of it, the largest layer's cache once more (it is copied when it grows), and fp32 logits
    of each sequence's last token.

    Args:
        length: tokens of one sequence, prompt and answer together.
        batch: sequences at a time.
        gpus: GPUs that share the weights and the cache.
        prefill_chunk: tokens of a prompt read at one time.
    """
    by_layer = kv_bytes_by_layer(shape, plan, length, batch)
    token = (
        14 * shape.hidden_size
        + 4 * (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
        + 6 * shape.intermediate_size
    )
    chunk = batch * min(prefill_chunk, length) * token
    parts = {
        "weights, bf16": -(-BF16 * shape.num_parameters // gpus),
        "KV cache, bf16": -(-sum(by_layer) // gpus),
        "prompt chunk at work": chunk + max(by_layer) + FP32 * batch * shape.vocab_size,
    }
    return MemoryEstimate.with_reserve(parts, COEFFICIENTS.context_bytes, COEFFICIENTS.fragments)


def fits(estimate: MemoryEstimate, gpu: Gpu) -> bool:
    """Say whether the estimate is within the card's memory."""
    return estimate.total <= gpu.memory_bytes


def check_fits(estimate: MemoryEstimate, gpus: GpuGroup, what: str, *, force: bool = False) -> None:
    """Refuse what does not fit the GPUs by the estimate, unless it is forced.

    Args:
        estimate: memory that each GPU needs.
        gpus: what there is.
        what: beginning of the sentence, such as "Training at 131,072 tokens".
        force: do not refuse.

    Raises:
        UsageError: with both numbers and the largest part.
    """
    if force or fits(estimate, gpus.gpu):
        return
    largest, size = max(estimate.parts.items(), key=lambda part: part[1])
    raise UsageError(
        f"{what} needs about {estimate.total / GIB:.1f} GiB per GPU (the most for {largest}: "
        f"{size / GIB:.1f} GiB), but {gpus} has {gpus.gpu.memory_bytes / GIB:.1f} GiB. Take a "
        "shorter context, a smaller batch, or more or larger GPUs, or pass --force to try it all "
        "the same."
    )
