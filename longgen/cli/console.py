"""How commands print: figures for people, one JSON object for programs, errors as one line."""

from __future__ import annotations

import json
import os
from typing import Any

import typer
from rich.console import Console

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def stdout_console() -> Console:
    """Return a console on standard output that neither breaks lines nor guesses highlights."""
    return Console(highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Print one JSON object on standard output."""
    typer.echo(json.dumps(data, indent=2))


def print_error(message: str) -> None:
    """Print an error on standard error, on one line however long."""
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {message}", err=True)


def format_bytes(count: float) -> str:
    """Write a number of bytes with three figures, as 24.6 GiB."""
    power = 0
    while count >= 1000 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{three_figures(count) if power else count} {_UNITS[power]}"


def three_figures(number: float) -> str:
    """Write a number with three figures, or all of them before the point: 2.07, 81.9, 1,234."""
    digits = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:,.{digits}f}"


def format_count(count: int) -> str:
    """Write a large number with three figures, as 6.74B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def is_first_process() -> bool:
    """Whether this is the process that reports, of those that torchrun may have started."""
    return int(os.environ.get("RANK", "0")) == 0
