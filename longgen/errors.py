"""The errors that are meant for the person at the keyboard."""

from collections.abc import Mapping


class UsageError(ValueError):
    """Report something the user can put right.

    The message is a sentence: what was wrong, the value, and what to do. The command line prints it
    alone and exits with code 2; library users catch it as a `ValueError`.
    """


class ReportedElsewhere(UsageError):
    """Repeat what another process of the run reports: the command line stays silent here."""


def what_changed(earlier: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Name the settings that are not what they were, for an error about work begun with others."""
    return [
        f"{name} was {earlier.get(name)!r} and is now {value!r}"
        for name, value in now.items()
        if earlier.get(name) != value
    ]
