"""What training holds on each GPU, tensor by tensor, before anything runs.

Memory has its peak in one of three phases, and each is counted: the loss at the end of the forward
pass, when all is kept that the backward pass will need; the backward pass of the last norm; and that
of a layer, which is computed again first if it was not kept. What a layer keeps is counted as
autograd keeps it (tests/test_training_memory.py weighs it).

T below is the tokens on one GPU, h hidden_size, i intermediate_size, H and K query and key/value
heads of size D, V vocab_size, L layers, N parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from longgen.accounting import BF16, FP32, MemoryEstimate, full_plan
from longgen.coefficients import COEFFICIENTS, Coefficients
from longgen.errors import UsageError
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import ModelShape

CHECKPOINTING = ("off", "selective", "full")
SHARDINGS = ("auto", "fsdp", "ddp")
# Of the loss: rows of logits in fp32 that exist at a time (longgen.hf.head).
LOSS_CHUNK_BYTES = 512 << 20
_LEAST_CHUNK_TOKENS = 64
_TILE = 128
_INT64 = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """Say how a model is trained; the defaults are those of `longgen extend` on GPUs.

    Attributes:
        batch: sequences on a GPU (or its group under context parallelism) at a time.
        gpus: all GPUs of the run.
        context_parallel: GPUs that share each sequence.
        sharding: "fsdp" spreads weights, gradients and moments over all GPUs (FSDP2), "ddp" leaves
            them whole on each; "auto" shards where there are several.
        checkpointing: "full" keeps what goes into each layer and computes the rest again,
            "selective" keeps the output of attention too, "off" keeps everything.
        offload_activations: whether what "full" and "selective" keep goes to the host's memory.
        compile: whether norms and MLPs are compiled.
        is_bf16: whether layers compute in bf16, over weights in fp32; otherwise in fp32.
        optimizer: whether AdamW's moments exist.
        accumulates: whether gradients of earlier micro-batches exist during the forward pass.
    """

    batch: int = 1
    gpus: int = 1
    context_parallel: int = 1
    sharding: str = "auto"
    checkpointing: str = "full"
    offload_activations: bool = False
    compile: bool = True
    is_bf16: bool = True
    optimizer: bool = True
    accumulates: bool = True

    def __post_init__(self) -> None:
        for name, known in (("checkpointing", CHECKPOINTING), ("sharding", SHARDINGS)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}; choose from {', '.join(known)}."
                )
        if self.context_parallel < 1 or self.gpus % self.context_parallel:
            raise UsageError(
                f"{self.gpus} GPUs do not divide into groups of {self.context_parallel} that share "
                "a sequence; change the number of GPUs or context_parallel."
            )

    @property
    def is_sharded(self) -> bool:
        """Whether weights, gradients and moments are spread over the GPUs (FSDP2)."""
        return self.gpus > 1 and self.sharding != "ddp"

    @property
    def casts_weights(self) -> bool:
        """Whether autocast makes the bf16 weights, and so leaves norms in fp32; FSDP2 gathers
        weights in bf16."""
        return self.is_bf16 and not self.is_sharded

    @property
    def bytes_per_element(self) -> int:
        """Bytes of an activation."""
        return BF16 if self.is_bf16 else FP32

    def tokens(self, length: int) -> int:
        """Tokens on each GPU, of sequences of `length` tokens."""
        return self.batch * -(-length // self.context_parallel)


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Hold the bytes that autograd keeps of one decoder layer, on one GPU.

    Attributes:
        input: the residual stream that goes in: all that "full" checkpointing keeps.
        attention_side: of the first norm, the projections and attention, `input` (where it is kept
            as it is) and `attended` included.
        mlp_side: of the second norm and the MLP.
        attended: attention's output and its log-sum-exp, which "selective" keeps too.
        exchanged: queries, keys and values on their way to other GPUs and back, for a moment.
    """

    input: int
    attention_side: int
    mlp_side: int
    attended: int
    exchanged: int

    @property
    def total(self) -> int:
        """All that is kept without checkpointing."""
        return self.attention_side + self.mlp_side

    def kept(self, checkpointing: str) -> int:
        """Bytes that are kept from the forward to the backward pass."""
        if checkpointing == "off":
            return self.total
        return self.input + (self.attended if checkpointing == "selective" else 0)


