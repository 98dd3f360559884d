"""Plans against measurements: how far off they were, and the rates that would have been right.

Rows are those of `longgen bench train`, which hold what was planned beside what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longgen.coefficients import COEFFICIENTS, Coefficients
from longgen.errors import UsageError

Row = Mapping[str, Any]

# How far a plan may be off.
TOLERANCE = 0.15

# Which rates a part of a planned time is divided by.
_RATES = {
    "matrix products": ("matmul",),
    "full attention": ("full_forward", "full_backward"),
    "sparse attention": ("sparse_forward", "sparse_backward"),
    "between matrix products": ("bandwidth",),
}
# How strongly a rate that the rows say little about is held to what it was.
_HOLD = 0.03


@dataclass(frozen=True, slots=True)
class Comparison:
    """Hold a planned figure beside the measured one.

    Attributes:
        case: of the row.
        length: tokens.
        what: "bytes" or "seconds".
        planned: by the plan.
        measured: by the benchmark.
    """

    case: str
    length: int
    what: str
    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        """Planned over measured: above 1 the plan asked for too much."""
        return self.planned / self.measured

    @property
    def is_close(self) -> bool:
        """Whether the plan is within `TOLERANCE` of what was measured."""
        return abs(self.ratio - 1) <= TOLERANCE


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Return all figures of the rows that were both planned and measured."""
    found = []
    for row in rows:
        for what, planned, measured in (
            ("bytes", row.get("planned_bytes"), row.get("peak_bytes")),
            ("seconds", row.get("planned_seconds"), row.get("value")),
        ):
            if planned and measured:
                found.append(
                    Comparison(row["case"], row["length"], what, float(planned), float(measured))
                )
    return found


def fit_rates(rows: Sequence[Row], coefficients: Coefficients = COEFFICIENTS) -> Coefficients:
    """Return the rates under which the plans of the rows come closest to the times measured.

    Each part of a planned time is scaled by one factor for all rows, so that relative errors are
    least in the sense of squares. A factor is held to 1 as far as the rows leave it open: to tell
    parts apart, they must have them in different shares (hybrid and full, several lengths).

    Args:
        rows: of one card; those without a planned or measured time are left out.
        coefficients: those that the rows were planned with.

    Raises:
        UsageError: if no row has both times.
    """
    used = [row for row in rows if row.get("planned_parts") and row.get("value")]
    if not used:
        raise UsageError(
            "There is nothing to fit: no row has a planned and a measured time. Give results of "
            "`longgen bench train` on a card of the catalogue."
        )
    names = list(_RATES)
    shares = np.array(
        [[row["planned_parts"].get(name, 0.0) / row["value"] for name in names] for row in used]
    )
    fixed = [sum(s for n, s in row["planned_parts"].items() if n not in _RATES) for row in used]
    rest = np.array([1 - s / row["value"] for s, row in zip(fixed, used, strict=True)])
    hold = _HOLD * np.eye(len(names))
    factors, *_ = np.linalg.lstsq(
        np.vstack([shares, hold]), np.concatenate([rest, np.full(len(names), _HOLD)]), rcond=None
    )
    changed: dict[str, float] = {}
    for name, factor in zip(names, factors, strict=True):
        # A part that the rows would have negative is noise.
        factor = max(float(factor), 0.1)
        for rate in _RATES[name]:
            changed[rate] = getattr(coefficients, rate) / factor
    return replace(coefficients, **changed)  # type: ignore[arg-type]


def changed_rates(
    fitted: Coefficients, before: Coefficients = COEFFICIENTS
) -> dict[str, tuple[float, float]]:
    """Return the rates that differ, with both values."""
    names = [name for group in _RATES.values() for name in group]
    pairs = {name: (getattr(before, name), getattr(fitted, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
