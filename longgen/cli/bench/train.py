"""`longgen bench train`: a training step of a hybrid, all full, and of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longgen.cli.bench.shared import (
    SeedOption,
    ask_for_gpu,
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
from longgen.cli.console import is_first_process, stdout_console
from longgen.cli.models import DeviceOption, find_device, progress_lines, quiet_libraries
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
)
from longgen.shapes import SHAPES, ModelShape, load_shape
from longgen.training_setup import CHECKPOINTING, TrainingSetup, refuse_kept_products

if TYPE_CHECKING:
    import torch

    from longgen.bench.train import TrainBench
    from longgen.bench.train_settings import TrainSettings

_LENGTHS = (32768, 131072)
# What this command calls them.
_CHECKPOINTING = {"none": "off", **{name: name for name in ("auto", *CHECKPOINTING)}}


def train(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The folder of a checkpoint, whose shape and plan are taken: weights are random.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape", metavar="NAME", help=f"Instead of MODEL: a shape: {', '.join(SHAPES)}."
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            min=1,
            help="Measure a slice of so many layers, as large a share of them full, at the same "
            "places. [default: all]",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="LIST",
            help="Tokens of a sequence, such as 32K,128K,512K. [default: 32K,128K]",
        ),
    ] = None,
    full_layers: FullLayersOption = None,
    variants: Annotated[
        str | None,
        typer.Option(
            "--variants",
            metavar="LIST",
            help="hybrid; full, the same path with every layer full; transformers, its own model "
            "class with sdpa and its gradient checkpointing. [default: hybrid,full,transformers]",
        ),
    ] = None,
    checkpointing: Annotated[
        str,
        typer.Option(
            "--checkpointing",
            metavar="NAME",
            help="What layers keep for the backward pass: none (everything), elementwise (their "
            "input and results of attention and matrix products), selective (input and "
            "attention's output), full (their input), or auto, the first of them that fits.",
        ),
    ] = "auto",
    offload: Annotated[
        bool, typer.Option("--offload", help="Hold what checkpointing keeps in host memory.")
    ] = False,
    optimizer: Annotated[
        bool,
        typer.Option(
            "--optimizer/--no-optimizer",
            help="Whether a step includes gradient clipping and AdamW.",
        ),
    ] = False,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile what lies between matrix products. [default: on a GPU]",
        ),
    ] = None,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Matrix products of LongGen's layers in fp8.")
    ] = False,
    context_parallel: Annotated[
        int,
        typer.Option(
            "--context-parallel",
            min=1,
            help="Processes that share each sequence, of those that torchrun starts.",
        ),
    ] = 1,
    sharding: Annotated[
        str,
        typer.Option(
            "--sharding",
            metavar="NAME",
            help="How several processes hold the model: fsdp, ddp, or auto (fsdp on GPUs).",
        ),
    ] = "auto",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Finish within a minute: one length, few layers. Runs without a GPU too, on a "
            "tiny model.",
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="With several processes, try what does not fit by the plan, too."
        ),
    ] = False,
    seed: SeedOption = 0,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder that gets train.json, renewed after every row, and train.png.",
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
    """Measure a training step of a hybrid, beside the same model with every layer full and beside
    transformers.

    One sequence for each GPU, or for each group that shares one; weights in fp32, layers in bf16,
    as `longgen extend` trains. Under torchrun: torchrun --nproc-per-node 4 -m longgen bench train
    ... --context-parallel 4.
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
    refuse_unknown("--checkpointing", (checkpointing,), tuple(_CHECKPOINTING))
    if fp8:
        refuse_kept_products("--checkpointing", checkpointing)
    chosen_lengths = parse_lengths(lengths)
    found = load_shape(model) if model is not None else None

    place = find_device(device)
    ask_for_gpu(place, quick=quick, instead="the same on this CPU with a tiny model")
    from longgen.train.processes import Processes

    processes = Processes.start(context_parallel)
    if processes.count > 1 and place.type == "cuda":
        import torch

        place = torch.device("cuda", torch.cuda.current_device())
    if fp8:
        from longgen.train.float8 import check_float8

        check_float8(place.type)
    on_gpu = place.type == "cuda"
    from longgen.train.sharding import choose_sharding

    held = choose_sharding(sharding, processes.count, on_gpu=on_gpu)
    chooses = checkpointing == "auto"
    setup = TrainingSetup(
        gpus=processes.count,
        context_parallel=context_parallel,
        # Of one process there is nothing to choose.
        sharding=sharding if held == "none" else held,
        checkpointing="full" if chooses else _CHECKPOINTING[checkpointing],
        offload=offload,
        compile=on_gpu if compile is None else compile,
        is_bf16=on_gpu,
        optimizer=optimizer,
    )
    settings = _settings(
        place,
        options,
        setup,
        chooses=chooses,
        checkpoint=(model, found) if model is not None and found is not None else None,
        shape=shape,
        layers=layers,
        lengths=chosen_lengths,
        variants=split_list(variants),
        fp8=fp8,
        seed=seed,
        quick=quick,
        force=force,
    )
    say = progress_lines()
    if not on_gpu:
        say(f"no GPU: {settings.name} on the CPU; these figures say nothing about a GPU")
    packages = ("triton", "flash-attn-4", "nvidia-cutlass-dsl", "accelerate")
    gpus = processes.count if on_gpu else 0
    file = None
    if is_first_process():
        file = open_results(out, "train", seed=seed, device=place, packages=packages, gpus=gpus)

    from longgen.bench.train import TrainBench
    from longgen.bench.train_step import base_config

    def flush(row: dict[str, Any]) -> None:
        if file:
            file.write(run.rows, _extra(run))

    quiet_libraries()
    run = TrainBench(settings, base_config(model, settings), processes, on_row=flush, say=say)
    run_to_end(run.run, file, say)
    processes.leave()
    if not is_first_process():
        return
    report(
        run.rows,
        _extra(run),
        file,
        plot=lambda path: _plot(run, path),
        show=lambda: _print_table(run),
        json=json,
        say=say,
    )


