"""The program `longgen`: its commands, and what errors look like.

Each command is a function in a module of its own. The modules import torch and transformers inside
their functions, so that `longgen --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from longgen import __version__
from longgen.cli.bench import bench
from longgen.cli.console import print_error
from longgen.cli.convert import convert
from longgen.cli.evaluate import evaluate
from longgen.cli.export import export
from longgen.cli.extend import extend
from longgen.cli.generate import generate
from longgen.cli.pack import pack
from longgen.cli.plan import plan
from longgen.cli.several import SeveralValues
from longgen.cli.tokenize import tokenize
from longgen.errors import ReportedElsewhere, UsageError

INTERRUPTED = 130


class _Commands(TyperGroup):
    """Turn what a user can put right into one line and exit code 2; let other errors through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ReportedElsewhere as error:
            raise typer.Exit(2) from error
        except UsageError as error:
            print_error(str(error))
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(INTERRUPTED) from interrupt


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    # Lets help texts be reflowed; the default keeps the line breaks of docstrings.
    rich_markup_mode="markdown",
    add_completion=False,
    # A traceback with local variables would print whole tensors.
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longgen {__version__}")
        raise typer.Exit


@app.callback()
def _longgen(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Turn a short-context language model into a fast long-context hybrid.

    Full attention stays in the middle layers; the others see the start of the text and a recent
    window of it, so that they run faster and keep almost nothing in memory.
    """


app.command()(plan)
app.command(cls=SeveralValues)(tokenize)
app.command()(pack)
app.command(cls=SeveralValues)(extend)
app.command()(convert)
app.command()(export)
app.command(cls=SeveralValues)(evaluate)
app.command()(generate)
app.add_typer(bench, name="bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    It is 0, or 2 for what the user can put right, or 130 for Ctrl-C; other errors are raised.

    Args:
        argv: the arguments; None takes the program's own.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="longgen")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
