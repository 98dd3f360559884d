"""`longgen plan`: what a hybrid would keep, cost and save, before anything is loaded."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from longgen.accounting import (
    decode_bytes,
    expected_speedups,
    fits,
    forward_flops_per_token,
    full_plan,
    kv_bytes,
    serving_memory,
    training_flops_per_token,
)
from longgen.cli.console import (
    format_bytes,
    format_count,
    print_json,
    stdout_console,
    three_figures,
)
from longgen.cli.options import (
    BatchOption,
    BlockSizeOption,
    ContextOption,
    FullLayersOption,
    GpusOption,
    HeadShiftOption,
    JsonOption,
    LocalBlocksOption,
    ModelArgument,
    PatternOption,
    PlanOptions,
    SinkBlocksOption,
    StrideBlocksOption,
    parse_tokens,
    resolve_gpus,
    resolve_plan,
)
from longgen.cli.training_plan import (
    BatchTokensOption,
    BudgetOption,
    CheckpointingOption,
    CompileOption,
    ContextParallelOption,
    OffloadOption,
    PriceOption,
    Recipe,
    RecipeOption,
    ShardingOption,
    TrainOption,
    TrainOptions,
    print_training,
    training_figures,
)
from longgen.errors import UsageError
from longgen.gpus import GpuGroup
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import SHAPES, ModelShape, load_shape
from longgen.training_memory import training_memory
from longgen.training_setup import TrainingSetup

_LABEL = 13
_LETTERS_A_LINE = 60
_SPANS = 4

KINDS = ("full", "hybrid")


def plan(
    model: ModelArgument = None,
    context: ContextOption = None,
    full_layers: FullLayersOption = None,
    gpus: GpusOption = None,
    batch: BatchOption = 1,
    json: JsonOption = False,
    train: TrainOption = False,
    recipe: RecipeOption = None,
    batch_tokens: BatchTokensOption = None,
    context_parallel: ContextParallelOption = None,
    checkpointing: CheckpointingOption = None,
    offload: OffloadOption = None,
    sharding: ShardingOption = None,
    compile: CompileOption = None,
    tokens: BudgetOption = None,
    price: PriceOption = None,
    pattern: PatternOption = None,
    block_size: BlockSizeOption = None,
    sink_blocks: SinkBlocksOption = None,
    local_blocks: LocalBlocksOption = None,
    stride_blocks: StrideBlocksOption = None,
    head_shift: HeadShiftOption = None,
) -> None:
    """Show what a hybrid of MODEL would keep, cost and save, before anything is loaded.

    Prints which layers stay full, how many tokens the others keep, the memory of keys and values,
    the work for each token, the speed-ups to hope for, and whether it fits the GPUs. Only
    config.json is read. With --train: what training it takes, by part.
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
    training = TrainOptions(
        context_parallel=context_parallel,
        checkpointing=checkpointing,
        offload=offload,
        sharding=sharding,
        compile=compile,
        batch_tokens=batch_tokens,
        tokens=tokens,
        price=price,
    )
    if training != TrainOptions() and not train and recipe is None:
        raise UsageError(
            f"{', '.join(training.given)} say how to train; add --train to plan a training run."
        )
    if recipe is not None:
        found = Recipe.read(recipe)
        model, context = model or found.model, context or found.context
        options = options.over(found.plan)
    if model is None:
        raise UsageError(f"Give MODEL, the folder of a checkpoint or one of {', '.join(SHAPES)}.")
    shape = load_shape(model)
    length = parse_tokens(context or "128K")
    if recipe is not None:
        training = found.options(training, length)
    layers = resolve_plan(shape, length, options, allow_hybrid=True)
    is_training = train or recipe is not None
    # GPUs that share a sequence are the fewest that a run takes.
    cards = resolve_gpus(gpus, at_least=(training.context_parallel or 1) if is_training else 1)
    figures = plan_figures(model, shape, layers, length, batch, cards)
    if is_training:
        figures["training"] = training_figures(shape, layers, length, batch, cards, training)
    if json:
        print_json(figures)
    else:
        print_figures(stdout_console(), figures)


