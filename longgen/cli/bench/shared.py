"""What the benchmarks' commands share: options, lists, and where results go."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from longgen.cli.console import print_json, stdout_console, three_figures
from longgen.cli.options import PlanOptions, parse_tokens, resolve_plan
from longgen.errors import UsageError
from longgen.plan import LayerPlan
from longgen.shapes import SHAPES, ModelShape

if TYPE_CHECKING:
    import torch

    from longgen.bench.save import ResultsFile
    from longgen.bench.timing import Ceiling

# Tokens of the shortest sequence that says anything.
SHORTEST = 2

DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="Number format: bf16, fp16 or fp32. [default: bf16 on a GPU, fp32 on a CPU]",
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="Of inputs and samples.")
]


def refuse_two_models(model: str | None, shape: str | None, *, quick: bool) -> None:
    """Refuse a folder and a shape at once, neither of them, and a shape in place of a folder.

    Raises:
        UsageError: if so, or the shape is not known.
    """
    if model is not None and shape is not None:
        raise UsageError(
            f"Both the model {model} and --shape {shape} were given; leave one of them out."
        )
    if model is not None and model.lower() in SHAPES and not Path(model).is_dir():
        raise UsageError(f"{model} names a shape, which has no weights; write --shape {model}.")
    if model is None and shape is None and not quick:
        raise UsageError("Give the folder of a checkpoint, or --shape NAME for random weights.")
    if shape is not None and shape.lower() not in SHAPES:
        raise UsageError(f"The shape {shape!r} is not known; choose from {', '.join(SHAPES)}.")


def parse_lengths(text: str | None) -> tuple[int, ...] | None:
    """Return the lengths that --lengths lists; None is none given.

    Raises:
        UsageError: if there is none in it, or one too short.
    """
    parts = split_list(text)
    if parts is None:
        return None
    # 1K and 1024 are one.
    lengths = tuple(dict.fromkeys(parse_tokens(part) for part in parts))
    if not lengths or min(lengths) < SHORTEST:
        raise UsageError(f"--lengths is {text!r}; give at least one length of 2 tokens or more.")
    return lengths


def split_list(text: str | None) -> tuple[str, ...] | None:
    """Return the parts between commas, each once; None stays None."""
    if text is None:
        return None
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def refuse_unknown(option: str, names: Sequence[str] | None, known: Sequence[str]) -> None:
    """Refuse a list that is empty or has a name that is not known; None is no list."""
    unknown = [name for name in names or () if name not in known]
    if unknown or names == ():
        what = ", ".join(map(repr, unknown)) or "no name"
        raise UsageError(f"{option} has {what}; choose from {', '.join(known)}.")


def choose_dtype(name: str | None, device: torch.device) -> str:
    """Return the number format to measure in.

    Raises:
        UsageError: if it is not known.
    """
    from longgen.bench.settings import DTYPES

    name = name or ("bf16" if device.type == "cuda" else "fp32")
    if name not in DTYPES:
        raise UsageError(f"The dtype {name!r} is not known; give {', '.join(DTYPES)}.")
    return name


def ask_for_gpu(device: torch.device, *, quick: bool, instead: str) -> None:
    """Refuse to measure a CPU unless it is only to try the command; `instead` is what that does."""
    if device.type != "cuda" and not quick:
        raise UsageError(
            "There is no GPU to measure, and a CPU says nothing about one. Add --quick to try "
            f"{instead}."
        )


def open_results(
    out: str | None,
    name: str,
    *,
    seed: int,
    device: torch.device,
    packages: Sequence[str] = (),
    gpus: int | None = None,
) -> ResultsFile | None:
    """Return the results file in the folder that --out names; None without one.

    Raises:
        UsageError: if something else is there.
    """
    if out is None:
        return None
    from longgen.bench.save import ResultsFile

    file = ResultsFile(
        Path(out),
        name,
        command=shlex.join(["longgen", *sys.argv[1:]]),
        seed=seed,
        device=device,
        packages=packages,
        gpus=gpus,
    )
    file.check()
    return file


def run_to_end(
    run: Callable[[], object], file: ResultsFile | None, say: Callable[[str], None]
) -> None:
    """Run a benchmark; where it is interrupted, say what becomes of its rows."""
    try:
        run()
    except KeyboardInterrupt:
        say("stopped; the rows so far are kept" if file else "stopped")
        raise


def hybrid_plan(
    found: ModelShape, context: int, options: PlanOptions, device: torch.device
) -> LayerPlan:
    """Return the plan of the hybrid that is compared with full attention; on a CPU, without
    options, a pattern for its tiny lengths.

    Raises:
        UsageError: if the options do not fit the model, or leave no layer sparse.
    """
    from longgen.bench.inference_settings import TINY_PATTERN

    if not (found.is_hybrid or options.given or device.type == "cuda"):
        options = PlanOptions(
            block_size=TINY_PATTERN.block_size,
            sink_blocks=TINY_PATTERN.sink_blocks,
            local_blocks=TINY_PATTERN.local_blocks,
        )
    remedy = "Give longer --lengths, or fewer or smaller blocks."
    plan = resolve_plan(found, context, options, allow_hybrid=True, remedy=remedy)
    if "S" not in plan.layers:
        raise UsageError(
            f"No layer of the plan ({plan}) is sparse, so there is no hybrid to compare with full "
            "attention. Leave --pattern none and --full-layers all out, or give a hybrid."
        )
    return plan


def report(
    rows: Sequence[dict[str, Any]],
    extra: dict[str, Any],
    file: ResultsFile | None,
    *,
    plot: Callable[[Path], object],
    show: Callable[[], None],
    json: bool,
    say: Callable[[str], None],
) -> None:
    """Write, draw and print what a benchmark has measured.

    Args:
        rows: all of them.
        extra: what belongs to the whole run.
        file: the results file; None where none was asked for, and nothing is drawn.
        plot: draws the PNG of a path.
        show: prints for people.
        json: print one JSON object instead.
        say: prints a line of progress.
    """
    if file:
        file.write(rows, extra, partial=False)
        path = file.path.with_suffix(".png")
        draw(lambda: plot(path), say)
    if json:
        print_json({**extra, "rows": rows})
        return
    show()
    if file:
        stdout_console().print(f"Results are in {file.path.parent}")


def print_table(console: Console, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table with an empty line before it; all columns but the variants' are figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in head:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for line in lines:
        table.add_row(*line)
    console.print()
    console.print(table)


def print_notes(console: Console, notes: Iterable[str], skipped: Iterable[dict[str, Any]]) -> None:
    """Print what stands below the tables of variants: notes, and what was left out and why."""
    console.print()
    console.print("hybrid is: times as fast (in brackets: by arithmetic, at equal efficiency)")
    for note in notes:
        console.print(note)
    for skip in skipped:
        where = f"{skip['variant']}, {skip['length']:,} tokens"
        console.print(f"{where} left out: {skip['reason']}")


def draw(plot: Callable[[], object], say: Callable[[str], None]) -> None:
    """Draw a picture; where that can't be, say why: the figures are there without it."""
    try:
        plot()
    except UsageError as error:
        say(str(error))
    except OSError as error:
        say(f"The picture could not be written: {error}.")


def say_ceiling(ceiling: Ceiling) -> str:
    """Write what the card itself reaches."""
    rate = ceiling.row()
    return (
        f"{rate['matmul_size']}^3 matmul: {figures(rate['matmul_tflops'])} TFLOP/s; copy: "
        f"{figures(rate['copy_terabytes_per_second'])} TB/s"
    )


def figures(number: Any) -> str:
    """Write a number with two figures below one, with three from there."""
    return f"{number:.2g}" if number < 0.995 else three_figures(number)
