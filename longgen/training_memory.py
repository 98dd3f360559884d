"""What training holds on each GPU, tensor by tensor, before anything runs.

Memory has its peak in one of three phases, and each is counted: the loss at the end of the forward
pass, when all is kept that the backward pass will need; the backward pass of the last norm; and
that of a layer, which is computed again first if it was not kept.

In the docstrings T is the tokens on one GPU, h hidden_size, i intermediate_size, H and K query and
key/value heads of size D, V vocab_size.
"""

from __future__ import annotations

from dataclasses import replace

from longgen.accounting import BF16, FP32, MemoryEstimate, full_plan
from longgen.activations import LayerActivations, layer_activations
from longgen.coefficients import COEFFICIENTS, Coefficients
from longgen.plan import LayerPlan
from longgen.shapes import ModelShape
from longgen.training_setup import (
    CHECKPOINTING,
    DEFAULT_SETUP,
    KEPT_PRODUCTS,
    OFFLOADED,
    TrainingSetup,
)

# Of the loss: rows of logits in fp32 that exist at a time (longgen.hf.head).
LOSS_CHUNK_BYTES = 512 << 20
_LEAST_CHUNK_TOKENS = 64
_INT64 = 8


def training_memory(
    shape: ModelShape,
    length: int,
    setup: TrainingSetup = DEFAULT_SETUP,
    plan: LayerPlan | None = None,
    coefficients: Coefficients = COEFFICIENTS,
) -> MemoryEstimate:
    """Estimate one GPU's peak memory in training with AdamW, weights in fp32.

    Args:
        shape: the model.
        length: tokens of one sequence.
        setup: how it is trained.
        plan: which layers are full; it matters under context parallelism only. None is all.
        coefficients: what was measured.

    Returns:
        The parts of the phase in which memory is greatest, and each phase's total.
    """
    plan = plan or full_plan(shape)
    layers = {
        kind: layer_activations(shape, length, setup, plan.pattern_of(plan.layers.index(kind)))
        for kind in sorted(set(plan.layers))
    }
    fixed, gradients = _states(shape, setup)
    kept = [layers[kind].kept(setup.checkpointing) for kind in plan.layers]
    if setup.offload:
        # Two layers' are on their way to the host or back.
        kept = [2 * max(kept)]
    phases = [
        _loss(shape, length, setup, sum(kept), coefficients),
        _last_norm(shape, length, setup, sum(kept), coefficients),
        *(
            _layer(shape, length, setup, layer, sum(kept), max(kept), gradients, coefficients)
            for layer in layers.values()
        ),
    ]
    totals: dict[str, int] = {}
    chosen: dict[str, int] = {}
    for name, parts in phases:
        parts = {**fixed, **parts}
        if setup.accumulates:
            parts["gradients, fp32"] = gradients
        size = sum(parts.values())
        if size > max(totals.values(), default=-1):
            chosen = parts
        totals[name] = max(size, totals.get(name, 0))
    order = [*fixed, "gradients, fp32", "weights in use, bf16", "activations kept"]
    chosen = {name: chosen[name] for name in dict.fromkeys([*order, *chosen]) if name in chosen}
    outside = coefficients.context_bytes + (coefficients.nccl_bytes if setup.gpus > 1 else 0)
    return MemoryEstimate.with_reserve(chosen, outside, coefficients.fragments, totals)


