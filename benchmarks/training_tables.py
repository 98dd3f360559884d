"""The tables of training: measured steps, and what recipes are planned to take."""

from __future__ import annotations

import re

from benchmarks import filed
from longgen.bench import train_summary
from longgen.bench.train_settings import STOCK
from longgen.cli.options import parse_tokens, resolve_plan
from longgen.cli.training_plan import Recipe, training_figures
from longgen.evaluate.results import say_bytes, say_tokens
from longgen.gpus import GpuGroup, parse_gpus
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan
from longgen.shapes import load_shape

RECIPES = filed.ROOT / "recipes"
# Recipes that name the GPUs they are for, as in llama2_7b_128k_h100x8.toml.
_PLANNED_FOR = re.compile(r"_([a-z]+\d+)x(\d+)$")

# What checkpointing of that name runs a second time.
AGAIN = {
    "off": "nothing",
    "elementwise": "what lies between products",
    "selective": "all but attention",
    "full": "whole layers",
}


def training(name: str) -> list[str]:
    """Return the short table of one training benchmark: a step at 128K."""
    results = filed.newest(name)
    found = filed.rows_of(results, "train_step")
    lines = [
        f"| {say_tokens(filed.ACCEPTANCE_LENGTH)} tokens, {results['timing']['a_step_is']} | "
        "a step | tokens/s | MFU | memory | computed again |",
        "|---|---|---|---|---|---|",
    ]
    for variant, label in filed.SERVED.items():
        row = found.get(variant, {}).get(filed.ACCEPTANCE_LENGTH)
        if row is None or not row["value"]:
            continue
        lines.append(
            f"| {label.replace('engine', 'path')} | {row['value']:.2f} s | "
            f"{row['tokens_per_second_per_gpu']:,.0f} | {row['mfu']:.0%} | "
            f"{say_bytes(row['peak_bytes'])} | {AGAIN[row['checkpointing']]} |"
        )
    return [*lines, "", f"{results['shape']}. " + filed.provenance(results)]


def train(name: str) -> list[str]:
    """Return the table of one training benchmark."""
    if not filed.files(name):
        return ["Not measured yet."]
    results = filed.newest(name)
    rows, rate = results["rows"], results["ceiling"]
    head, body = train_summary.train_table(rows)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for cells in body:
        words = (f"**{cell}**" if cell == "hybrid" else cell for cell in cells)
        lines.append(f"| {' | '.join(words)} |")
    plan = LayerPlan(results["layers"], SparsePattern.from_dict(results["pattern"]))
    row, gpus = rows[0], results["gpus"]
    shared = row["context_parallel"]
    how = [f"{gpus} GPU{'' if gpus == 1 else 's'}"]
    how += [f"{shared} share a sequence"] if shared > 1 else []
    how += [f"sharding {row['sharding']}"] if row["sharding"] else []
    kept = train_summary.checkpointing(rows)
    how += [f"checkpointing {kept}"]
    stock = {row["checkpointing"] for row in rows if row["case"] == f"train_step.{STOCK}"}
    how[-1] += "".join(f" (transformers {other})" for other in sorted(stock - {kept}))
    how += [results["timing"]["a_step_is"]]
    return [
        *lines,
        "",
        *(f"- {note}" for note in train_summary.communication(rows)),
        *(f"- {note}" for note in train_summary.failures(rows)),
        f"- {results['shape']}, {plan.num_layers} of {results['layers_of']} layers: "
        f"{len(plan.full_layers)} full, {plan.pattern}; {'; '.join(how)}.",
        f"- {rate['matmul_size']}^3 matmul {rate['matmul_tflops']:.0f} TFLOP/s, copy "
        f"{rate['copy_terabytes_per_second']:.2f} TB/s. {results['mfu_is']}"
        + (" The run was interrupted." if results.get("partial") else ""),
        "",
        filed.provenance(results),
    ]


def planned_recipes() -> dict[str, GpuGroup]:
    """Return the recipes that name their GPUs, by file name without its end."""
    found = {path.stem: _PLANNED_FOR.search(path.stem) for path in sorted(RECIPES.glob("*.toml"))}
    return {name: parse_gpus(f"{form[2]}x{form[1]}") for name, form in found.items() if form}


def recipes() -> list[str]:
    """Return the table of what recipes take, by the accounting."""
    head = ["recipe", "GPUs", "full layers", "checkpointing", "GiB a GPU", "s a step"]
    head += ["tokens/s/GPU", "MFU", "GPU-hours", "all full"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, gpus in planned_recipes().items():
        recipe = Recipe.read(str(RECIPES / f"{name}.toml"))
        shape, context = load_shape(recipe.model or ""), parse_tokens(recipe.context or "")
        plan = resolve_plan(shape, context, recipe.plan)
        figures = training_figures(shape, plan, context, 1, gpus, recipe.train)
        memory, step, budget = (figures[key] for key in ("memory_per_gpu", "step", "budget"))
        kept = figures["setup"]["checkpointing"]
        kept += ", offloaded" if figures["setup"]["offload"] else ""
        cells = [
            f"[{name}](../recipes/{name}.toml)",
            str(gpus),
            f"{len(plan.full_layers)} of {plan.num_layers}",
            kept,
            f"{memory['total'] / 2**30:.0f}",
            f"{step['seconds']:.0f}",
            f"{step['tokens_per_second_per_gpu']:,.0f}",
            f"{step['mfu']:.0%}",
            f"**{budget['gpu_hours']:,.0f}**",
            f"{budget['gpu_hours_all_full']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
