"""Who does the work: LongGen's own attention, and what else a user could take instead.

A provider does the work it is asked for or says why it cannot. None is ever replaced by another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from longgen.attention import attention
from longgen.attention.api import IMPLEMENTATIONS
from longgen.attention.testing import Attend, Inputs
from longgen.bench.work import Work
from longgen.errors import UsageError
from longgen.pattern import SparsePattern

# Chooses among a provider's own settings for some work, on its inputs; called before the clock.
Tune = Callable[[Work, Inputs, Sequence[str]], None]


class CannotDo(Exception):
    """Says, as a sentence, why a provider does not do some work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Hold a provider's way of doing some work.

    Attributes:
        attend: (q, k, v) -> out, all (B, T, H, D), differentiable.
        sees: the pattern that it computes, which is what it is checked against and what its FLOPs
            are counted by.
        note: in what its work differs from what was asked, if it does.
        tune: chooses among its own settings before it is timed.
    """

    attend: Attend
    sees: SparsePattern
    note: str | None = None
    tune: Tune | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """Name a provider and how to ask it.

    Attributes:
        name: as --providers and results files have it.
        label: for tables and plots.
        make: returns its way of doing some work, or raises `CannotDo`.
        missing: returns why it cannot run here at all, or None.
        package: whose version decides its figures, beside torch.
    """

    name: str
    label: str
    make: Callable[[Work], Job]
    missing: Callable[[torch.device], str | None] = lambda device: None
    package: str | None = None


def own(name: str, label: str, impl: str) -> Provider:
    """Return LongGen's attention with one implementation as a provider."""

    def make(work: Work) -> Job:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q, k, v, pattern=work.pattern, impl=impl)

        return Job(attend=attend, sees=work.pattern)

    def missing(device: torch.device) -> str | None:
        if impl in IMPLEMENTATIONS:
            return None
        return f"This version of LongGen has no attention implementation {impl!r}."

    # Where it isn't installed, results say so.
    package = "flash-attn-4" if impl in ("auto", "flash") else None
    return Provider(name=name, label=label, make=make, missing=missing, package=package)


def registry() -> dict[str, Provider]:
    """Return all providers by name, LongGen's own first."""
    from longgen.bench.peers import PEERS

    labels = {"flash": "LongGen flash", "flex": "LongGen flex"}
    # Named even where this version lacks it, so that asking for it gives a reason.
    names = dict.fromkeys(("flash", "flex", *IMPLEMENTATIONS[1:]))
    found = [own("ours", "LongGen (auto)", "auto")]
    found += [own(name, labels.get(name, f"LongGen {name}"), name) for name in names]
    return {provider.name: provider for provider in (*found, *PEERS)}


def default_providers(device: torch.device, *, quick: bool) -> tuple[str, ...]:
    """Return the names that are measured where none are given.

    Args:
        device: where it runs. Without a GPU only the portable implementations.
        quick: leave out whatever compiles for long.
    """
    if device.type != "cuda":
        return ("ours", "blocked", "reference")
    if quick:
        return ("ours", "sdpa_flash", "sdpa_cudnn", "fa4")
    # The portable implementations are specifications: they would take minutes or not fit.
    return tuple(name for name in registry() if name not in ("reference", "blocked"))


def choose(names: Sequence[str]) -> list[Provider]:
    """Return providers by name.

    Raises:
        UsageError: if one is not known.
    """
    known = registry()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(
            f"--providers has {', '.join(map(repr, unknown))}; choose from {', '.join(known)}."
        )
    return [known[name] for name in dict.fromkeys(names)]
