"""The processes of one training run: who they are, and the little they have to agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longgen.errors import ReportedElsewhere, UsageError
from longgen.gpus import GpuGroup
from longgen.parallel import ContextGroup, make_mesh

T = TypeVar("T")

# How long processes wait for one another: one tokenizes the data for all.
_PATIENCE = timedelta(hours=24)


def num_processes() -> int:
    """Return how many processes torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True, slots=True)
class Processes:
    """Hold what this process knows of a run's processes.

    Attributes:
        rank: this process's number.
        count: all processes.
        group: those that it shares its sequences with; None if it has whole ones.
    """

    rank: int = 0
    count: int = 1
    group: ContextGroup | None = None

    @classmethod
    def start(cls, context_parallel: int) -> Processes:
        """Join the processes that torchrun has started, in groups that share a sequence.

        Args:
            context_parallel: processes that share a sequence; neighbours by rank.

        Raises:
            UsageError: if they do not divide into such groups, or a process has no GPU of its own.
        """
        count = num_processes()
        if count % context_parallel:
            raise UsageError(
                f"context_parallel is {context_parallel}, but {count} "
                f"{'process was' if count == 1 else 'processes were'} started. Start a multiple of "
                f"it: torchrun --nproc-per-node {context_parallel} -m longgen ..., or "
                "change context_parallel."
            )
        if count == 1:
            return cls()
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            place, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if place >= found:
                raise UsageError(
                    f"Process {place} of this host has no GPU: torch sees {found}. Start as many "
                    "processes as there are GPUs."
                )
            torch.cuda.set_device(place)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
        group = None
        if context_parallel > 1:
            mesh = make_mesh(context_parallel, "cuda" if on_gpu else "cpu")
            group = ContextGroup.from_mesh(mesh)
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def context_parallel(self) -> int:
        """Processes that share a sequence."""
        return self.group.size if self.group else 1

    @property
    def data_parallel(self) -> int:
        """Sequences that are worked on at a time."""
        return self.count // self.context_parallel

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def first(self, work: Callable[[], T], then: Callable[[], T]) -> T:
        """Do `work` on the first process and, when it is done, `then` on the others.

        Raises:
            UsageError: what `work` raised; on the others `ReportedElsewhere` with its sentence.
        """
        error: UsageError | None = None
        if self.is_first:
            try:
                result = work()
            except UsageError as failure:
                error = failure
        if self.count > 1:
            message = [str(error) if error else None]
            dist.broadcast_object_list(message, src=0)
            if message[0] is not None and not self.is_first:
                raise ReportedElsewhere(message[0])
        if error is not None:
            raise error
        return result if self.is_first else then()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, in fp64."""
        totals = torch.tensor(values, dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(totals)
        return totals.tolist()

    def each(self, value: float) -> list[float]:
        """Return the values of all processes, by rank, in fp64."""
        values = [0.0] * self.count
        values[self.rank] = value
        return self.sum(values)

    def gather(self, value: T) -> list[T]:
        """Return what all processes have, by rank; it must pickle."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def least_memory(self, gpus: GpuGroup | None) -> int | None:
        """Return the bytes of the smallest card of all processes: cards may differ, but what is
        exchanged must not. None without a GPU, as on all of them then.

        Args:
            gpus: this machine's.
        """
        return None if gpus is None else int(min(self.each(gpus.gpu.memory_bytes)))

    def any(self, flag: bool) -> bool:
        """Whether it is true on some process."""
        return self.sum([float(flag)])[0] > 0

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.sum([0.0])

    @staticmethod
    def leave() -> None:
        """End what `start` began, when all has gone well: NCCL warns of groups that are left open.

        Where a process fails it isn't called, for it waits for the others.
        """
        if dist.is_initialized():
            dist.destroy_process_group()
