"""Runs in a process of their own that is interrupted or killed, and what resuming makes of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import longgen
from longgen.train.config import ExtendConfig
from longgen.train.extend import extend, training_folder
from longgen.train.saving import OPTIMIZER, WEIGHTS

Settings = Callable[..., ExtendConfig]

# Killed after the weights of checkpoint 4 and before its optimizer: no clean-up of any kind.
KILLED_WHILE_SAVING = """
import os, signal, sys
from longgen.cli import main
from longgen.train.trainer import LongGenTrainer

save = LongGenTrainer._save_optimizer_and_scheduler

def die(self, folder):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)

LongGenTrainer._save_optimizer_and_scheduler = die
sys.exit(main(sys.argv[1:]))
"""


def start(program: list[str], config: ExtendConfig) -> subprocess.Popen[str]:
    """Start `longgen extend` with the settings of `config` on one thread, as the tests have it."""
    recipe = Path(config.out).with_suffix(".toml")
    fields = config.to_dict()
    lines = [
        f"{name} = {json.dumps(value)}"
        for name, value in fields.items()
        if name not in ("layers", "pattern") and value is not None
    ]
    lines += [f'full_layers = "{config.layers}"']
    lines += [f"{name} = {value}" for name, value in config.pattern.items()]
    recipe.write_text("\n".join(lines))
    return subprocess.Popen(
        [sys.executable, *program, "extend", "--recipe", str(recipe)],
        cwd=Path(longgen.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def logged(config: ExtendConfig) -> list[tuple[int, float]]:
    """Return step and loss of every whole line of the log."""
    path = training_folder(config.out) / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [(line["step"], line["loss"]) for line in lines]


def assert_equal(one: ExtendConfig, other: ExtendConfig) -> None:
    """See that two runs had the same losses and made the same weights, bit for bit."""
    assert logged(one) == logged(other)
    first, second = (load_file(Path(c.out) / "model.safetensors") for c in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def quiet(line: str) -> None:
    pass


def test_ctrl_c_saves_and_the_resumed_run_equals_one_that_was_never_stopped(
    settings: Settings,
) -> None:
    # Long enough that the signal comes well before the end; checkpoints only where it strikes.
    whole, stopped = (settings(n, steps=40, save_steps=1000) for n in ("whole", "stopped"))
    process = start(["-m", "longgen"], stopped)
    deadline = time.monotonic() + 200
    while len(logged(stopped)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out) == (130, "")
    step = len(logged(stopped))
    assert 3 <= step < 40
    assert "stopping after this step and saving" in err
    assert f"stopped and saved at step {step} of 40" in err
    assert err.endswith(f"go on with: longgen extend --out {stopped.out} --resume\n")
    assert not (Path(stopped.out) / "config.json").exists()

    lines: list[str] = []
    assert extend(stopped, resume=True, say=lines.append)["finished"]
    assert f"resuming from checkpoint-{step}" in lines
    extend(whole, say=quiet)
    assert_equal(whole, stopped)


def test_a_kill_while_a_checkpoint_is_written_costs_the_steps_since_the_last_whole_one(
    settings: Settings,
) -> None:
    whole, killed = settings("whole"), settings("killed")
    process = start(["-c", KILLED_WHILE_SAVING], killed)
    _, err = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, err
    cut_off = training_folder(killed.out) / "checkpoint-4"
    assert (cut_off / WEIGHTS / ".metadata").exists() and not (cut_off / OPTIMIZER).exists()

    lines: list[str] = []
    assert extend(killed, resume=True, say=lines.append)["finished"]
    assert "checkpoint-4 was cut off while it was written; it is not used" in lines
    assert "resuming from checkpoint-2" in lines
    extend(whole, say=quiet)
    assert_equal(whole, killed)


def test_a_second_ctrl_c_stops_at_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    config = settings()

    def press_twice(*args: object, **kwargs: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("longgen.train.trainer.Progress.count", press_twice)
    with pytest.raises(KeyboardInterrupt):
        extend(config, say=quiet)
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(training_folder(config.out).glob("checkpoint-*"))
