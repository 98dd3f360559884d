"""Run work in several processes that stop together and never outlive the one that began them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any

from longgen.errors import UsageError

_SECONDS_BETWEEN_LOOKS = 0.5


class Stopped(Exception):
    """Work was given up because other work failed or was interrupted."""


class Tally:
    """Count documents, characters and tokens of all processes, and tell them to stop."""

    def __init__(self, context: Any) -> None:
        self._counts = context.Array("q", 3)
        self._stop = context.Event()

    def add(self, *counts: int) -> None:
        """Add to the counts.

        Raises:
            Stopped: the work is to be given up.
        """
        if self._stop.is_set():
            raise Stopped
        with self._counts.get_lock():
            for i, count in enumerate(counts):
                self._counts[i] += count

    def read(self) -> tuple[int, ...]:
        """Return the counts so far."""
        with self._counts.get_lock():
            return tuple(self._counts)

    def stop(self) -> None:
        """Make the next `add` of every process raise."""
        self._stop.set()


def run_in_workers(
    work: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    shared: Any,
    workers: int,
    report: Callable[[Sequence[int], Tally], None],
) -> None:
    """Call `work(shared, tally, *arguments[i])` for every i, in no certain order.

    If one call fails, or at Ctrl-C, the others stop at their next `Tally.add`, and the error is
    raised here.

    Args:
        work: a function of a module.
        arguments: of each call.
        shared: goes to every process once.
        workers: processes; of one, this process does the work.
        report: called every half second with the numbers of the calls that ended, and the tally.

    Raises:
        UsageError: a process was ended from outside.
    """
    methods = multiprocessing.get_all_start_methods()
    # Not "fork": threads of numeric libraries do not survive it.
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        # Imported once, and not by every process.
        context.set_forkserver_preload([work.__module__])
    workers = min(workers, len(arguments))
    tally = Tally(context)
    finished: list[int] = []
    if workers <= 1:
        for number, one in enumerate(arguments):
            work(shared, _Reporting(tally, finished, report), *one)
            finished.append(number)
        return
    with ProcessPoolExecutor(workers, context, _start, (work, shared, tally)) as pool:
        numbers: dict[Future[None], int] = {
            pool.submit(_call, one): number for number, one in enumerate(arguments)
        }
        waiting = set(numbers)
        try:
            while waiting:
                ended, waiting = wait(waiting, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                for future in ended:
                    future.result()
                    finished.append(numbers[future])
                report(finished, tally)
        except BaseException as error:
            tally.stop()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise UsageError(
                    f"One of the {workers} worker processes was ended from outside, perhaps for "
                    "lack of memory. Go on with fewer --workers."
                ) from error
            raise


class _Reporting:
    """A tally that reports as it counts, for work in this process."""

    def __init__(
        self, tally: Tally, finished: list[int], report: Callable[[Sequence[int], Tally], None]
    ) -> None:
        self._tally, self._finished, self._report = tally, finished, report

    def add(self, *counts: int) -> None:
        self._tally.add(*counts)
        self._report(self._finished, self._tally)


_mine: tuple[Any, ...] = ()


def _start(work: Callable[..., None], shared: Any, tally: Tally) -> None:
    """Begin a process: it leaves Ctrl-C to the first one, and ends when that does."""
    global _mine
    _mine = (work, shared, tally)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # As many processes as cores: threads in each would only stand in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        with contextlib.suppress(OSError):
            wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call(arguments: tuple[Any, ...]) -> None:
    work, shared, tally = _mine
    work(shared, tally, *arguments)
