"""What goes wrong while something is measured: a sentence for its row, and whether the device is
well after it."""

from __future__ import annotations

from longgen.bench.timing import Clock
from longgen.errors import UsageError
from longgen.memory import is_out_of_memory

_LONGEST_REASON = 400


def reason(error: Exception, where: str) -> str:
    """Return why something was not measured; `where` says at what, such as "at 8,192 tokens"."""
    if is_out_of_memory(error):
        return f"Out of memory {where}."
    return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]


def check_device(clock: Clock, blame: str, advice: str) -> None:
    """Find out whether the device still works.

    Raises:
        UsageError: it doesn't: beginning with `blame`, ending with `advice`.
    """
    try:
        clock.wait()
    except RuntimeError as error:
        raise UsageError(f"{blame} {advice}") from error
