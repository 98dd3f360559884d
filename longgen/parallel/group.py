"""The processes that share the tokens of a sequence, and how their layers talk to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longgen.errors import UsageError

DATA_AXIS, CONTEXT_AXIS = "dp", "cp"
FULL_MODES = ("auto", "heads", "ranges")


@dataclass(frozen=True, slots=True)
class ContextGroup:
    """Hold what a process knows of the group that it shares its sequences with.

    Rank r of n holds tokens [r * T, (r + 1) * T) of every row of n * T tokens.

    Attributes:
        rank: this process's place in the group.
        size: processes in the group.
        process_group: torch.distributed's handle; None is the group of all processes.
        full_mode: what full layers exchange. "heads": every rank gets all tokens of some heads
            (all-to-all, as in DeepSpeed Ulysses), so that all have the same work. "ranges": every
            rank fetches the keys that its queries see, as sparse layers do, so that the last rank
            has the most work. "auto": heads where they divide, else ranges.
    """

    rank: int
    size: int
    process_group: Any = None
    full_mode: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise UsageError(f"Rank {self.rank} is not in a group of {self.size} processes.")
        if self.full_mode not in FULL_MODES:
            raise UsageError(
                f"full_mode is {self.full_mode!r}; choose from {', '.join(FULL_MODES)}."
            )

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, full_mode: str = "auto") -> ContextGroup:
        """Return this process's group along the context axis of a mesh made by `make_mesh`."""
        axis = mesh[CONTEXT_AXIS]
        return cls(axis.get_local_rank(), axis.size(), axis.get_group(), full_mode)

    def gather(self, shard: torch.Tensor) -> torch.Tensor:
        """Put the shards (..., T) of all ranks together: (..., size * T), without gradients."""
        shard = shard.contiguous()
        parts = [torch.empty_like(shard) for _ in range(self.size)]
        dist.all_gather(parts, shard, group=self.process_group)
        return torch.cat(parts, -1)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' `values`, without gradients."""
        total = values.detach().clone()
        dist.all_reduce(total, group=self.process_group)
        return total


def make_mesh(context_parallel: int, device_type: str) -> DeviceMesh:
    """Arrange all processes as (data parallel, context parallel); neighbours share sequences.

    Args:
        context_parallel: processes that share a sequence; they should be on one host.
        device_type: "cpu" or "cuda".

    Raises:
        UsageError: if the processes do not divide into such groups.
    """
    processes = dist.get_world_size()
    if context_parallel < 1 or processes % context_parallel:
        raise UsageError(
            f"{processes} processes do not divide into groups of {context_parallel} that share a "
            "sequence; start a multiple of context_parallel, or change it."
        )
    shape = (processes // context_parallel, context_parallel)
    return init_device_mesh(device_type, shape, mesh_dim_names=(DATA_AXIS, CONTEXT_AXIS))
