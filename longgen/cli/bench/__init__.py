"""`longgen bench`: measure LongGen's parts against what else does the same work."""

from __future__ import annotations

import typer

from longgen.cli.bench.attention import attention
from longgen.cli.bench.inference import inference
from longgen.cli.bench.train import train

bench = typer.Typer(
    no_args_is_help=True, help="Measure speed on this machine, beside what else does the same."
)


@bench.callback()
def _bench() -> None:
    """Measure speed on this machine, beside what else does the same work."""


bench.command()(attention)
bench.command()(inference)
bench.command()(train)