def _states(shape: ModelShape, setup: TrainingSetup) -> tuple[dict[str, int], int]:
    """Return what is there all the time, and the bytes of all gradients."""
    shard = -(-shape.num_parameters // setup.gpus) if setup.is_sharded else shape.num_parameters
    parts = {"weights, fp32": FP32 * shard}
    if setup.optimizer:
        parts["Adam moments, fp32"] = 2 * FP32 * shard
    if setup.gpus > 1 and not setup.is_sharded:
        parts["DDP buckets, fp32"] = FP32 * shard
    return parts, FP32 * shard


def _in_use(
    shape: ModelShape, setup: TrainingSetup, num_layers: int, coefficients: Coefficients
) -> int:
    """Return the bytes of bf16 weights in hand: those that autocast made for `num_layers` layers,
    or those that FSDP2 has gathered, among them the output projection's."""
    if setup.is_sharded:
        layers = coefficients.gathered_layers * shape.layer_parameters
        return setup.bytes_per_element * (layers + shape.embedding_parameters)
    return BF16 * num_layers * shape.layer_linear_parameters if setup.casts_weights else 0


def _around(shape: ModelShape, length: int, setup: TrainingSetup) -> int:
    """Return the bytes of ids, labels, positions and rotary tables."""
    return setup.tokens(length) * (3 * _INT64 + 2 * setup.bytes_per_element * shape.head_dim)


def _kept_last(shape: ModelShape, length: int, setup: TrainingSetup) -> int:
    """Return the bytes that the last norm keeps until its backward pass."""
    e, h = setup.bytes_per_element, shape.hidden_size
    norm = (e * h if setup.compiles_last_norm else (FP32 + e) * h) + FP32
    return setup.tokens(length) * norm


def _loss(
    shape: ModelShape, length: int, setup: TrainingSetup, kept: int, coefficients: Coefficients
) -> tuple[str, dict[str, int]]:
    """Count the loss: hidden states and their gradient, chunks of logits, the gradient of the
    output projection (V h in fp32, and the product that is added to it)."""
    e, h, tokens = setup.bytes_per_element, shape.hidden_size, setup.tokens(length)
    hidden = 2 * e * h
    table = shape.embedding_parameters
    weights = FP32 * table + e * table + (e * table if setup.casts_weights else 0)
    row = FP32 * shape.vocab_size
    chunk = max(_LEAST_CHUNK_TOKENS, LOSS_CHUNK_BYTES // row) * row
    logits = tokens * row
    logits = int(coefficients.logits_copies * chunk) if logits > chunk else 2 * logits
    # Autocast keeps its copies to the end of the forward pass, but for products that run once.
    layers = 0 if setup.checkpointing == "elementwise" else shape.num_hidden_layers
    around = _around(shape, length, setup) + _kept_last(shape, length, setup)
    return "loss", {
        "weights in use, bf16": _in_use(shape, setup, layers, coefficients),
        "activations kept": kept + around,
        "loss, chunk by chunk": tokens * hidden + weights + logits,
    }


def _last_norm(
    shape: ModelShape, length: int, setup: TrainingSetup, kept: int, coefficients: Coefficients
) -> tuple[str, dict[str, int]]:
    """Count the backward pass of the last norm; compiled it takes less than the loss did."""
    copies = 0.0 if setup.compiles_last_norm else coefficients.norm_backward
    layers = shape.num_hidden_layers if setup.checkpointing == "off" else 0
    table = FP32 * shape.embedding_parameters
    around = _around(shape, length, setup) + _kept_last(shape, length, setup)
    return "backward of the last norm", {
        "weights in use, bf16": _in_use(shape, setup, layers, coefficients),
        "activations kept": kept + around,
        "gradients at work": int(copies * shape.hidden_size * setup.tokens(length)) + table,
    }


def _layer(
    shape: ModelShape,
    length: int,
    setup: TrainingSetup,
    layer: LayerActivations,
    kept: int,
    kept_each: int,
    gradients: int,
    coefficients: Coefficients,
) -> tuple[str, dict[str, int]]:
    """Count the backward pass of a layer, the greater of its two halves: the MLP's, while all of
    the layer is there, and attention's, when the MLP's half is gone.

    Gradients at work, with e bytes an element for each token: of what comes out (e h); in the MLP
    of gate and up, with that of their product in the place of the product (2 e i); in attention of
    its output (e H D), the kernels' fp32 sums of dq (4 H D), of dk and dv where heads share them
    (8 K D), two rows of factors (8 H), and dq, dk, dv (e D (H + 2 K)).
    """
    e, tokens, width = setup.bytes_per_element, setup.tokens(length), shape.head_dim
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    is_kept = setup.checkpointing == "off"
    coming = tokens * e * shape.hidden_size
    mlp = 2 * tokens * e * shape.intermediate_size
    shared_sums = 8 * kv_heads * width if heads != kv_heads else 0
    flash = heads * (4 * width + 8) + shared_sums + e * width * (2 * heads + 2 * kv_heads)
    attention = tokens * flash + coefficients.exchanged_copies * layer.exchanged
    # Without checkpointing the last layer's half of MLP is gone by then, all others are there.
    attention -= layer.mlp_side
    again = layer.again(setup.checkpointing, compile=setup.compile)
    # The gradient of one matrix in bf16, and in fp32 where it is then added to another.
    largest = shape.hidden_size * max(shape.intermediate_size, heads * width)
    matrix = (BF16 + FP32 * setup.accumulates) * largest if setup.is_bf16 else FP32 * largest
    if setup.is_sharded:
        matrix += (e + FP32 * coefficients.reduced_layers) * shape.layer_parameters
    layers = shape.num_hidden_layers if is_kept else 1
    parts = {
        "weights in use, bf16": _in_use(shape, setup, layers, coefficients),
        "activations kept": kept + _around(shape, length, setup),
        "one layer computed again": again,
        "gradients at work": coming + max(mlp, attention) + matrix,
    }
    if not setup.accumulates:
        # Gradients come as activations go: the peak is at one end.
        head = FP32 * shape.embedding_parameters
        gone = kept - kept_each
        if gradients - gone > head and not is_kept and not setup.offload:
            parts["activations kept"] -= gone
            parts["gradients, fp32"] = gradients
        else:
            parts["gradients, fp32"] = min(head, gradients)
    return "backward of a layer", parts


def choose_checkpointing(
    asked: str,
    shape: ModelShape,
    length: int,
    setup: TrainingSetup,
    plan: LayerPlan | None,
    memory_bytes: int | None,
    *,
    fp8: bool = False,
) -> TrainingSetup:
    """Return the setup with the checkpointing that was asked for.

    "auto" is the one that computes least again and fits by the estimate; where none does, and where
    there is no card to fit, the one that takes least memory.

    Args:
        asked: "auto", or one of `CHECKPOINTING`.
        shape: the model.
        length: tokens of one sequence.
        setup: everything else.
        plan: which layers are full.
        memory_bytes: of the card; None is a CPU.
        fp8: whether products are in fp8, of which no results can be kept.
    """
    if asked != "auto":
        return replace(setup, checkpointing=asked)
    names: tuple[str, ...] = OFFLOADED if setup.offload else CHECKPOINTING
    if fp8:
        names = tuple(name for name in names if name not in KEPT_PRODUCTS)
    choices = [replace(setup, checkpointing=name) for name in names]
    for choice in choices:
        if memory_bytes is None:
            break
        if training_memory(shape, length, choice, plan).total <= memory_bytes:
            return choice
    return choices[-1]


def offloaded_bytes(
    shape: ModelShape, length: int, setup: TrainingSetup, plan: LayerPlan | None = None
) -> int:
    """Return the bytes of the host's memory that one GPU's activations take."""
    if not setup.offload:
        return 0
    plan = plan or full_plan(shape)
    kept = {
        kind: layer_activations(
            shape, length, setup, plan.pattern_of(plan.layers.index(kind))
        ).kept(setup.checkpointing)
        for kind in set(plan.layers)
    }
    return sum(kept[kind] for kind in plan.layers)
