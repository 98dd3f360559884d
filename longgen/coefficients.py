"""The numbers that planning takes from measurements: the only place where they stand.

Everything else in the plan is counted: tensors, FLOPs, messages. `longgen.calibration` compares
plans with what `longgen bench train` measured, and fits the rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from longgen.gpus import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """Hold what cannot be counted: memory first, then rates as shares of a card's datasheet peak,
    then links in bytes per second of one GPU and the share of messages that no work hides.

    Attributes:
        context_bytes: a CUDA context with its libraries, outside the allocator.
        nccl_bytes: buffers of the collectives of several GPUs, outside the allocator.
        fragments: what the allocator holds beyond the tensors, as a share of them.
        logits_copies: chunks of fp32 logits that exist at one time while the loss goes on to the
            next chunk: the last one, its bf16 gradient, and the new one in bf16 and in fp32.
        norm_backward: bytes a token and hidden_size while the last norm's gradient is computed, by
            separate operations.
        gathered_layers: layers of bf16 weights that FSDP2 has in hand: the one at work, the next
            one, and the buffer that it comes in.
        reduced_layers: layers of fp32 gradients on their way to the shards, beside the bf16 ones of
            the layer at work.
        exchanged_copies: copies of queries, keys and values (or of their gradients) on their way
            through an all-to-all: to be sent, received, and put in order.
        matmul: linear layers.
        full_forward: full attention, forward, over visible pairs (flash kernels on Hopper).
        full_backward: the same, backward, at 2.5 times the forward FLOPs.
        sparse_forward: a layer that keeps about 2K tokens.
        sparse_backward: the same, backward.
        other_attention: what other cards and FlexAttention reach of the attention rates.
        bandwidth: reading and writing what lies between matrix products.
        layer_traffic: bytes read and written a token and layer for each of hidden_size in a
            forward pass, between matrix products; the backward pass moves twice as many.
        mlp_traffic: the same for each of intermediate_size.
        host_link: among the GPUs of one host.
        network_link: between hosts.
        gpus_per_host: GPUs of one host.
        exposed_shards: of FSDP's messages.
        exposed_exchange: of context parallelism's messages.
    """

    context_bytes: int = GIB
    nccl_bytes: int = GIB
    fragments: float = 0.05
    logits_copies: float = 3.0
    norm_backward: float = 18.0
    gathered_layers: int = 3
    reduced_layers: int = 2
    exchanged_copies: int = 3

    # One H200, 2026-11-24, 131,072 tokens, 32 heads of 128: 649 and 614 of 989 TFLOP/s (full), 575
    # and 511 (2K kept); benchmarks/results/2026-11-24_nvidia-h200_attention.json. An 8192^3 matrix
    # product reached 793 in the same run; products of a training step are assumed to reach less.
    matmul: float = 0.70
    full_forward: float = 0.65
    full_backward: float = 0.62
    sparse_forward: float = 0.58
    sparse_backward: float = 0.51
    # FlexAttention reached 365 to 407 TFLOP/s where the flash kernels reached about 580.
    other_attention: float = 0.65
    # A device copy reached 4.3 of the H200's 4.8 TB/s.
    bandwidth: float = 0.85
    layer_traffic: float = 24.0
    mlp_traffic: float = 8.0

    # Two H200s of one host, benchmarks/results/2026-11-28_nvidia-h200_train-2gpus.json: 17.7 GB a
    # GPU and step took 0.134 s, waiting for each other included (NVLink has 450 GB/s each way);
    # 0.080 s had nothing beside them, where these give 0.093.
    host_link: float = 130e9
    # Assumed, not measured. A 400 Gbit/s adapter has 50 GB/s.
    network_link: float = 40e9
    gpus_per_host: int = 8
    exposed_shards: float = 0.25
    exposed_exchange: float = 1.0


COEFFICIENTS = Coefficients()