def plan_figures(
    name: str, shape: ModelShape, plan: LayerPlan, context: int, batch: int, gpus: GpuGroup
) -> dict[str, Any]:
    """Return all figures of a plan as JSON data, beside those of the model with every layer full.

    Args:
        name: what the model is called.
        shape: the model.
        plan: its layer plan.
        context: tokens of each sequence.
        batch: sequences at the same time.
        gpus: what it would run on.
    """
    plans = dict(zip(KINDS, (full_plan(shape), plan), strict=True))
    sparse = plan.pattern if "S" in plan.layers else None
    speedups = expected_speedups(shape, plan, context, batch)
    cache = {kind: kv_bytes(shape, layers, context, batch) for kind, layers in plans.items()}
    heads = shape.num_key_value_heads
    return {
        "model": {
            "name": name,
            "model_type": shape.model_type,
            "num_parameters": shape.num_parameters,
            "num_hidden_layers": shape.num_hidden_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": heads,
            "head_dim": shape.head_dim,
            "max_position_embeddings": shape.max_position_embeddings,
        },
        "context": context,
        "batch": batch,
        "layers": plan.layers,
        "full_layers": list(plan.full_layers),
        "pattern": sparse and sparse.to_dict(),
        "pattern_text": sparse and str(sparse),
        "kept_tokens": sparse and sparse.cache_length(context, heads),
        "kv_bytes": {**cache, "saved": 1 - cache["hybrid"] / cache["full"]},
        "prefill_flops_per_token": {
            kind: forward_flops_per_token(shape, layers, context, prefill_logits=True)
            for kind, layers in plans.items()
        },
        "training_flops_per_token": {
            kind: training_flops_per_token(shape, layers, context) for kind, layers in plans.items()
        },
        "decode_bytes": {
            kind: decode_bytes(shape, layers, context, batch) for kind, layers in plans.items()
        },
        "expected_speedup": {
            "prefill": speedups.prefill,
            "training": speedups.training,
            "decode": speedups.decode,
        },
        "gpus": {
            "count": gpus.count,
            "card": gpus.gpu.name,
            "memory_bytes": gpus.gpu.memory_bytes,
        },
        "memory_per_gpu": {
            use: {
                "parts": estimate.parts,
                "total": estimate.total,
                "fits": fits(estimate, gpus.gpu),
            }
            for use, estimate in {
                "training": training_memory(
                    shape, context, TrainingSetup(batch=batch, gpus=gpus.count), plan
                ),
                "serving": serving_memory(shape, plan, context, batch=batch, gpus=gpus.count),
                "serving_all_full": serving_memory(
                    shape, plans["full"], context, batch=batch, gpus=gpus.count
                ),
            }.items()
        },
    }


def print_figures(console: Console, figures: dict[str, Any]) -> None:
    """Print the figures of `plan_figures` for people, within 80 columns."""
    model, context = figures["model"], figures["context"]
    console.print(Text(model["name"], style="bold"))
    _line(
        console,
        "Model",
        f"{model['model_type']}, {format_count(model['num_parameters'])} parameters, "
        f"{model['num_attention_heads']} heads ({model['num_key_value_heads']} key/value) of "
        f"{model['head_dim']}",
    )
    _line(
        console,
        "Context",
        f"{context:,} tokens (the model's own: {model['max_position_embeddings']:,})",
    )
    _print_layers(console, figures)
    console.print()
    _print_costs(console, figures)
    console.print()
    if "training" in figures:
        print_training(console, figures)
    else:
        _print_memory(console, figures)


def _line(console: Console, label: str, value: str | Text) -> None:
    console.print(Text.assemble((f"{label:<{_LABEL}}", "bold" if label else ""), value))


