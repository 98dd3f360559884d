"""Groups of processes on this machine that talk over gloo, for tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection
from typing import Any

import torch

_SECONDS = 300
_SECONDS_ON_GPUS = 1200  # there, kernels are compiled for each case
# Processes take the environment that they are started in.
_ENVIRONMENT = threading.Lock()


def run_processes(
    count: int, work: Callable[..., Any], *arguments: Any, on_gpus: bool = False
) -> list[Any]:
    """Run `work(rank, *arguments)` in `count` processes, and return what each returned.

    The environment is torchrun's, so that what runs under it runs here; one process has none.
    `work` must be importable by name, and what it returns must pickle. With `on_gpus` each process
    sees the first `count` GPUs, else none.
    """
    pipes, processes = _start(count, work, arguments, on_gpus)
    seconds = _SECONDS_ON_GPUS if on_gpus else _SECONDS
    results: dict[int, Any] = {}
    try:
        while len(results) < count:
            ready = connection.wait([p for r, p in enumerate(pipes) if r not in results], seconds)
            assert ready, f"processes do not answer; {sorted(results)} of {count} have"
            for rank in (pipes.index(pipe) for pipe in ready):
                done, result = pipes[rank].recv()
                assert done, f"process {rank} of {count} failed:\n{result}"
                results[rank] = result
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    return [results[rank] for rank in range(count)]


def run_groups(
    count: int, work: Callable[..., Any], jobs: Sequence[Any], *, at_once: int
) -> list[list[Any]]:
    """Run `work(rank, some of the jobs)` in groups of `count` processes on GPUs, `at_once` groups
    beside each other, and return for each rank what it returned of each job, in their order.

    `work` returns a list, an entry a job. Where compilers take the time, groups share it.
    """
    parts = [jobs[i::at_once] for i in range(at_once)]
    with ThreadPoolExecutor(at_once) as threads:
        groups = list(
            threads.map(lambda part: run_processes(count, work, part, on_gpus=True), parts)
        )
    return [
        [groups[i % at_once][rank][i // at_once] for i in range(len(jobs))] for rank in range(count)
    ]


def run_until_killed(count: int, work: Callable[..., Any], *arguments: Any) -> list[int | None]:
    """Run `work(rank, *arguments)` in `count` processes until one has ended, then kill the others,
    as torchrun does, and return how each ended."""
    _, processes = _start(count, work, arguments)
    try:
        connection.wait([process.sentinel for process in processes], _SECONDS)
    finally:
        for process in processes:
            process.kill()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _start(
    count: int, work: Callable[..., Any], arguments: tuple[Any, ...], on_gpus: bool = False
) -> tuple[list[connection.Connection], list[Any]]:
    """Start the processes, and return where each sends its result."""
    if on_gpus:
        # What has looked for GPUs cannot be copied.
        context: Any = multiprocessing.get_context("spawn")
    else:
        # One process imports everything and is then copied, which takes milliseconds a copy.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["longgen.train.extend", "accelerate", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    with _ENVIRONMENT:
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(before, count if on_gpus else 0)
        try:
            for rank in range(count):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run, args=(rank, count, port, theirs, work, arguments), daemon=True
                )
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
        finally:
            if before is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = before
    return pipes, processes


def _visible(devices: str | None, count: int) -> str:
    """Return the first `count` of the GPUs that are visible here, as CUDA_VISIBLE_DEVICES has
    them."""
    known = devices.split(",") if devices else [str(index) for index in range(count)]
    return ",".join(known[:count])


def _run(
    rank: int,
    count: int,
    port: int,
    pipe: Any,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    if count > 1:
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
        )
    torch.set_num_threads(1)
    try:
        answer = (True, work(rank, *arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
