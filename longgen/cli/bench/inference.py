"""`longgen bench inference`: prompts read and tokens written by the engine and by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longgen.cli.bench.shared import (
    SHORTEST,
    DtypeOption,
    SeedOption,
    ask_for_gpu,
    choose_dtype,
    hybrid_plan,
    open_results,
    parse_lengths,
    print_notes,
    print_table,
    refuse_two_models,
    refuse_unknown,
    report,
    run_to_end,
    say_ceiling,
    split_list,
)
from longgen.cli.console import stdout_console
from longgen.cli.models import DeviceOption, find_device, open_model, progress_lines
from longgen.cli.options import (
    BlockSizeOption,
    FullLayersOption,
    HeadShiftOption,
    JsonOption,
    LocalBlocksOption,
    PatternOption,
    PlanOptions,
    SinkBlocksOption,
    StrideBlocksOption,
    parse_tokens,
)
from longgen.errors import UsageError
from longgen.shapes import SHAPES, ModelShape, load_shape

if TYPE_CHECKING:
    import torch

    from longgen.bench.inference import InferenceBench
    from longgen.bench.inference_settings import InferenceSettings

_LENGTHS = (32768, 131072)
_QUICK_DECODE_TOKENS = 8


def inference(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The folder of a checkpoint: a hybrid, or any model LongGen knows.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="NAME",
            help=f"Instead of MODEL: random weights of a shape: {', '.join(SHAPES)}. How long a "
            "model takes doesn't depend on its weights.",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="LIST",
            help="Tokens of a prompt, such as 32K,128K,1M. [default: 32K,128K]",
        ),
    ] = None,
    full_layers: FullLayersOption = None,
    batches: Annotated[
        str | None,
        typer.Option(
            "--batches",
            metavar="LIST",
            help="Sequences that decode at once; max is as many as fit. [default: 1,4,max]",
        ),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            "--variants",
            metavar="LIST",
            help="hybrid; full, the same engine with every layer full; transformers, its own model "
            "class with sdpa and its default cache; hybrid_fp8 and full_fp8, with keys and values "
            "in 8 bits. All have the same weights; they are measured in the order given. "
            "[default: hybrid,full,transformers]",
        ),
    ] = None,
    decode_tokens: Annotated[
        int | None,
        typer.Option("--decode-tokens", min=1, help="Timed tokens of each sequence. [default: 32]"),
    ] = None,
    prefill_chunk: Annotated[
        str,
        typer.Option(
            "--prefill-chunk",
            metavar="TOKENS",
            help="Tokens of a prompt that the engine reads at a time; it is timed at once, too.",
        ),
    ] = "8K",
    resident_layers: Annotated[
        int | None,
        typer.Option(
            "--resident-layers",
            min=1,
            metavar="N",
            help="With --shape, for a model whose weights do not fit: N layers have weights, and "
            "all the others use these over again. Times are those of the whole model. "
            "[default: all]",
        ),
    ] = None,
    dtype: DtypeOption = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Finish within a minute: one length, one model that fits. Runs without a GPU too, "
            "on a tiny model.",
        ),
    ] = False,
    seed: SeedOption = 0,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder that gets inference.json, renewed after every row, and inference.png.",
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
    """Measure prefill, decoding and cache of a hybrid, beside the same model with every layer full
    and beside transformers.

    Prompts are random tokens; the caches of sequences that decode are filled with random numbers
    instead of being computed. The card's own rates of matrix products and copies are measured in
    the same run.
    """
    options = PlanOptions(
        pattern=pattern,
        block_size=block_size,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        stride_blocks=stride_blocks,
        head_shift=head_shift,
        full_layers=full_layers,
    )
    refuse_two_models(model, shape, quick=quick)
    chosen_lengths = parse_lengths(lengths)
    chosen_batches = _batches(batches)
    chunk = parse_tokens(prefill_chunk)
    found = load_shape(model) if model is not None else None

    place = find_device(device)
    ask_for_gpu(place, quick=quick, instead="the same on this CPU with a tiny model")
    settings = _settings(
        place,
        options,
        checkpoint=(model, found) if model is not None and found is not None else None,
        shape=shape,
        lengths=chosen_lengths,
        batches=chosen_batches,
        variants=split_list(variants),
        decode_tokens=decode_tokens,
        prefill_chunk=chunk,
        dtype=dtype,
        seed=seed,
        quick=quick,
        resident_layers=resident_layers,
    )
    say = progress_lines()
    if place.type != "cuda":
        say(f"no GPU: {settings.name} on the CPU; these figures say nothing about a GPU")
    packages = ("triton", "flash-attn-4", "nvidia-cutlass-dsl")
    file = open_results(out, "inference", seed=seed, device=place, packages=packages)

    from longgen.bench.inference import InferenceBench
    from longgen.bench.models import random_model, shape_config

    def load() -> Any:
        if model is not None:
            return open_model(model, place, settings.dtype)
        say(f"random weights of {settings.name}: how long a model takes doesn't depend on them")
        config = shape_config(settings.shape, settings.context)
        return random_model(
            config,
            dtype=settings.torch_dtype,
            device=place,
            seed=seed,
            resident_layers=resident_layers,
        )

    def flush(row: dict[str, Any]) -> None:
        if file:
            file.write(run.rows, _extra(run))

    run = InferenceBench(settings, load, on_row=flush, say=say)
    run_to_end(run.run, file, say)
    report(
        run.rows,
        _extra(run),
        file,
        plot=lambda path: _plot(run, path),
        show=lambda: _print_tables(run),
        json=json,
        say=say,
    )


def _batches(text: str | None) -> tuple[int | str, ...] | None:
    """Read numbers of sequences, and "max"."""
    from longgen.bench.inference_settings import MOST

    parts = split_list(text)
    if parts is None:
        return None
    wrong = [part for part in parts if part != MOST and not (part.isdecimal() and int(part))]
    if wrong or not parts:
        what = ", ".join(map(repr, wrong)) or "no number"
        raise UsageError(f"--batches has {what}; give numbers of sequences such as 1,4 or {MOST}.")
    return tuple(part if part == MOST else int(part) for part in parts)


def _settings(
    device: torch.device,
    options: PlanOptions,
    *,
    checkpoint: tuple[str, ModelShape] | None,
    shape: str | None,
    lengths: tuple[int, ...] | None,
    batches: tuple[int | str, ...] | None,
    variants: tuple[str, ...] | None,
    decode_tokens: int | None,
    prefill_chunk: int,
    dtype: str | None,
    seed: int,
    quick: bool,
    resident_layers: int | None,
) -> InferenceSettings:
    from longgen.bench.inference_settings import (
        DEFAULT_VARIANTS,
        MOST,
        VARIANTS,
        InferenceSettings,
        check_context,
        check_resident,
        quick_lengths,
        quick_settings,
        quick_shape,
    )

    check_resident(resident_layers, shape)
    dtype = choose_dtype(dtype, device)
    refuse_unknown("--variants", variants, tuple(VARIANTS))
    decode_tokens = decode_tokens or (_QUICK_DECODE_TOKENS if quick else 32)
    if checkpoint is not None:
        name, found = checkpoint
    elif shape is not None:
        name, found = shape.lower(), SHAPES[shape.lower()]
    else:
        name, found = quick_shape(device, dtype)
    most = found.max_position_embeddings if checkpoint is not None else None
    if lengths is None:
        lengths = quick_lengths(device, most, decode_tokens) if quick else _LENGTHS
    if checkpoint is not None:
        check_context(name, found.max_position_embeddings, lengths, decode_tokens)
    plan = hybrid_plan(found, max(lengths), options, device)
    settings = InferenceSettings(
        name=name,
        shape=found,
        plan=plan,
        lengths=lengths,
        device=device,
        variants=variants or DEFAULT_VARIANTS,
        batches=batches or ((1, 2) if quick else (1, 4, MOST)),
        decode_tokens=decode_tokens,
        prefill_chunk=min(prefill_chunk, max(SHORTEST, min(lengths) // 4))
        if quick and device.type != "cuda"
        else prefill_chunk,
        dtype=dtype,
        seed=seed,
        resident_layers=resident_layers,
    )
    return quick_settings(settings) if quick else settings


def _extra(run: InferenceBench) -> dict[str, Any]:
    """Return what belongs to the whole run."""
    from longgen.bench.summary import ratios

    settings = run.settings
    return {
        "shape": settings.name,
        "layers": settings.plan.layers,
        "pattern": settings.plan.pattern.to_dict(),
        "weight_bytes": run.weight_bytes,
        **({"weights": note} if (note := settings.resident_note) else {}),
        "ceiling": run.ceiling and run.ceiling.row(),
        "timing": run.timing(),
        "ratios": ratios(run.rows),
        "skipped": run.skipped,
    }


def _plot(run: InferenceBench, path: Path) -> None:
    from longgen.bench.inference_plot import plot_inference
    from longgen.evaluate.results import card_name

    settings = run.settings
    plan = f"{len(settings.plan.full_layers)} of {settings.plan.num_layers} layers full"
    title = (
        f"{settings.name} on {card_name(settings.device)}: {plan}, {settings.plan.pattern}, "
        f"{settings.dtype}"
    )
    if few := settings.resident_layers:
        title += f"; weights of {few} layers, used by all in turn"
    plot_inference(run.rows, path, title=title)


def _print_tables(run: InferenceBench) -> None:
    from longgen.bench import summary

    console = stdout_console()
    settings = run.settings
    console.print(f"{settings.name}  {settings.plan}  {settings.plan.pattern}  {settings.dtype}")
    if settings.resident_note:
        console.print(settings.resident_note)
    if run.ceiling:
        console.print(say_ceiling(run.ceiling))
    for make in summary.TABLES:
        print_table(console, *make(run.rows))
    notes = (*summary.throughput_lines(run.rows), *summary.failures(run.rows))
    print_notes(console, notes, run.skipped)
