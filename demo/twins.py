"""The demo's twins: same data, order and steps with all layers full, and with all layers sparse.

python demo/twins.py [--out out/demo], after demo/run.py. They say what the hybrid's full layers
cost and what its sparse layers alone would be worth.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from demo.run import base_checkpoint, demo_rows, evaluated, extended, main, say
from demo.settings import SEED, settings
from longgen.evaluate.plots import plot_loss, plot_needle
from longgen.evaluate.report import Picture, Section, comparison_table, write_report
from longgen.evaluate.results import write_results
from longgen.train.extend import HELDOUT, training_folder

TWINS = {"full": "all", "sparse": "none"}


def run(out: Path) -> Path:
    """Train and evaluate the twins; returns the page that compares all models."""
    chosen = settings()
    rows = [row for row in demo_rows(out) if row["case"].startswith(("needle.", "loss."))]
    base = base_checkpoint(out, chosen.original_context)
    trainings: dict[str, Any] = {}
    for variant, full_layers in TWINS.items():
        record = extended(base, out / variant, chosen, full_layers)
        trainings[variant] = record["training"]
        heldout = np.load(training_folder(out / variant) / HELDOUT)
        rows += evaluated(
            out / variant, variant, out / "evaluation", heldout, chosen, only=("needle", "loss")
        )
    write_results(
        out / "results_twins.json",
        "twins",
        rows,
        command="make demo && make demo-twins",
        seed=SEED,
        extra={"training": trainings},
    )
    figures = [
        Picture(
            plot_needle(rows, out / f"needle_{variant}.png", model_name=name, variant=variant),
            f"Needle in held-out text: {name}.",
        )
        for variant, name in (("full", "all layers full"), ("sparse", "all layers sparse"))
    ]
    figures.append(
        Picture(
            plot_loss(rows, out / "loss_twins.png", original_context=chosen.original_context),
            "Next-token loss on held-out text by position.",
        )
    )
    _, page = write_report(
        out / "twins",
        title="The hybrid and its twins",
        summary_rows=[
            (name, f"{figures_['tokens_per_second']:,.0f} tokens/s in training")
            for name, figures_ in trainings.items()
        ],
        sections=[Section("Same data, order and steps", [comparison_table(rows)])],
        figures=figures,
        notes=chosen.notes,
    )
    say(f"done: {page}")
    return page


if __name__ == "__main__":
    sys.exit(main(run))