def layer_activations(
    shape: ModelShape,
    length: int,
    setup: TrainingSetup = TrainingSetup(),
    pattern: SparsePattern | None = None,
) -> LayerActivations:
    """Return what one layer keeps for its backward pass, with e bytes an element, for each token:

    - a norm: its input (e h) if compiled, else a copy of it in fp32 and the normalised one (4 h + e
      h), and 4 bytes of the scale. Qwen3's norms of heads are not compiled;
    - inputs of linear layers: one (e h) each for q, k, v and for gate, up together. Under autocast
      norms give fp32, so that each projection casts an input of its own: 3 and 2 (1 if compiled);
    - attention: q, k, v, the output (e D (2 H + 2 K)) and the log-sum-exp (4 H), as the flash
      kernels keep them; the rotary embedding keeps nothing;
    - the MLP: gate, up and their product (3 e i), and silu(gate) if not compiled (4 e i).

    Under context parallelism a sparse layer's keys and values include those fetched (of the last
    rank, which fetches most); a full one's q, k, v and output are those of all tokens and a share of
    the heads, and the output is kept once more after its way back.

    Args:
        shape: the model.
        length: tokens of one sequence.
        setup: how it is trained.
        pattern: what the layer sees; it matters under context parallelism only. None is full.
    """
    e, tokens = setup.bytes_per_element, setup.tokens(length)
    h, width = shape.hidden_size, shape.head_dim
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    norm = tokens * ((e * h if setup.compile else (FP32 + e) * h) + FP32)
    casts = setup.casts_weights
    qkv_inputs = tokens * e * h * (3 if casts else 1)
    mlp_inputs = tokens * e * h * (2 if casts and not setup.compile else 1)
    mlp = tokens * e * shape.intermediate_size * (3 if setup.compile else 4)
    head_norms = 0
    if shape.family == "qwen3":
        head_norms = tokens * (heads + kv_heads) * ((FP32 + e) * width + FP32)
    attended = tokens * heads * (e * width + FP32)
    queries, keys = tokens * e * heads * width, 2 * tokens * e * kv_heads * width
    extra = exchanged = 0
    if setup.context_parallel > 1:
        if pattern is None or pattern.is_full:
            extra, exchanged = _full_exchange(shape, setup, tokens)
        else:
            fetched = setup.batch * _fetched(pattern, length, setup.context_parallel, kv_heads)
            extra = exchanged = 2 * fetched * e * kv_heads * width
    attention = queries + keys + attended + extra
    return LayerActivations(
        input=tokens * e * h,
        attention_side=norm + qkv_inputs + head_norms + attention,
        mlp_side=norm + mlp_inputs + mlp,
        attended=attended,
        exchanged=exchanged,
    )


def _full_exchange(shape: ModelShape, setup: TrainingSetup, tokens: int) -> tuple[int, int]:
    """Return what a full layer keeps more, and what it has on its way, under context parallelism."""
    # It needs torch, and planning for one GPU should not wait for it.
    from longgen.parallel.heads import heads_obstacle, heads_per_rank

    e, width, size = setup.bytes_per_element, shape.head_dim, setup.context_parallel
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    if heads_obstacle(heads, kv_heads, size):
        fetched = tokens * (size - 1) * 2 * e * kv_heads * width
        return fetched, fetched
    queries, keys = heads_per_rank(heads, kv_heads, size)
    copies = size * keys - kv_heads
    moved = size * tokens * e * width * (queries + 2 * keys)
    return tokens * e * width * (heads + 2 * copies), moved


