"""Commands of `longgen` as processes: one after the other, or queues of them on a GPU each."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo.checkpoint import ROOT
from demo.run import say
from longgen.errors import UsageError

Process = subprocess.Popen[bytes]
Words = Sequence[object]

LOCK = ".lock"
_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Hold a folder for this run and the commands it begins, which get the number it yields: as
    long as one of them lives, and be it alone, the folder is in use.

    Raises:
        UsageError: another run, or a command that one left behind, is at work there.
    """
    with (folder / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"Another run, or a command it left behind, is at work in {folder}. Wait for it or "
                "end it (`ps aux | grep longgen` shows it), or give another --out."
            ) from None
        yield file.fileno()


def begin(words: Words, *, log: Path | None = None, gpu: int | None = None, lock: int) -> Process:
    """Begin a command of `longgen`.

    Args:
        words: its arguments.
        log: gets its output at its end; None is the screen.
        gpu: of those that this process sees; None is all.
        lock: what `held` yields.
    """
    texts = [str(word) for word in words]
    say(f"$ longgen {shlex.join(texts)}" + (f"  (GPU {gpu})" if gpu is not None else ""))
    environment = dict(os.environ)
    # Of a source tree that isn't installed, too.
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    if gpu is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
    # In a session of its own Ctrl-C does not reach it but through `stop`, and once.
    options: Any = {"env": environment, "start_new_session": True, "pass_fds": (lock,)}
    command = [sys.executable, "-m", "longgen", *texts]
    if log is None:
        return subprocess.Popen(command, **options)
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, **options)


def stop(processes: Sequence[Process]) -> None:
    """Have commands save and stop, as Ctrl-C does; a second Ctrl-C ends them as they are."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
            process.wait()
        raise


def check(process: Process, what: str, log: Path | None = None) -> None:
    """Check how a command ended.

    Raises:
        UsageError: it failed; what it said is above, or in `log`.
    """
    if process.returncode:
        end = "".join(f"\n{line}" for line in _last_lines(log, 12)) if log is not None else ""
        where = f" The end of {log}:{end}" if log is not None else ""
        raise UsageError(f"{what} stopped with exit status {process.returncode}.{where}")


def _last_lines(log: Path, number: int) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-number:]


def run(what: str, words: Words, lock: int) -> None:
    """Run a command to its end, its output on the screen.

    Raises:
        UsageError: as `check`.
    """
    process = begin(words, lock=lock)
    try:
        process.wait()
    except BaseException:
        stop([process])
        raise
    check(process, what)


def run_queues(
    queues: Mapping[str, Sequence[Words]], out: Path, gpus: int, lock: int, names: Mapping[str, str]
) -> None:
    """Run queues of commands, beside each other if there is a GPU for each.

    Args:
        queues: commands by the name of their queue; their output goes to the end of
            `out`/NAME.log, whose last line is shown now and then.
        out: folder.
        gpus: how many there are.
        lock: what `held` yields.
        names: words for each queue, for errors.

    Raises:
        UsageError: a command failed; those beside it were stopped, and go on from there later.
    """
    several = gpus >= len(queues)
    waiting = {name: list(queue) for name, queue in queues.items()}
    logs = {name: out / f"{name}.log" for name in queues}
    running: dict[str, Process] = {}
    shown: dict[str, str] = {}
    last = time.monotonic()
    try:
        while waiting or running:
            for index, name in enumerate(queues):
                if name in running and running[name].poll() is not None:
                    check(running.pop(name), names[name], logs[name])
                if name in running or name not in waiting or (running and not several):
                    continue
                if waiting[name]:
                    gpu = index if several else None
                    running[name] = begin(waiting[name].pop(0), log=logs[name], gpu=gpu, lock=lock)
                else:
                    del waiting[name]
            if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                for name in running:
                    line = "".join(_last_lines(logs[name], 1)).strip()
                    if line and line != shown.get(name):
                        shown[name] = line
                        say(f"{name}: {line[:140]}")
            time.sleep(0.5)
    finally:
        stop(list(running.values()))
