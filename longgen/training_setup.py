"""How a model is trained, as far as it decides what training takes."""

from __future__ import annotations

from dataclasses import dataclass

from longgen.accounting import BF16, FP32
from longgen.errors import UsageError

CHECKPOINTING = ("off", "elementwise", "selective", "full")
# What can be held in host memory: of the others moving it takes longer than computing it again.
OFFLOADED = ("selective", "full")
# What keeps results of matrix products; those in fp8 give none to keep.
KEPT_PRODUCTS = ("elementwise",)
SHARDINGS = ("auto", "fsdp", "ddp")


def refuse_kept_products(name: str, checkpointing: str) -> None:
    """Refuse checkpointing that fp8 leaves nothing to keep for.

    Raises:
        UsageError: if it is one of `KEPT_PRODUCTS`; `name` is what the user calls it.
    """
    if checkpointing in KEPT_PRODUCTS:
        raise UsageError(
            f"{name} is {checkpointing}, which keeps results of matrix products, and fp8 products "
            "give none to keep. Give selective, or leave fp8 out."
        )


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
            "selective" keeps the output of attention too, "elementwise" those of matrix products
            as well, "off" keeps everything.
        offload: whether what "full" and "selective" keep goes to the host's memory.
        compile: whether norms, rotary embedding and the gates of MLPs are compiled.
        is_bf16: whether layers compute in bf16, over weights in fp32; otherwise in fp32.
        optimizer: whether AdamW's moments exist.
        accumulates: whether gradients of earlier micro-batches exist during the forward pass.
    """

    batch: int = 1
    gpus: int = 1
    context_parallel: int = 1
    sharding: str = "auto"
    checkpointing: str = "full"
    offload: bool = False
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
        if self.offload and self.checkpointing not in OFFLOADED:
            raise UsageError(
                "offload moves the little that checkpointing keeps to host memory, and "
                f"checkpointing is {self.checkpointing}. Give {' or '.join(OFFLOADED)}, or leave "
                "offload out."
            )
        if self.context_parallel < 1 or self.gpus % self.context_parallel:
            raise UsageError(
                f"{self.gpus} GPUs do not divide into groups of {self.context_parallel} that share "
                "a sequence; change the number of GPUs (--gpus 8xH100, say) or context_parallel."
            )

    @property
    def is_sharded(self) -> bool:
        """Whether weights, gradients and moments are spread over the GPUs (FSDP2)."""
        return self.gpus > 1 and self.sharding != "ddp"

    @property
    def casts_weights(self) -> bool:
        """Whether autocast makes the bf16 weights; FSDP2 gathers weights in bf16."""
        return self.is_bf16 and not self.is_sharded

    @property
    def bytes_per_element(self) -> int:
        """Bytes of an activation."""
        return BF16 if self.is_bf16 else FP32

    @property
    def compiles_last_norm(self) -> bool:
        """Whether the norm behind the layers is compiled too; FSDP2 has hooks on it."""
        return self.compile and not self.is_sharded

    def tokens(self, length: int) -> int:
        """Tokens on each GPU, of sequences of `length` tokens."""
        return self.batch * -(-length // self.context_parallel)


DEFAULT_SETUP = TrainingSetup()
