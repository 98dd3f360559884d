"""The kinds of recall practice, by name, for settings and for what plants it."""

from __future__ import annotations

from longgen.errors import UsageError

KINDS = ("codes", "facts", "copies")
DEFAULT_KINDS = "facts,copies"


def split_kinds(kinds: str) -> tuple[str, ...]:
    """Split the kinds that a setting names, commas between, into the order of `KINDS`.

    Raises:
        UsageError: one is unknown or there twice.
    """
    found = [kind.strip() for kind in kinds.split(",")]
    if not set(found) <= set(KINDS) or len(set(found)) < len(found):
        raise UsageError(
            f"recall_kinds is {kinds!r}; give one or more of {', '.join(KINDS)}, each once, with "
            'commas between, as in "facts,copies".'
        )
    return tuple(sorted(found, key=KINDS.index))
