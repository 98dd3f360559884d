"""`longgen plan --train`: memory, speed, messages and cost of a training run."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from longgen.accounting import fits, full_plan
from longgen.cli.console import format_bytes, format_count, three_figures
from longgen.cli.options import PlanOptions, parse_tokens
from longgen.errors import UsageError
from longgen.gpus import GpuGroup
from longgen.plan import LayerPlan
from longgen.shapes import ModelShape
from longgen.train.config import PLAN_OPTIONS, ExtendConfig, default_batch_tokens, read_recipe
from longgen.training_memory import choose_checkpointing, offloaded_bytes, training_memory
from longgen.training_setup import CHECKPOINTING, TrainingSetup, refuse_kept_products
from longgen.training_time import TrainingTime, training_time

_PANEL = "Training (with --train)"
_SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_DEFAULT_BUDGET = "5B"

MFU_IS = (
    "3 x (2 x linear weights x tokens + 4 x head_dim x heads x visible pairs) / (seconds x GPUs x "
    "datasheet bf16 FLOP/s); recomputation is not counted"
)

TrainOption = Annotated[
    bool,
    typer.Option(
        "--train",
        help="Plan a training run: memory of a GPU by part, tokens per second, GPU-hours, bytes "
        "sent.",
        rich_help_panel=_PANEL,
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="Take the settings of a recipe of `longgen extend`; the command line overrides it. "
        "Implies --train.",
        rich_help_panel=_PANEL,
    ),
]
ContextParallelOption = Annotated[
    int | None,
    typer.Option(
        "--context-parallel",
        metavar="NUMBER",
        min=1,
        help="GPUs that share each sequence. [default: 1]",
        rich_help_panel=_PANEL,
    ),
]
CheckpointingOption = Annotated[
    str | None,
    typer.Option(
        "--checkpointing",
        metavar="NAME",
        help="What is kept for the backward pass: off (everything), elementwise (each layer's "
        "input and results of attention and matrix products), selective (input and attention's "
        "output), full (the input), or auto, the first of them that fits. "
        "[default: auto]",
        rich_help_panel=_PANEL,
    ),
]
OffloadOption = Annotated[
    bool | None,
    typer.Option(
        "--offload/--no-offload",
        help="Send what is kept to the host's memory. [default: off]",
        rich_help_panel=_PANEL,
    ),
]
ShardingOption = Annotated[
    str | None,
    typer.Option(
        "--sharding",
        metavar="NAME",
        help="fsdp (weights, gradients and moments spread over all GPUs), ddp (whole on each), or "
        "auto (fsdp). [default: auto]",
        rich_help_panel=_PANEL,
    ),
]
CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Whether what lies between matrix products is compiled. [default: on]",
        rich_help_panel=_PANEL,
    ),
]
BatchTokensOption = Annotated[
    str | None,
    typer.Option(
        "--batch-tokens",
        metavar="TOKENS",
        help="Tokens in an optimizer step. [default: one sequence for each GPU or group of them; "
        "with --recipe as in `longgen extend`]",
        rich_help_panel=_PANEL,
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="NUMBER",
        help="Tokens to train on in all; 5B is 5,000,000,000. [default: the recipe's, or 5B]",
        rich_help_panel=_PANEL,
    ),
]
PriceOption = Annotated[
    float | None,
    typer.Option(
        "--price",
        metavar="MONEY",
        min=0,
        help="Price of a GPU-hour, in any currency.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Hold the training options of a command line or recipe; None where one was not given."""

    context_parallel: int | None = None
    checkpointing: str | None = None
    offload: bool | None = None
    sharding: str | None = None
    compile: bool | None = None
    fp8: bool | None = None
    batch_tokens: str | None = None
    tokens: str | None = None
    price: float | None = None

    @property
    def given(self) -> list[str]:
        """Names of the options that were given, as on the command line."""
        return [
            "--" + name.replace("_", "-")
            for name, value in asdict(self).items()
            if value is not None
        ]

    def over(self, other: TrainOptions) -> TrainOptions:
        """Return these options, and `other`'s where one was not given."""
        mine = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(other, **mine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Hold what a plan takes from a recipe.

    Attributes:
        model: its model.
        context: its context, as text.
        plan: what chooses layers and pattern.
        train: the training options, as far as they stand there.
        steps: its optimizer steps.
    """

    model: str | None
    context: str | None
    plan: PlanOptions
    train: TrainOptions
    steps: int

    @classmethod
    def read(cls, path: str) -> Recipe:
        """Read a recipe of `longgen extend`.

        Raises:
            UsageError: if it cannot be read, or `longgen extend` would refuse what it holds.
        """
        found = read_recipe(path)
        defaults = {entry.name: entry.default for entry in fields(ExtendConfig)}
        known = {name: found[name] for name in (*PLAN_OPTIONS, "pattern") if name in found}
        text = {name: found.get(name) for name in ("model", "context", "batch_tokens")}
        text = {name: None if value is None else str(value) for name, value in text.items()}
        switch = {"on": True, "off": False}
        return cls(
            model=text["model"],
            context=text["context"],
            plan=PlanOptions(**known),
            train=TrainOptions(
                context_parallel=found.get("context_parallel"),
                checkpointing=found.get("gradient_checkpointing"),
                offload=found.get("offload"),
                sharding=found.get("sharding"),
                compile=switch.get(str(found.get("compile"))),
                fp8=found.get("fp8"),
                batch_tokens=text["batch_tokens"],
            ),
            steps=found.get("steps", defaults["steps"]),
        )

    def options(self, given: TrainOptions, context: int) -> TrainOptions:
        """Return the options of a command line over the recipe's, with the tokens of a step and of
        all steps that `longgen extend` would take at this context."""
        options = given.over(self.train)
        batch = options.batch_tokens
        step = default_batch_tokens(context) if batch is None else parse_tokens(batch)
        tokens = options.tokens or str(step * self.steps)
        return replace(options, batch_tokens=str(step), tokens=tokens)


def parse_budget(text: str) -> int:
    """Read a number of tokens to train on such as 5B or 300M (decimal).

    Raises:
        UsageError: if it is not one.
    """
    form = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().replace(",", "").upper())
    tokens = int(float(form[1]) * _SCALES[form[2]]) if form else 0
    if tokens < 1:
        raise UsageError(f"--tokens is {text!r}; write a number such as 5B or 300M.")
    return tokens


def training_figures(
    shape: ModelShape,
    plan: LayerPlan,
    context: int,
    batch: int,
    gpus: GpuGroup,
    options: TrainOptions,
) -> dict[str, Any]:
    """Return all figures of a training run as JSON data.

    Args:
        shape: the model.
        plan: its layer plan.
        context: tokens of each sequence.
        batch: sequences on a GPU (or group of them) at a time.
        gpus: what it would run on.
        options: how.

    Raises:
        UsageError: if the options make no sense, or do not fit together.
    """
    checkpointing = options.checkpointing or "auto"
    if checkpointing not in ("auto", *CHECKPOINTING):
        raise UsageError(
            f"--checkpointing is {checkpointing!r}; choose from auto, {', '.join(CHECKPOINTING)}."
        )
    if options.fp8:
        refuse_kept_products("--checkpointing", checkpointing)
    setup = TrainingSetup(
        batch=batch,
        gpus=gpus.count,
        context_parallel=options.context_parallel or 1,
        sharding=options.sharding or "auto",
        offload=bool(options.offload),
        compile=options.compile is not False,
    )
    from longgen.parallel import check_divides

    check_divides(context, setup.context_parallel)
    groups = gpus.count // setup.context_parallel
    wanted = options.batch_tokens
    batch_tokens = parse_tokens(wanted) if wanted else groups * batch * context
    if batch_tokens % context:
        raise UsageError(
            f"--batch-tokens is {batch_tokens:,}; give a multiple of the context ({context:,})."
        )
    sequences = batch_tokens // context
    setup = replace(setup, accumulates=sequences > groups * batch)
    memory_bytes = gpus.gpu.memory_bytes
    setup = choose_checkpointing(
        checkpointing, shape, context, setup, plan, memory_bytes, fp8=bool(options.fp8)
    )
    memory = training_memory(shape, context, setup, plan)
    step = training_time(shape, plan, context, gpus, setup, sequences)
    whole = training_time(shape, full_plan(shape), context, gpus, setup, sequences)
    budget = parse_budget(options.tokens or _DEFAULT_BUDGET)
    return {
        "setup": {**asdict(setup), "sharding": _sharding(setup)},
        "batch_tokens": batch_tokens,
        "memory_per_gpu": {
            "parts": memory.parts,
            "total": memory.total,
            "tensors": memory.allocated,
            "phases": memory.phases,
            "fits": fits(memory, gpus.gpu),
            "host_bytes": offloaded_bytes(shape, context, setup, plan),
        },
        "step": _step_figures(step),
        "step_all_full": _step_figures(whole),
        "budget": _budget(step, whole, budget, batch_tokens, options.price),
    }


def _sharding(setup: TrainingSetup) -> str | None:
    if setup.gpus == 1:
        return None
    return "fsdp" if setup.is_sharded else "ddp"


def _step_figures(step: TrainingTime | None) -> dict[str, Any] | None:
    if step is None:
        return None
    return {
        "seconds": step.seconds,
        "parts": step.parts,
        "tokens_per_second": step.tokens_per_second,
        "tokens_per_second_per_gpu": step.tokens_per_second / step.gpus,
        "mfu": step.mfu,
        "mfu_is": MFU_IS,
        "sent_bytes_per_gpu": asdict(step.messages),
    }


def _budget(
    step: TrainingTime | None,
    whole: TrainingTime | None,
    tokens: int,
    batch_tokens: int,
    price: float | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {"tokens": tokens, "steps": -(-tokens // batch_tokens)}
    if step is None or whole is None:
        return found
    hours = step.gpu_hours(tokens)
    return {
        **found,
        "gpu_hours": hours,
        "gpu_hours_all_full": whole.gpu_hours(tokens),
        "hours": hours / step.gpus,
        "price_per_gpu_hour": price,
        "cost": None if price is None else hours * price,
    }


def print_training(console: Console, figures: dict[str, Any]) -> None:
    """Print the figures of `training_figures` for people, within 80 columns; `figures` are those of
    the whole plan."""
    training, gpus = figures["training"], figures["gpus"]
    setup, memory = training["setup"], training["memory_per_gpu"]
    console.print(
        f"Training on {gpus['count']} x {gpus['card']} "
        f"({format_bytes(gpus['memory_bytes'])} each), estimated",
        style="bold",
    )
    words = [f"{training['batch_tokens']:,} tokens a step"]
    if setup["context_parallel"] > 1:
        words.append(f"{setup['context_parallel']} GPUs share a sequence")
    console.print(", ".join(words))
    words = [f"checkpointing {setup['checkpointing']}"]
    words += ["kept in host memory"] if setup["offload"] else []
    words += [f"sharding {setup['sharding']}"] if setup["sharding"] else []
    words += [] if setup["compile"] else ["not compiled"]
    console.print(", ".join(words))
    verdict = ("fits", "bold green") if memory["fits"] else ("does not fit", "bold red")
    total = f"{'Memory per GPU':<34}{format_bytes(memory['total']):>12}   "
    console.print(Text.assemble(total, verdict))
    for name, size in memory["parts"].items():
        console.print(f"  {name:<32}{format_bytes(size):>12}", style="dim")
    peak = max(memory["phases"], key=lambda name: memory["phases"][name])
    console.print(f"  the peak is in the {peak}", style="dim")
    if memory["host_bytes"]:
        console.print(f"{'Host memory per GPU':<34}{format_bytes(memory['host_bytes']):>12}")
    _print_step(console, training)


def _print_step(console: Console, training: dict[str, Any]) -> None:
    step, whole, budget = training["step"], training["step_all_full"], training["budget"]
    if step is None or whole is None:
        console.print("Speed: the card's peak rates are not known, so there is no estimate.")
        return
    console.print(f"{'Seconds a step':<34}{three_figures(step['seconds']):>12}")
    for name, seconds in step["parts"].items():
        console.print(f"  {name:<32}{three_figures(seconds):>12}", style="dim")
    rows = [
        ("Tokens a second and GPU", f"{step['tokens_per_second_per_gpu']:,.0f}"),
        ("Model FLOPs utilisation (MFU)", f"{step['mfu']:.0%}"),
    ]
    for name, size in step["sent_bytes_per_gpu"].items():
        if size:
            rows.append((f"Sent by a GPU a step ({name})", format_bytes(size)))
    hours = f"GPU-hours for {format_count(budget['tokens'])} tokens"
    rows.append((hours, three_figures(budget["gpu_hours"])))
    rows.append(("  with all layers full", three_figures(budget["gpu_hours_all_full"])))
    rows.append(("Hours", three_figures(budget["hours"])))
    if budget["cost"] is not None:
        price = f"Cost at {budget['price_per_gpu_hour']:g} a GPU-hour"
        rows.append((price, f"{budget['cost']:,.0f}"))
    for name, value in rows:
        console.print(f"{name:<34}{value:>12}")