def _fetched(pattern: SparsePattern, length: int, size: int, num_key_value_heads: int) -> int:
    """Return the keys that the last of `size` ranks fetches of one document, in whole tiles."""
    start = (size - 1) * length // size
    most = max(
        sum(min(stop, start) - first for first, stop in ranges if first < start)
        for head in range(min(pattern.num_head_classes, num_key_value_heads))
        for ranges in [pattern.key_ranges(start, length, head)]
    )
    return -(-most // _TILE) * _TILE


def training_memory(
    shape: ModelShape,
    length: int,
    setup: TrainingSetup = TrainingSetup(),
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
    if setup.checkpointing != "off" and setup.offload_activations:
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
    """Return the bytes of bf16 weights in hand: those that autocast made for `num_layers` layers, or
    those that FSDP2 has gathered; the output projection stays from its forward to its backward."""
    if setup.is_sharded:
        layers = coefficients.gathered_layers * shape.layer_parameters
        return setup.bytes_per_element * (layers + shape.embedding_parameters)
    return BF16 * num_layers * shape.layer_linear_parameters if setup.casts_weights else 0


def _around(shape: ModelShape, length: int, setup: TrainingSetup) -> int:
    """Return the bytes of ids, labels and positions, rotary tables, and what the last norm keeps."""
    e, h = setup.bytes_per_element, shape.hidden_size
    norm = (e * h if setup.compile else (FP32 + e) * h) + FP32
    return setup.tokens(length) * (3 * _INT64 + 2 * e * shape.head_dim + norm)


def _loss(
    shape: ModelShape, length: int, setup: TrainingSetup, kept: int, coefficients: Coefficients
) -> tuple[str, dict[str, int]]:
    """Count the loss: hidden states and their gradient, chunks of logits, the gradient of the output
    projection (V h in fp32, and the product that is added to it)."""
    e, h, tokens = setup.bytes_per_element, shape.hidden_size, setup.tokens(length)
    hidden = (e * h + FP32 * h if setup.casts_weights else e * h) + e * h
    table = shape.embedding_parameters
    weights = FP32 * table + e * table + (e * table if setup.casts_weights else 0)
    row = FP32 * shape.vocab_size
    chunk = max(_LEAST_CHUNK_TOKENS, LOSS_CHUNK_BYTES // row) * row
    logits = tokens * row
    logits = int(coefficients.logits_copies * chunk) if logits > chunk else 2 * logits
    return "loss", {
        "weights in use, bf16": _in_use(shape, setup, shape.num_hidden_layers, coefficients),
        "activations kept": kept + _around(shape, length, setup),
        "loss, chunk by chunk": tokens * hidden + weights + logits,
    }


def _last_norm(
    shape: ModelShape, length: int, setup: TrainingSetup, kept: int, coefficients: Coefficients
) -> tuple[str, dict[str, int]]:
    """Count the backward pass of the last norm; compiled it takes less than the loss did."""
    copies = 0.0 if setup.compile else coefficients.norm_backward
    layers = shape.num_hidden_layers if setup.checkpointing == "off" else 0
    table = FP32 * shape.embedding_parameters
    return "backward of the last norm", {
        "weights in use, bf16": _in_use(shape, setup, layers, coefficients),
        "activations kept": kept + _around(shape, length, setup),
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
    """Count the backward pass of a layer, the greater of its two halves: the MLP's, while all of the
    layer is there, and attention's, when the MLP's half is gone.

    Gradients at work, with e bytes an element for each token: of what comes out (e h); in the MLP of
    its product (e i, and as much again if not compiled); in attention of its output (e H D), the
    kernels' fp32 sums of dq (4 H D), of dk and dv where heads share them (8 K D), two rows of
    factors (8 H), and dq, dk, dv (e D (H + 2 K)).
    """
    e, tokens, width = setup.bytes_per_element, setup.tokens(length), shape.head_dim
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    is_kept = setup.checkpointing == "off"
    coming = tokens * e * shape.hidden_size
    mlp = tokens * e * shape.intermediate_size * (1 if setup.compile else 2)
    shared_sums = 8 * kv_heads * width if heads != kv_heads else 0
    flash = heads * (4 * width + 8) + shared_sums + e * width * (2 * heads + 2 * kv_heads)
    attention = tokens * flash + coefficients.exchanged_copies * layer.exchanged
    # Without checkpointing the last layer's half of MLP is gone by then, all others are there.
    attention -= layer.mlp_side
    again = 0
    if not is_kept:
        again = layer.total
        # What was kept of it is not made again: attention's output, and the input if the norm keeps
        # it as it is (separate operations keep another copy).
        again -= layer.attended if setup.checkpointing == "selective" else 0
        again -= layer.input if setup.compile else 0
    # The gradient of one matrix in bf16, and in fp32 where it is then added to another.
    largest = shape.hidden_size * max(shape.intermediate_size, heads * width)
    matrix = (BF16 + FP32 * setup.accumulates) * largest if setup.is_bf16 else FP32 * largest
    if setup.is_sharded:
        matrix += coefficients.reduced_layers * e * shape.layer_parameters
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
        if gradients - gone > head and not is_kept and not setup.offload_activations:
            parts["activations kept"] -= gone
            parts["gradients, fp32"] = gradients
        else:
            parts["gradients, fp32"] = min(head, gradients)
    return "backward of a layer", parts
