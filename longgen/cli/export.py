"""`longgen export`: a run's checkpoint becomes a model that transformers loads."""

from __future__ import annotations

from typing import Annotated

import typer

from longgen.cli.console import print_json
from longgen.cli.models import progress_lines, quiet_libraries
from longgen.cli.options import JsonOption


def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="The --out folder of a `longgen extend` run, for its newest checkpoint, or one of "
            "the checkpoint-N folders in its training folder.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option("--out", metavar="DIR", help="Folder for the hybrid, new or empty."),
    ],
    json: JsonOption = False,
) -> None:
    """Write the hybrid of a RUN as it stands at a checkpoint, finished or not.

    It needs the run's folder and the model that it began from, no GPU, and memory for the weights
    in the dtype of that model.
    """
    from longgen.train.export import export as run_export

    quiet_libraries()
    record = run_export(run, out)
    say = progress_lines()
    say(f"hybrid of step {record['training']['step']} written to {out}")
    if json:
        print_json(record)