def _print_layers(console: Console, figures: dict[str, Any]) -> None:
    """Print the layer string in lines of at most 60 letters, and what its layers see and keep."""
    layers: str = figures["layers"]
    num_lines = -(-len(layers) // _LETTERS_A_LINE)
    width = -(-len(layers) // num_lines)
    for start in range(0, len(layers), width):
        letters = Text()
        for kind in layers[start : start + width]:
            letters.append(kind, style="bold green" if kind == "F" else "cyan")
        _line(console, "" if start else "Layers", letters)
    full = figures["full_layers"]
    spans = _spans(full)
    where = f": {', '.join(spans)} counted from 0" if 0 < len(spans) <= _SPANS else ""
    _line(console, "", f"{len(layers) - len(full)} sparse (S), {len(full)} full (F){where}")
    if figures["pattern"] is None:
        _line(console, "Pattern", "none: every layer sees all earlier tokens")
        return
    for label, words in zip(
        ("Pattern", *[""] * 3),
        _words(SparsePattern.from_dict(figures["pattern"])),
        strict=False,
    ):
        _line(console, label, words)
    kept, context = figures["kept_tokens"], figures["context"]
    _line(
        console,
        "Kept",
        f"{kept:,} of {context:,} tokens in each sparse layer ({kept / context:.1%})",
    )


def _spans(indices: list[int]) -> list[str]:
    """Write layer indices as spans, such as 10-21."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and spans[-1][1] == index - 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return [str(first) if first == last else f"{first}-{last}" for first, last in spans]


def _words(pattern: SparsePattern) -> list[str]:
    """Say in words what a token sees in a sparse layer, a line for each part."""
    size = pattern.block_size
    recent = f"{(pattern.local_blocks - 1) * size + 1:,} to {pattern.local_blocks * size:,}"
    lines = [str(pattern)]
    if pattern.sink_blocks:
        lines.append(f"sees the first {pattern.sink_blocks * size:,} tokens (sink)")
    lines.append(f"sees the most recent {recent} tokens (window)")
    if pattern.stride_blocks:
        shift = ", others in each head" if pattern.num_head_classes > 1 else ""
        every = f"{pattern.stride_blocks * size:,}"
        lines.append(f"sees {size:,} tokens in every {every} (stride{shift})")
    return lines


def _print_costs(console: Console, figures: dict[str, Any]) -> None:
    """Print a table of what every layer full and this plan cost, side by side."""
    at = f"At {figures['context']:,} tokens"
    console.print(f"{at:<34}{'all full':>12}{'this plan':>13}", style="bold")
    cache = figures["kv_bytes"]
    rows = [
        (
            "Keys and values held (KV cache)",
            *(format_bytes(cache[kind]) for kind in KINDS),
            f"{cache['saved']:.1%} saved",
        )
    ]
    for title, key, work in (
        ("Prefill: GFLOPs a token", "prefill_flops_per_token", "prefill"),
        ("Training: GFLOPs a token", "training_flops_per_token", "training"),
        ("Decode: GB read a token", "decode_bytes", "decode"),
    ):
        full, hybrid = (three_figures(figures[key][kind] / 1e9) for kind in KINDS)
        rows.append((title, full, hybrid, f"{figures['expected_speedup'][work]:.2f}x as fast*"))
    for title, full, hybrid, gain in rows:
        console.print(f"{title:<34}{full:>12}{hybrid:>13}{gain:>17}")
    console.print("* at equal kernel efficiency: a ceiling by arithmetic, not a measurement")


def _print_memory(console: Console, figures: dict[str, Any]) -> None:
    """Print the estimated memory of one GPU by part, and whether it fits."""
    gpus, memory = figures["gpus"], figures["memory_per_gpu"]
    console.print(
        f"Memory per GPU, estimated, on {gpus['count']} x {gpus['card']} "
        f"({format_bytes(gpus['memory_bytes'])} each)",
        style="bold",
    )
    sequences = "1 sequence" if figures["batch"] == 1 else f"{figures['batch']} sequences"
    for use, title in (
        ("training", f"Training, {sequences} on each GPU"),
        ("serving", f"Serving, {sequences} in all"),
        ("serving_all_full", "Serving with all layers full"),
    ):
        estimate = memory[use]
        verdict = ("fits", "bold green") if estimate["fits"] else ("does not fit", "bold red")
        total = f"{title:<34}{format_bytes(estimate['total']):>12}   "
        console.print(Text.assemble(total, verdict))
        if use != "serving_all_full":
            for name, size in estimate["parts"].items():
                console.print(f"  {name:<32}{format_bytes(size):>12}", style="dim")
