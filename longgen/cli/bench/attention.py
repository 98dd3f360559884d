"""`longgen bench attention`: LongGen's attention beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from longgen.cli.bench.shared import (
    DtypeOption,
    SeedOption,
    ask_for_gpu,
    choose_dtype,
    figures,
    open_results,
    parse_lengths,
    refuse_unknown,
    report,
    run_to_end,
    say_ceiling,
    split_list,
)
from longgen.cli.console import stdout_console
from longgen.cli.models import DeviceOption, find_device, progress_lines
from longgen.cli.options import (
    NO_PATTERN,
    BlockSizeOption,
    HeadShiftOption,
    JsonOption,
    LocalBlocksOption,
    PatternOption,
    PlanOptions,
    SinkBlocksOption,
    StrideBlocksOption,
)
from longgen.errors import UsageError
from longgen.pattern import SparsePattern
from longgen.shapes import SHAPES

if TYPE_CHECKING:
    import torch

    from longgen.bench.attention import AttentionBench
    from longgen.bench.settings import Settings
    from longgen.bench.work import Heads

CUSTOM = "custom"


def attention(
    patterns: Annotated[
        str | None,
        typer.Option(
            "--patterns",
            metavar="LIST",
            help="Of full, sink (128 + 4,096 tokens), strided (1,024 tokens and every 16th block), "
            "sink_2k and strided_2k (about 2,048 tokens kept), and sink_2k_64 and strided_2k_64 "
            "(the same in the paper's blocks of 64). [default: full,sink,strided,sink_2k]",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="LIST",
            help="Lengths in tokens, such as 8K,32K,128K,512K. [default: 8K,32K,128K]",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="NAME",
            help=f"Take the heads of a model: {', '.join(SHAPES)}. The options below replace them.",
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", min=1, help="Query heads. [default: 32]")
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option("--kv-heads", min=1, help="Key/value heads. [default: as many as --heads]"),
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option("--head-dim", min=1, help="Size of a head. [default: 128]")
    ] = None,
    dtype: DtypeOption = None,
    directions: Annotated[
        str | None,
        typer.Option(
            "--directions", metavar="LIST", help="forward, backward. [default: forward,backward]"
        ),
    ] = None,
    providers: Annotated[
        str | None,
        typer.Option(
            "--providers",
            metavar="LIST",
            help="Who does the work: ours (LongGen's choice), flash, flex, blocked, reference, "
            "sdpa_flash, sdpa_cudnn, fa4, fa4_window, fsa. [default: all that a GPU can run well]",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Finish within a minute on any GPU: two patterns, one length that fits, fewer "
            "heads and providers. Runs without a GPU too, at tiny lengths.",
        ),
    ] = False,
    seed: SeedOption = 0,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder that gets attention.json, renewed after every row, and attention.png.",
        ),
    ] = None,
    json: JsonOption = False,
    device: DeviceOption = None,
    pattern: PatternOption = None,
    block_size: BlockSizeOption = None,
    sink_blocks: SinkBlocksOption = None,
    local_blocks: LocalBlocksOption = None,
    stride_blocks: StrideBlocksOption = None,
    head_shift: HeadShiftOption = None,
) -> None:
    """Measure attention by every provider that is installed, in TFLOP/s over visible pairs.

    Output and gradients of each are checked against fp64 before its time counts. Times are medians
    of CUDA events over inputs larger than the L2 cache; the card's own matrix-product rate is
    measured in the same run. A pattern given by its options is measured as "custom".
    """
    own = PlanOptions(
        pattern=pattern,
        block_size=block_size,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        stride_blocks=stride_blocks,
        head_shift=head_shift,
    )
    if own.pattern == NO_PATTERN:
        raise UsageError(
            f"--pattern {NO_PATTERN} is full attention, which --patterns full measures; leave it "
            "out."
        )
    custom = own.sparse_pattern() if own.given else None
    chosen_lengths = parse_lengths(lengths)

    place = find_device(device)
    ask_for_gpu(
        place, quick=quick, instead="the portable implementations on this CPU at tiny lengths"
    )

    from longgen.bench.attention import AttentionBench

    settings = _settings(
        place,
        quick=quick,
        patterns=_patterns(patterns, custom, quick),
        lengths=chosen_lengths,
        heads=_heads(shape, heads, kv_heads, head_dim, place, quick),
        dtype=dtype,
        directions=split_list(directions),
        providers=split_list(providers),
        seed=seed,
    )
    say = progress_lines()
    if place.type != "cuda":
        say("no GPU: tiny lengths on the CPU; these figures say nothing about a GPU")

    file = open_results(out, "attention", seed=seed, device=place, packages=_packages(settings))

    def flush(row: dict[str, Any]) -> None:
        if file:
            file.write(run.rows, _extra(run))

    run = AttentionBench(settings, on_row=flush, say=say)
    run_to_end(run.run, file, say)
    report(
        run.rows,
        _extra(run),
        file,
        plot=lambda path: _plot(run, path),
        show=lambda: _print_table(run),
        json=json,
        say=say,
    )


def _patterns(
    text: str | None, custom: SparsePattern | None, quick: bool
) -> dict[str, SparsePattern]:
    """Return the patterns by name: those of --patterns, and the one of the pattern options."""
    from longgen.bench.work import PATTERNS

    names = split_list(text)
    if names is None:
        names = () if custom else ("full", "sink_2k") if quick else tuple(PATTERNS)[:4]
    refuse_unknown("--patterns", names or (None if custom else ()), tuple(PATTERNS))
    found = {name: PATTERNS[name] for name in names}
    return found | ({CUSTOM: custom} if custom else {})


def _heads(
    shape: str | None,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    device: torch.device,
    quick: bool,
) -> Heads:
    from longgen.bench.work import Heads

    if shape is not None:
        if shape.lower() not in SHAPES:
            raise UsageError(f"The shape {shape!r} is not known; choose from {', '.join(SHAPES)}.")
        model = SHAPES[shape.lower()]
        base = (model.num_attention_heads, model.num_key_value_heads, model.head_dim)
    elif quick:
        base = (8, 8, 128) if device.type == "cuda" else (2, 1, 32)
    else:
        base = (32, 32, 128)
    if heads is not None and shape is None and kv_heads is None:
        kv_heads = heads
    return Heads(heads=heads or base[0], kv_heads=kv_heads or base[1], head_dim=head_dim or base[2])


def _settings(
    device: torch.device,
    *,
    quick: bool,
    patterns: dict[str, SparsePattern],
    lengths: tuple[int, ...] | None,
    heads: Heads,
    dtype: str | None,
    directions: tuple[str, ...] | None,
    providers: tuple[str, ...] | None,
    seed: int,
) -> Settings:
    from longgen.bench.providers import choose, default_providers
    from longgen.bench.settings import Settings, quick_settings
    from longgen.bench.work import DIRECTIONS

    dtype = choose_dtype(dtype, device)
    refuse_unknown("--directions", directions, DIRECTIONS)
    if providers == ():
        raise UsageError("--providers has no name; leave it out to measure all that run well here.")
    settings = Settings(
        patterns=patterns,
        lengths=lengths or (8192, 32768, 131072),
        providers=tuple(choose(providers or default_providers(device, quick=quick))),
        shape=heads,
        device=device,
        directions=tuple(d for d in DIRECTIONS if directions is None or d in directions),
        dtype=dtype,
        seed=seed,
    )
    return quick_settings(settings, keep_lengths=lengths is not None) if quick else settings


def _packages(settings: Settings) -> tuple[str, ...]:
    found = [p.package for p in settings.providers if p.package]
    found += ["nvidia-cutlass-dsl"] if "flash-attn-4" in found else []
    return tuple(dict.fromkeys(["triton", *found]))


def _extra(run: AttentionBench) -> dict[str, Any]:
    """Return what belongs to the whole run: the card's own rates, how it was timed, what is not
    there."""
    return {
        "ceiling": run.ceiling and run.ceiling.row(),
        "timing": run.timing(),
        "skipped": run.skipped,
    }


def _plot(run: AttentionBench, path: Path) -> None:
    from longgen.bench.plots import plot_attention
    from longgen.evaluate.results import card_name

    settings = run.settings
    card = card_name(settings.device)
    title = f"Attention on {card}: {settings.shape}, {settings.dtype}, batch 1"
    plot_attention(run.rows, path, title=title)


def _print_table(run: AttentionBench) -> None:
    """Print a line for each pattern, length and provider."""
    from longgen.bench.plots import cases_of
    from longgen.evaluate.results import say_tokens

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("pattern", "tokens", "provider"):
        # Names are read whole; it's the heads of figures that wrap on a narrow screen.
        table.add_column(column, justify="right" if column == "tokens" else "left", no_wrap=True)
    shown = run.settings.directions
    for direction in shown:
        for column in (f"{direction} TFLOP/s", "of matmul", "ms"):
            table.add_column(column, justify="right")
    found = {(row["case"], row["length"], row["provider"]): row for row in run.rows}
    lines = list(dict.fromkeys((length, provider) for _, length, provider in found))
    for name in cases_of(run.rows):
        last = None
        for length, provider in lines:
            rows = [found.get((f"attention.{name}.{d}", length, provider)) for d in shown]
            if not any(rows):
                continue
            new = length != last
            last = length
            cells = [name if new else "", say_tokens(length) if new else "", provider]
            for row in rows:
                if row is None or row["value"] is None:
                    cells += ["-", "", ""]
                    continue
                cells += [
                    figures(row["value"]),
                    f"{row['share_of_matmul']:.0%}",
                    figures(row["ms"]),
                ]
            table.add_row(*cells)
    console = stdout_console()
    if run.ceiling:
        console.print(say_ceiling(run.ceiling))
    console.print(table)
    notes = {f"{row['provider']}: {row['note']}" for row in run.rows if "note" in row}
    failed = {
        f"{row['provider']} {row['case']} {say_tokens(row['length'])}: {row['error']}"
        for row in run.rows
        if "error" in row
    }
    for line in (*sorted(notes), *sorted(failed)):
        console.print(line)
    for skip in run.skipped:
        where = f" {skip['pattern']}" if skip["pattern"] else ""
        console.print(f"{skip['provider']}{where} was left out: {skip['reason']}")