def _settings(
    device: torch.device,
    options: PlanOptions,
    setup: TrainingSetup,
    *,
    chooses: bool,
    checkpoint: tuple[str, ModelShape] | None,
    shape: str | None,
    layers: int | None,
    lengths: tuple[int, ...] | None,
    variants: tuple[str, ...] | None,
    fp8: bool,
    seed: int,
    quick: bool,
    force: bool,
) -> TrainSettings:
    from longgen.bench.train_settings import (
        VARIANTS,
        TrainSettings,
        cut,
        quick_lengths,
        quick_model,
        quick_settings,
    )

    refuse_unknown("--variants", variants, VARIANTS)
    if checkpoint is not None:
        name, found = checkpoint
    elif shape is not None:
        name, found = shape.lower(), SHAPES[shape.lower()]
    else:
        name, found, few = quick_model(device)
        layers = layers or few
    if lengths is None:
        lengths = quick_lengths(device) if quick else _LENGTHS
    plan = hybrid_plan(found, max(lengths), options, device)
    plan = cut(plan, layers or plan.num_layers)
    settings = TrainSettings(
        name=name,
        shape=replace(found, num_hidden_layers=plan.num_layers, plan=None),
        plan=plan,
        whole_layers=found.num_hidden_layers,
        lengths=lengths,
        device=device,
        variants=variants or VARIANTS,
        setup=setup,
        chooses_checkpointing=chooses,
        fp8=fp8,
        seed=seed,
        force=force,
    )
    return quick_settings(settings) if quick else settings


def _extra(run: TrainBench) -> dict[str, Any]:
    """Return what belongs to the whole run."""
    from longgen.bench.train_summary import MFU_IS, ratios

    settings = run.settings
    return {
        "shape": settings.name,
        "layers": settings.plan.layers,
        "layers_of": settings.whole_layers,
        "pattern": settings.plan.pattern.to_dict(),
        "ceiling": run.ceiling and run.ceiling.row(),
        "mfu_is": MFU_IS,
        "peak_flops": run.peak,
        "timing": run.timing(),
        "ratios": ratios(run.rows),
        "skipped": run.skipped,
    }


def _plot(run: TrainBench, path: Path) -> None:
    from longgen.bench.train_plot import plot_train
    from longgen.bench.train_summary import checkpointing
    from longgen.evaluate.results import card_name

    settings, gpus = run.settings, run.processes.count
    plan = settings.plan
    of = f"{plan.num_layers} of {settings.whole_layers} layers, "
    step = "with optimizer" if settings.setup.optimizer else "forward + backward"
    title = (
        f"Training {settings.name} on {gpus} x {card_name(settings.device)}: "
        f"{of if plan.num_layers < settings.whole_layers else ''}"
        f"{len(plan.full_layers)} of {plan.num_layers} full, {plan.pattern}, {step}, "
        f"checkpointing {checkpointing(run.rows)}"
    )
    plot_train(run.rows, path, title=title)


def _print_table(run: TrainBench) -> None:
    from longgen.bench.train_summary import MFU_IS, communication, failures, train_table

    console, settings = stdout_console(), run.settings
    console.print(
        f"{settings.name}  {settings.plan}  {settings.plan.pattern}  {run.timing()['a_step_is']}"
    )
    if run.ceiling:
        console.print(say_ceiling(run.ceiling))
    head, lines = train_table(run.rows)
    print_table(console, head, lines)
    print_notes(console, (MFU_IS, *communication(run.rows), *failures(run.rows)), run.skipped)
