"""`longgen extend`: make a hybrid of a checkpoint and train it at the longer context."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from longgen.cli.console import is_first_process, print_json
from longgen.cli.models import checkpoint_shape, progress_lines, quiet_libraries
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
    resolve_plan,
)
from longgen.errors import UsageError
from longgen.train.config import PLAN_OPTIONS, ExtendConfig, check_context, read_recipe
from longgen.train.folder import check_folder, read_run, training_folder

_DATA, _TRAINING, _MACHINE = "Data", "Training", "Machine and run"
_TOKENS = ("context", "batch_tokens", "heldout_tokens")


def _option(
    name: str, help: str, panel: str, metavar: str | None = None, default: str | None = None
) -> Any:
    """Return the option of a setting; its help ends with the default of `ExtendConfig`."""
    value = next(entry.default for entry in fields(ExtendConfig) if entry.name == name)
    flag = "--" + name.replace("_", "-")
    switch = [f"{flag}/--no-{flag[2:]}"] if isinstance(value, bool) else [flag]
    shown = default or ("off" if value is False else f"{value}")
    return typer.Option(
        *switch, metavar=metavar, help=f"{help} [default: {shown}]", rich_help_panel=panel
    )


def extend(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The folder of the checkpoint to start from, with full attention in every layer.",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            metavar="TOKENS",
            help="Context length to extend to, in tokens; 128K is 131072. Training sequences are "
            "as long.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="PATHS...",
            help="What to train on: files (text, source code, .jsonl, .parquet), folders of them, "
            "local datasets, or globs; or what `longgen pack` wrote, as DIR or DIR@WEIGHT. Takes "
            "several paths in a row, and may be repeated.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder for the hybrid and everything of the run, new or empty.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="A TOML file that holds any of these options; the command line overrides it.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the interrupted run in --out. Nothing else has to be given again.",
        ),
    ] = False,
    json: JsonOption = False,
    full_layers: FullLayersOption = None,
    rope_theta: Annotated[
        float | None,
        _option(
            "rope_theta",
            "Base of the rotary position embedding.",
            _TRAINING,
            "BASE",
            "by the rule for the context",
        ),
    ] = None,
    steps: Annotated[
        int | None, _option("steps", "Optimizer steps to train.", _TRAINING, "NUMBER")
    ] = None,
    batch_tokens: Annotated[
        str | None,
        _option(
            "batch_tokens",
            "Tokens in one step, a multiple of the context. They are worked on one sequence at a "
            "time, so more of them cost time, not memory.",
            _TRAINING,
            "TOKENS",
            "128K, or one sequence",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        _option("learning_rate", "Highest learning rate, reached after the warm-up.", _TRAINING),
    ] = None,
    min_lr_ratio: Annotated[
        float | None,
        _option(
            "min_lr_ratio",
            "Share of the highest learning rate that it falls to, along a cosine.",
            _TRAINING,
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None,
        _option("warmup_steps", "Steps in which the learning rate rises.", _TRAINING, "NUMBER"),
    ] = None,
    weight_decay: Annotated[
        float | None,
        _option("weight_decay", "AdamW's weight decay, on matrices only.", _TRAINING),
    ] = None,
    max_grad_norm: Annotated[
        float | None,
        _option("max_grad_norm", "Longer gradients are cut to this norm.", _TRAINING),
    ] = None,
    seed: Annotated[
        int | None,
        _option("seed", "Decides the order of the data and what is held out.", _TRAINING, "NUMBER"),
    ] = None,
    join_folders: Annotated[
        bool | None,
        _option(
            "join_folders",
            "Make one long document of all text files in each sub-folder of a data folder, as a "
            "code repository is one.",
            _DATA,
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        _option("text_field", "Key or column of the text in .jsonl, .parquet and datasets.", _DATA),
    ] = None,
    strict: Annotated[
        bool | None,
        _option(
            "strict",
            "Refuse data that are empty, binary or not UTF-8, instead of skipping and counting "
            "them.",
            _DATA,
        ),
    ] = None,
    heldout_tokens: Annotated[
        str | None,
        _option(
            "heldout_tokens",
            "Tokens kept out of training, for `longgen evaluate`.",
            _DATA,
            "TOKENS",
            "a twentieth, of 2 to 16 sequences",
        ),
    ] = None,
    allow_repeat: Annotated[
        bool | None,
        _option(
            "allow_repeat", "Go through the data more than once if the steps ask for it.", _DATA
        ),
    ] = None,
    recall_share: Annotated[
        float | None,
        _option(
            "recall_share",
            "Share of sequences, 0 to 1, that get generated records and later questions for them: "
            "practice in looking far back.",
            _DATA,
        ),
    ] = None,
    recall_records: Annotated[
        int | None,
        _option(
            "recall_records",
            "Records in such a sequence.",
            _DATA,
            "NUMBER",
            "one per 1,000 tokens",
        ),
    ] = None,
    recall_kinds: Annotated[
        str | None,
        _option(
            "recall_kinds",
            "What they are: codes, of one wording; facts, of many; copies of passages of the text; "
            "or several, with commas.",
            _DATA,
            "KINDS",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        str | None,
        _option(
            "gradient_checkpointing",
            "Recompute layers in the backward pass, which saves memory and costs time: full; "
            "selective, all but attention, whose outputs are kept; elementwise, all but attention "
            "and matrix products; off; or auto, the first of off, elementwise, selective and full "
            "that fits.",
            _MACHINE,
            "auto|off|elementwise|selective|full",
        ),
    ] = None,
    offload: Annotated[
        bool | None,
        _option(
            "offload",
            "Hold what recomputation starts from in host memory; for 512K tokens and more a GPU.",
            _MACHINE,
        ),
    ] = None,
    compile: Annotated[
        str | None,
        _option(
            "compile",
            "Compile what lies between matrix products, which is faster after a first minute: on, "
            "off, or auto (on GPUs).",
            _MACHINE,
            "on|off|auto",
        ),
    ] = None,
    fp8: Annotated[
        bool | None,
        _option(
            "fp8",
            "Matrix products of the layers in fp8, on GPUs that have it (extra fp8).",
            _MACHINE,
        ),
    ] = None,
    context_parallel: Annotated[
        int | None,
        _option(
            "context_parallel",
            "Processes that share each sequence, of those that torchrun starts; 1 gives each whole "
            "ones.",
            _MACHINE,
            "NUMBER",
        ),
    ] = None,
    sharding: Annotated[
        str | None,
        _option(
            "sharding",
            "How several processes hold the model: fsdp, each a part of it; ddp, each all of it; "
            "or auto (fsdp on GPUs).",
            _MACHINE,
            "auto|fsdp|ddp",
        ),
    ] = None,
    save_steps: Annotated[
        int | None,
        _option("save_steps", "Steps between checkpoints.", _MACHINE, "NUMBER"),
    ] = None,
    log_steps: Annotated[
        int | None,
        _option("log_steps", "Steps between lines of progress.", _MACHINE, "NUMBER"),
    ] = None,
    force: Annotated[
        bool | None,
        _option("force", "Start even if the estimate says it does not fit the GPU.", _MACHINE),
    ] = None,
    pattern: PatternOption = None,
    block_size: BlockSizeOption = None,
    sink_blocks: SinkBlocksOption = None,
    local_blocks: LocalBlocksOption = None,
    stride_blocks: StrideBlocksOption = None,
    head_shift: HeadShiftOption = None,
) -> None:
    """Extend MODEL to a longer context as a hybrid: convert it, then train it on your text.

    Ctrl-C saves and stops; `longgen extend --out DIR --resume` goes on as if it had never stopped.
    `longgen plan` shows beforehand what a plan costs and saves.
    """
    given = {name: value for name, value in locals().items() if value not in (None, [])}
    for name in ("recipe", "resume", "json"):
        given.pop(name, None)
    config = resolve({**(read_recipe(recipe) if recipe else {}), **given}, resume=resume)
    # Of several processes the first may have begun the run by the time that another looks.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone:
        check_folder(config, resume)
    say = progress_lines()

    from longgen.train.extend import extend as run
    from longgen.train.processes import Processes

    quiet_libraries()
    program = "longgen" if alone else "torchrun (as before) -m longgen"
    on_again = f"{program} extend --out {config.out} --resume"
    try:
        record = run(config, resume=resume, say=say)
    except KeyboardInterrupt:
        if (training_folder(config.out)).is_dir():
            say(f"stopped without saving; go on from the last checkpoint with: {on_again}")
        raise
    if json and is_first_process():
        print_json(record)
    if not record["finished"]:
        say(f"go on with: {on_again}")
        raise KeyboardInterrupt
    Processes.leave()
    say(f"measure it with: longgen evaluate {config.out}")


def resolve(given: dict[str, Any], *, resume: bool = False) -> ExtendConfig:
    """Return the settings of a run from what a recipe and the command line hold.

    Args:
        given: options by name, with _ between words; plan options too.
        resume: take what is not given from the run in `out`.

    Raises:
        UsageError: if something is missing or makes no sense; only small files are read.
    """
    if "out" not in given:
        raise UsageError("Where should the hybrid go? Give a folder with --out.")
    chosen = {name: given[name] for name in (*PLAN_OPTIONS, "pattern") if name in given}
    earlier = (read_run(given["out"]) if resume else None) or {}
    settings = {**earlier, **{key: given[key] for key in given if key not in chosen}}
    for name, what in (
        (
            "model",
            "MODEL, the folder of a checkpoint (before --data, which takes all that follows)",
        ),
        ("context", "--context, the length to extend to"),
        ("data", "--data, what to train on"),
    ):
        if name not in settings:
            hint = f"; there is no run to resume in {given['out']}" if resume else ""
            raise UsageError(f"Something is missing{hint}: give {what}.")
    for name in _TOKENS:
        if settings.get(name) is not None:
            settings[name] = parse_tokens(str(settings[name]))
    if isinstance(settings["data"], str):
        settings["data"] = [settings["data"]]
    if chosen or not earlier:
        shape = checkpoint_shape(settings["model"])
        if shape.plan is None:
            original = shape.max_position_embeddings
            check_context(settings["context"], original, settings["model"])
        plan = resolve_plan(shape, settings["context"], PlanOptions(**chosen))
        settings |= {"layers": plan.layers, "pattern": plan.pattern.to_dict()}
    try:
        return ExtendConfig(**settings)
    except TypeError as error:
        # Only the record of another version can hold other names.
        raise UsageError(
            f"The run in {Path(given['out'])} is of another version of longgen ({error}). Begin "
            "another with a new --out."
        ) from None
