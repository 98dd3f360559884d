"""Options that take several values in a row: `--data a b` beside `--data a --data b`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from typer.core import TyperCommand


class SeveralValues(TyperCommand):
    """Let every option that may be repeated take all the values that follow it.

    The shell turns `--data docs/*.md` into one option with many values, so this is what people
    write.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its values, then parse as usual."""
        names = {
            name
            for param in self.params
            if getattr(param, "multiple", False)
            for name in param.opts
        }
        parsed: list[str] = super().parse_args(ctx, repeat_options(args, names))
        return parsed


def repeat_options(args: Sequence[str], names: Collection[str]) -> list[str]:
    """Return arguments with each option of `names` repeated before every value that follows it."""
    result: list[str] = []
    option: str | None = None
    for number, argument in enumerate(args):
        if argument == "--":
            return [*result, *args[number:]]
        if argument.startswith("-"):
            option = argument if argument in names else None
        elif option is not None and result[-1] != option:
            result.append(option)
        result.append(argument)
    return result
