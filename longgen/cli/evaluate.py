"""`longgen evaluate`: measure what a checkpoint finds, predicts and costs at every length."""

from __future__ import annotations

import json as json_module
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from longgen.checkpoint import RECORD
from longgen.cli.console import format_bytes, print_json, stdout_console
from longgen.cli.models import (
    DeviceOption,
    DtypeOption,
    FolderArgument,
    check_dtype,
    checkpoint_shape,
    find_device,
    open_model,
    open_tokenizer,
    progress_lines,
)
from longgen.cli.options import JsonOption, parse_tokens
from longgen.errors import UsageError
from longgen.shapes import ModelShape
from longgen.train.folder import HELDOUT, training_folder

_METRICS = ("needle", "loss", "cost")


def evaluate(
    model: FolderArgument,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="PATHS...",
            help="Text that the model was not trained on: files, folders, globs. [default: what "
            "`longgen extend` held out]",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="LIST",
            help="Lengths to measure at, in tokens, such as 4K,8K,16K. They may go beyond the "
            "model's context. [default: doubling from 4K, or an eighth of the context if that is "
            "less, up to the context]",
        ),
    ] = None,
    depths: Annotated[
        int,
        typer.Option(
            "--depths",
            min=10,
            help="Places of the needle, evenly from the start of the text to its end.",
        ),
    ] = 11,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Questions for each length and depth.")
    ] = 10,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            min=0,
            max=2**32 - 1,
            help="Decides needles, their surroundings and random prompts.",
        ),
    ] = 0,
    repeat_text: Annotated[
        bool,
        typer.Option(
            "--repeat-text",
            help="Repeat text that is shorter than a needle's length, instead of refusing it.",
        ),
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="LIST",
            help="What to measure, of needle (find a number in a long text), loss (by position) "
            "and cost (memory and time of keys and values). [default: needle,loss,cost]",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder for results and pictures; finished parts of an earlier evaluation in it "
            "are taken over. [default: DIR/evaluation]",
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            "--kv-dtype",
            metavar="NAME",
            help="fp8 measures a hybrid with keys and values in 8 bits; both does so beside the "
            "model's own format, and reports what it changes. [default: the model's own format]",
        ),
    ] = None,
    json: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Measure the model in DIR on long texts: what it finds, predicts and costs.

    Writes needle.json, loss.json and cost.json with pictures of them. Interrupted, the same command
    goes on where it stopped. Works on hybrids and on the models they were made of; a hybrid is
    measured in the engine, as it is served.
    """
    shape = checkpoint_shape(model)
    wanted = _metrics(only)
    chosen = _lengths(lengths)
    check_dtype(dtype)
    kv_dtypes = _kv_dtypes(kv_dtype, shape)
    folder = Path(out) if out else Path(model) / "evaluation"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"The output {folder} is a file; give a folder with --out.")
    _refuse_other_content(folder)
    heldout = training_folder(model) / HELDOUT
    if not text and not heldout.is_file():
        raise UsageError(
            f"{model} was not made by `longgen extend`, so there is no text held out for it "
            f"({heldout} is missing). Give text that it was not trained on with --text."
        )

    import numpy as np

    from longgen.evaluate.run import default_lengths, evaluate_model, usable_text
    from longgen.evaluate.text import tokenize_text

    chosen = chosen or default_lengths(shape.max_position_embeddings)
    place = find_device(device)
    tokenizer = open_tokenizer(model)
    tokens = tokenize_text(text, tokenizer, max(chosen)) if text else np.load(heldout)
    # Refused here before a model is loaded that may be large.
    usable_text(tokens, tokenizer, chosen, only=wanted, repeat=repeat_text)
    say = progress_lines()
    try:
        rows = evaluate_model(
            open_model(model, place, dtype),
            tokenizer,
            tokens,
            folder,
            model_name=Path(model).resolve().name,
            lengths=chosen,
            num_depths=depths,
            samples=samples,
            seed=seed,
            repeat_text=repeat_text,
            only=wanted,
            original_context=_original_context(model, shape),
            kv_dtypes=kv_dtypes,
            command=shlex.join(["longgen", *sys.argv[1:]]),
            say=say,
        )
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        raise
    if json:
        print_json({"model": model, "folder": str(folder), "lengths": list(chosen), "rows": rows})
    else:
        _print_table(rows)
        stdout_console().print(f"Results and pictures are in {folder}")


def _metrics(text: str | None) -> tuple[str, ...]:
    if text is None:
        return _METRICS
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in _METRICS]
    if unknown:
        raise UsageError(
            f"--only has {', '.join(map(repr, unknown))}; choose from {', '.join(_METRICS)}."
        )
    return tuple(name for name in _METRICS if name in names)


def _kv_dtypes(name: str | None, shape: ModelShape) -> tuple[str | None, ...]:
    if name is None:
        return (None,)
    if name not in ("fp8", "both"):
        raise UsageError(
            f"The --kv-dtype {name!r} is not known; give fp8, both, or leave it out for the "
            "model's own."
        )
    if not shape.is_hybrid:
        raise UsageError(
            f"--kv-dtype {name} is for hybrids, and the model isn't one. Leave it out, or convert "
            "the model with `longgen convert`."
        )
    return ("fp8",) if name == "fp8" else (None, "fp8")


def _lengths(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    return tuple(sorted({parse_tokens(part) for part in text.split(",")}))


def _original_context(model: str, shape: ModelShape) -> int | None:
    """Return the context of the model that a hybrid was made of, if its record says so."""
    if not shape.is_hybrid:
        return shape.max_position_embeddings
    try:
        record = json_module.loads((Path(model) / RECORD).read_text(encoding="utf-8"))
        return int(record["original_context"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line for each length and model, with a column for each figure that was measured."""
    from longgen.evaluate.report import say_windows
    from longgen.evaluate.results import VARIANTS, say_runtimes

    columns = {
        "needle": ("needles found", lambda row: f"{row['value']:.1%} of {row['n']}"),
        "loss": ("loss (nats)", lambda row: f"{row['value']:.3f}"),
        "kv_bytes": ("keys and values", lambda row: format_bytes(row["value"])),
        "prefill": ("prefill", lambda row: f"{row['value']:.2f} s"),
        "decode": ("a token", lambda row: f"{row['value']:.1f} ms"),
    }
    found: dict[tuple[str, str, int], dict[str, Any]] = {
        (*row["case"].split("."), row["length"]): row for row in rows
    }
    shown = [metric for metric in columns if any(key[0] == metric for key in found)]
    variants = list(dict.fromkeys(variant for _, variant, _ in found))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tokens", justify="right")
    if len(variants) > 1:
        table.add_column("model")
    for metric in shown:
        table.add_column(columns[metric][0], justify="right")
    for length in sorted({length for *_, length in found}):
        for variant in variants:
            cells = [VARIANTS.get(variant, variant)] if len(variants) > 1 else []
            for metric in shown:
                row = found.get((metric, variant, length))
                if row is None:
                    cells.append("")
                else:
                    cells.append("-" if row["value"] is None else columns[metric][1](row))
            table.add_row(f"{length:,}", *cells)
    stdout_console().print(table)
    if windows := say_windows([row for (metric, *_), row in found.items() if metric == "loss"]):
        stdout_console().print(windows)
    costs = [row for (metric, *_), row in found.items() if metric in ("kv_bytes", "prefill")]
    if runtimes := say_runtimes(costs, VARIANTS):
        stdout_console().print(runtimes)


def _refuse_other_content(folder: Path) -> None:
    """Refuse a folder with anything but the results of earlier evaluations."""
    if not folder.is_dir():
        return
    own = {f"{metric}{end}.json" for metric in _METRICS for end in ("", "_fp8")}
    own |= {
        f"{what}{end}.png" for what in ("needle", "loss", "kv", "decode") for end in ("", "_fp8")
    }
    own |= {"kv_dtypes.json", "report.md", "report.html"}
    found = sorted(path.name for path in folder.iterdir())
    other = [name for name in found if name not in own and not name.startswith(".")]
    for name in found:
        if name in own and name.endswith(".json"):
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            if '"identity"' not in text or '"rows"' not in text:
                other.append(name)
    if other:
        raise UsageError(
            f"The output folder {folder} holds something else than results of `longgen evaluate` "
            f"({', '.join(other[:3])}{', ...' if len(other) > 3 else ''}). Give a new folder with "
            "--out."
        )
