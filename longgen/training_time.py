"""How long training takes, what it costs, and what GPUs send each other, before anything runs.

Work is counted (FLOPs over visible pairs, bytes of messages) and divided by the rates of
`longgen.coefficients`. An estimate for models of some billions of parameters: small matrices reach
less than the rates say.
"""

from __future__ import annotations

from dataclasses import dataclass

from longgen.accounting import BF16, FP32, training_flops
from longgen.coefficients import COEFFICIENTS, Coefficients
from longgen.errors import UsageError
from longgen.gpus import GpuGroup, mfu
from longgen.plan import LayerPlan
from longgen.shapes import ModelShape
from longgen.training_setup import TrainingSetup

# Cards whose attention runs on the flash kernels.
_HOPPER = ("H100", "H200")
# AdamW reads weight, gradient and two moments and writes all but the gradient, in fp32.
_STEP_BYTES = 7 * FP32
_BACKWARD_ATTENTION = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """Hold the bytes that one GPU sends in one optimizer step.

    Attributes:
        context: context parallelism's, of the rank that sends most.
        sharding: FSDP2's gathering of weights and scattering of gradients, or DDP's reduction.
    """

    context: int
    sharding: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTime:
    """Hold an estimate of one optimizer step.

    Attributes:
        parts: seconds by kind of work.
        tokens: of all GPUs.
        gpus: how many.
        flops: model FLOPs of all GPUs, recomputation not counted.
        peak: of one card, FLOP/s.
        messages: what one GPU sends.
    """

    parts: dict[str, float]
    tokens: int
    gpus: int
    flops: float
    peak: float
    messages: Messages

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation."""
        return mfu(self.flops, self.seconds, self.peak, self.gpus)

    def gpu_hours(self, tokens: int) -> float:
        """Hours of all GPUs together for so many tokens."""
        return tokens / self.tokens_per_second * self.gpus / 3600


def micro_batches(sequences: int, setup: TrainingSetup) -> int:
    """Return how many times in a step each GPU works on its sequences.

    Raises:
        UsageError: if the GPUs cannot share the sequences equally.
    """
    groups = setup.gpus // setup.context_parallel
    at_once = groups * setup.batch
    if sequences % at_once:
        raise UsageError(
            f"A step has {sequences} sequences, which {groups} groups of GPUs with {setup.batch} "
            "at a time cannot share equally; change batch_tokens, the GPUs or context_parallel."
        )
    return sequences // at_once


def work_seconds(
    shape: ModelShape,
    plan: LayerPlan,
    length: int,
    peak: float,
    bandwidth: float,
    setup: TrainingSetup,
    *,
    is_hopper: bool,
    coefficients: Coefficients = COEFFICIENTS,
) -> dict[str, float]:
    """Return the seconds of one forward and backward pass on one GPU, by kind of work, messages
    left out.

    Args:
        shape: the model.
        plan: which layers are full.
        length: tokens of one sequence, one document.
        peak: of the card, FLOP/s.
        bandwidth: of its memory, bytes per second.
        setup: how it is trained.
        is_hopper: whether the flash kernels run.
        coefficients: rates.
    """
    c, tokens = coefficients, setup.tokens(length)
    again = setup.checkpointing != "off"
    products_again = setup.checkpointing in ("selective", "full")
    layers = 2 * shape.num_hidden_layers * shape.layer_linear_parameters * tokens
    # Recomputation ends before the last product of a layer, whose result nothing needs.
    last = 2 * shape.num_hidden_layers * shape.hidden_size * shape.intermediate_size * tokens
    head = 2 * shape.embedding_parameters * tokens
    products = 3 * (layers + head) + products_again * (layers - last)
    parts = {"matrix products": products / (c.matmul * peak)}
    kernels = 1.0 if is_hopper else c.other_attention
    for kind, name, forward, backward in (
        ("F", "full attention", c.full_forward, c.full_backward),
        ("S", "sparse attention", c.sparse_forward, c.sparse_backward),
    ):
        count = plan.layers.count(kind)
        if not count:
            continue
        pattern = plan.pattern_of(plan.layers.index(kind))
        pairs = pattern.mean_visible_pairs(length, shape.num_key_value_heads)
        flops = 4 * shape.head_dim * shape.num_attention_heads * pairs * count * setup.batch
        flops *= _imbalance(shape, setup, kind) / setup.context_parallel
        times = 1 + (setup.checkpointing == "full")
        rates = times / forward + _BACKWARD_ATTENTION / backward
        parts[name] = flops * rates / (kernels * peak)
    token = c.layer_traffic * shape.hidden_size + c.mlp_traffic * shape.intermediate_size
    traffic = tokens * shape.num_hidden_layers * token * (3 + again)
    parts["between matrix products"] = traffic / (c.bandwidth * bandwidth)
    return parts


def _imbalance(shape: ModelShape, setup: TrainingSetup, kind: str) -> float:
    """Return how much more than its share the last rank has to do in a layer."""
    size = setup.context_parallel
    if size == 1 or kind == "S":
        return 1.0
    from longgen.parallel.heads import heads_obstacle

    # Where heads do not divide, the last rank's queries see nearly everything.
    obstacle = heads_obstacle(shape.num_attention_heads, shape.num_key_value_heads, size)
    return 2 - 1 / size if obstacle else 1.0


def training_time(
    shape: ModelShape,
    plan: LayerPlan,
    length: int,
    gpus: GpuGroup,
    setup: TrainingSetup,
    sequences: int,
    coefficients: Coefficients = COEFFICIENTS,
) -> TrainingTime | None:
    """Estimate one optimizer step; None where the card's peaks are not known.

    Args:
        shape: the model.
        plan: which layers are full.
        length: tokens of each sequence.
        gpus: what it runs on.
        setup: how.
        sequences: of one step, over all GPUs.
        coefficients: rates.

    Raises:
        UsageError: if the GPUs cannot share the sequences equally.
    """
    passes = micro_batches(sequences, setup)
    sent = messages(shape, plan, length, setup, passes)
    peak, bandwidth = gpus.gpu.flops, gpus.gpu.bandwidth
    if not peak or not bandwidth:
        return None
    c = coefficients
    is_hopper = gpus.gpu.name.startswith(_HOPPER)
    work = work_seconds(
        shape, plan, length, peak, bandwidth, setup, is_hopper=is_hopper, coefficients=c
    )
    parts = {name: passes * seconds for name, seconds in work.items()}
    shard = shape.num_parameters / (setup.gpus if setup.is_sharded else 1)
    parts["optimizer"] = _STEP_BYTES * shard / (c.bandwidth * bandwidth)
    if setup.gpus > 1:
        # Neighbours that share a sequence are on one host.
        near = setup.context_parallel <= c.gpus_per_host
        exchange = sent.context / (c.host_link if near else c.network_link)
        near = setup.gpus <= c.gpus_per_host
        shards = sent.sharding / (c.host_link if near else c.network_link)
        parts["messages that wait"] = c.exposed_exchange * exchange + c.exposed_shards * shards
    return TrainingTime(
        parts=parts,
        tokens=sequences * length,
        gpus=setup.gpus,
        flops=sequences * training_flops(shape, plan, length),
        peak=peak,
        messages=sent,
    )


def messages(
    shape: ModelShape, plan: LayerPlan, length: int, setup: TrainingSetup, passes: int
) -> Messages:
    """Return what one GPU sends in a step of `passes` forward and backward passes.

    FSDP2 gathers bf16 weights twice and scatters fp32 gradients once a pass; DDP reduces fp32
    gradients once a step, which sends each twice. A layer that is computed again exchanges again.
    """
    others = (setup.gpus - 1) / setup.gpus
    weight = (2 * BF16 + FP32) * passes if setup.is_sharded else 2 * FP32
    sharding = int(shape.num_parameters * weight * others)
    context = 0
    if setup.context_parallel > 1:
        # They need torch.
        from longgen.layout import contiguous
        from longgen.parallel import ContextGroup
        from longgen.parallel.attend import sent_bytes

        rows = (contiguous(length),)
        size = setup.context_parallel
        for kind in sorted(set(plan.layers)):
            pattern = plan.pattern_of(plan.layers.index(kind))
            most = max(
                sent_bytes(
                    pattern,
                    rows,
                    ContextGroup(rank, size),
                    num_heads=shape.num_attention_heads,
                    num_key_value_heads=shape.num_key_value_heads,
                    head_dim=shape.head_dim,
                    bytes_per_element=setup.bytes_per_element,
                )
                for rank in range(size)
            )
            times = 2 + (setup.checkpointing != "off")
            context += times * passes * setup.batch * plan.layers.count(kind) * most
    return Messages(context=context, sharding=sharding)
