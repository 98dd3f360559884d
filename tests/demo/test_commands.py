"""Commands of the demo: queues of them, what stops them, and who holds a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from demo import commands
from demo.commands import begin, held, run_queues, stop
from longgen.errors import UsageError

NAMES = {"hybrid": "the hybrid", "full": "its twin"}
ROOT = Path(__file__).parents[2]


class Script:
    """Stands for `begin`: runs a line of Python, and notes when it began and on which GPU."""

    def __init__(self) -> None:
        self.began: list[tuple[str, int | None]] = []
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.beside: list[int] = []

    def __call__(self, words: Any, *, log: Path, gpu: int | None, lock: int) -> Any:
        name, code = words
        self.beside.append(sum(one.poll() is None for one in self.running.values()))
        self.began.append((name, gpu))
        with log.open("ab") as stream:
            process = subprocess.Popen([sys.executable, "-c", code], stdout=stream, stderr=stream)
        self.running[name] = process
        return process


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()
    monkeypatch.setattr(commands, "begin", made)
    return made


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_queues_run_beside_each_other_if_there_is_a_gpu_for_each(
    gpus: int, script: Script, tmp_path: Path
) -> None:
    wait = "import time; time.sleep(1.5)"
    queues = {
        "hybrid": [["h1", wait], ["h2", "print('found all')"]],
        "full": [["f1", wait], ["f2", ""]],
    }
    run_queues(queues, tmp_path, gpus, 0, NAMES)
    if gpus == 2:
        assert script.began[:2] == [("h1", 0), ("f1", 1)] and script.beside[1] == 1
        assert set(script.began[2:]) == {("h2", 0), ("f2", 1)}
    else:
        assert script.began == [(name, None) for name in ("h1", "h2", "f1", "f2")]
        assert script.beside == [0, 0, 0, 0]
    assert (tmp_path / "hybrid.log").read_text() == "found all\n"


def saves(folder: Path) -> str:
    """Return a program that waits, and saves when it is interrupted."""
    return (
        "import pathlib, signal, sys, time\n"
        f"def save(*_): pathlib.Path({str(folder / 'saved')!r}).touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\n"
        f"pathlib.Path({str(folder / 'ready')!r}).touch()\n"
        "time.sleep(60)\n"
    )


def test_a_command_that_fails_stops_the_one_beside_it(script: Script, tmp_path: Path) -> None:
    fails = (
        "import pathlib, sys, time\n"
        f"while not pathlib.Path({str(tmp_path / 'ready')!r}).exists(): time.sleep(0.05)\n"
        "sys.exit('error: the disk is full')\n"
    )
    began = time.monotonic()
    queues = {"hybrid": [["h", saves(tmp_path)]], "full": [["f", fails], ["f2", ""]]}
    with pytest.raises(UsageError, match=r"its twin stopped with exit status 1.*\n.*disk"):
        run_queues(queues, tmp_path, 2, 0, NAMES)
    assert time.monotonic() - began < 50
    assert (tmp_path / "saved").exists()
    assert [name for name, _ in script.began] == ["h", "f"]


def test_what_runs_is_shown_now_and_then(
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(commands, "_SECONDS_BETWEEN_LINES", 0.0)
    speaks = "import time; print('step 10/400', flush=True); time.sleep(2)"
    run_queues({"hybrid": [["h", speaks]]}, tmp_path, 1, 0, NAMES)
    assert capsys.readouterr().out.count("hybrid: step 10/400") == 1


def test_a_second_interruption_ends_what_does_not_stop() -> None:
    stubborn = "import signal, time; signal.signal(2, signal.SIG_IGN); print(1, flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{stubborn}; time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline()
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.alarm(1)
        with pytest.raises(KeyboardInterrupt):
            stop([process])
    finally:
        signal.signal(signal.SIGALRM, old)
    assert process.returncode == -signal.SIGKILL


def test_a_folder_is_in_use_while_a_command_lives(tmp_path: Path) -> None:
    with held(tmp_path) as lock:
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock,)
        )
        with pytest.raises(UsageError, match="is at work in"), held(tmp_path):
            pass
    # The run is over, its command is not.
    with pytest.raises(UsageError, match="is at work in"), held(tmp_path):
        pass
    child.kill()
    child.wait()
    with held(tmp_path):
        pass


@pytest.mark.parametrize("seen, expected", [(None, "1"), ("4,6", "6"), ("GPU-a,GPU-b", "GPU-b")])
def test_a_command_gets_its_gpu_and_the_source_tree(
    seen: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    begun: list[Any] = []

    def popen(command: list[str], **options: Any) -> None:
        begun.append((command, options))

    monkeypatch.setattr(commands.subprocess, "Popen", popen)
    begin(["extend", tmp_path / "a b"], gpu=1, log=tmp_path / "log", lock=7)
    ((command, options),) = begun
    assert command == [sys.executable, "-m", "longgen", "extend", str(tmp_path / "a b")]
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == expected
    assert options["env"]["PYTHONPATH"] == os.pathsep.join([str(ROOT), "elsewhere"])
    assert options["start_new_session"] and options["pass_fds"] == (7,)


def test_a_command_runs_and_its_failure_is_told(tmp_path: Path) -> None:
    with held(tmp_path) as lock:
        log = tmp_path / "log"
        process = begin(["plan", tmp_path / "nothing"], log=log, lock=lock)
        process.wait()
        with pytest.raises(UsageError, match="Planning stopped with exit status 2") as failed:
            commands.check(process, "Planning", log)
        assert "error: " in str(failed.value) and "nothing" in str(failed.value)
