"""`longgen bench attention`: the same attention by several providers, in one process on one card.

For every pattern each provider's output and gradients are checked on a few thousand tokens, and at
every length on sampled rows; only then is it timed. Timing goes in rounds: in each, every provider
is visited once, warmed up and timed, and the order turns by one from round to round, so that none
always meets the card as a certain other left it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch._functorch.config

from longgen.attention.testing import ErrorBudget, Inputs
from longgen.bench.checks import (
    RowTruth,
    Wrong,
    check_full_length,
    check_gate,
    gate_budget,
    gate_length,
    gate_shape,
)
from longgen.bench.failures import check_device, reason
from longgen.bench.providers import CannotDo, Job, Provider
from longgen.bench.settings import DTYPES, Settings
from longgen.bench.timing import Ceiling, Clock, Spread, measure_ceiling
from longgen.bench.work import Work, attention_flops
from longgen.errors import UsageError
from longgen.evaluate.results import say_tokens
from longgen.memory import clear
from longgen.pattern import SparsePattern

ResultRow = dict[str, Any]
UNIT = "TFLOP/s"


@dataclass(slots=True)
class _Entry:
    """Follow one provider through one piece of work."""

    provider: Provider
    job: Job
    error: str | None = None
    times: dict[str, list[float]] = field(default_factory=dict)


class AttentionBench:
    """Measure attention as `settings` say.

    Attributes:
        rows: results rows so far.
        skipped: what was not measured, and why: provider, pattern, length (None: all), reason.
        ceiling: what the card reaches by itself; None before it was measured.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_row: Callable[[ResultRow], None] = lambda row: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.settings, self.on_row, self.say = settings, on_row, say
        self.clock = Clock(settings.device)
        self.rows: list[ResultRow] = []
        self.skipped: list[ResultRow] = []
        self.ceiling: Ceiling | None = None
        self._begin = time.monotonic()

    def run(self) -> list[ResultRow]:
        """Measure everything and return the rows; what was measured before an interrupt is kept.

        Raises:
            UsageError: no provider is left, or one broke the GPU for all that follow.
        """
        with ExitStack() as stack:
            # A graph is kept for many backward passes; compiled ones would reuse its memory.
            stack.enter_context(torch._functorch.config.patch(donated_buffer=False))
            if self.settings.device.type == "cuda":
                # Kernels of Triton and CuTe are launched on the current device.
                stack.enter_context(torch.cuda.device(self.settings.device))
            return self._run()

    def _run(self) -> list[ResultRow]:
        settings = self.settings
        providers = [p for p in settings.providers if self._is_there(p)]
        if not providers:
            reasons = " ".join(skip["reason"] for skip in self.skipped)
            raise UsageError(f"No provider is left to measure. {reasons}")
        self.ceiling = measure_ceiling(
            self.clock,
            DTYPES[settings.dtype],
            settings.budget,
            matmul_size=settings.matmul_size,
            copy_bytes=settings.copy_bytes,
        )
        self.say(
            f"{settings.matmul_size}^3 matmul {self.ceiling.matmul.median / 1e12:.3g} TFLOP/s, "
            f"copy {self.ceiling.copy.median / 1e12:.3g} TB/s"
        )
        for name, pattern in settings.patterns.items():
            failed: dict[str, str] | None = None
            for length in sorted(settings.lengths):
                if not pattern.is_full and pattern.covers(length):
                    reason = f"At {length:,} tokens the pattern hides nothing: it is full there."
                    self._skip("all", name, length, reason)
                    continue
                if self._is_late(name, length):
                    continue
                work = Work(
                    name=name,
                    pattern=pattern,
                    length=length,
                    shape=settings.shape,
                    dtype=DTYPES[settings.dtype],
                )
                if failed is None:
                    failed = self._gate(work, providers)
                self._measure(work, providers, failed)
        return self.rows

    def timing(self) -> ResultRow:
        """Return how times were taken, for a results file."""
        budget = self.settings.budget
        return {
            "warmup_ms": budget.warmup_ms,
            "repeat_ms": budget.repeat_ms,
            "least": budget.least,
            "rounds": budget.rounds,
            "order": "every provider once a round, turn moved by one each round",
        }

    def _is_there(self, provider: Provider) -> bool:
        reason = provider.missing(self.settings.device)
        if reason:
            self._skip(provider.name, None, None, reason)
        return reason is None

    def _is_late(self, name: str, length: int) -> bool:
        limit = self.settings.seconds
        late = limit is not None and time.monotonic() - self._begin > limit
        if late:
            self._skip("all", name, length, f"{limit:.0f} seconds were over before its turn.")
        return late

    def _skip(self, provider: str, pattern: str | None, length: int | None, reason: str) -> None:
        entry = {"provider": provider, "pattern": pattern, "length": length, "reason": reason}
        if entry not in self.skipped:
            self.skipped.append(entry)
            self.say(" ".join(str(part) for part in (provider, pattern) if part) + f": {reason}")

    def _attempt(self, entry: _Entry, work: Work, action: Callable[[], object]) -> bool:
        """Do something with a provider; note why where it fails, and clear up after it."""
        name, length = entry.provider.name, work.length
        try:
            action()
            return True
        except (CannotDo, UsageError) as error:
            self._skip(name, work.name, length, str(error))
            entry.error = ""
        except Wrong as error:
            entry.error = f"{error}."
        except Exception as error:
            # Whatever a peer's kernel or compiler throws: the others go on.
            entry.error = reason(error, f"at {length:,} tokens")
        if entry.error:
            self.say(f"{name} {work.name} {say_tokens(length)}: {entry.error}")
        clear(self.settings.device)
        check_device(
            self.clock,
            f"{name} left the GPU unusable on {work.name} at {length:,} tokens: {entry.error}",
            "Leave it out with --providers; the results so far are kept.",
        )
        return False

    def _entries(self, work: Work, providers: Sequence[Provider]) -> list[_Entry]:
        entries = []
        for provider in providers:
            try:
                entries.append(_Entry(provider, provider.make(work)))
            except CannotDo as error:
                self._skip(provider.name, work.name, None, str(error))
        return entries

    def _gate(self, work: Work, providers: Sequence[Provider]) -> dict[str, str]:
        """Check every provider on a few thousand tokens; return reasons of those that fail."""
        gradients = "backward" in self.settings.directions
        small = replace(
            work,
            length=gate_length(work.pattern),
            shape=gate_shape(work.pattern, work.shape),
        )
        budgets: dict[SparsePattern, ErrorBudget] = {}
        failed = {}
        for entry in self._entries(small, providers):
            sees = entry.job.sees

            def check(entry: _Entry = entry, sees: SparsePattern = sees) -> None:
                if sees not in budgets:
                    budgets.clear()
                    seen = replace(small, pattern=sees)
                    budgets[sees] = gate_budget(
                        seen, self.settings.device, gradients=gradients, seed=self.settings.seed
                    )
                check_gate(entry.provider.name, entry.job.attend, budgets[sees])

            if not self._attempt(entry, small, check):
                failed[entry.provider.name] = entry.error or ""
        clear(self.settings.device)
        return failed

    def _measure(self, work: Work, providers: Sequence[Provider], failed: dict[str, str]) -> None:
        """Check and time all providers on one piece of work, and give a row for each direction."""
        settings = self.settings
        entries = self._entries(work, providers)
        for entry in entries:
            entry.error = failed.get(entry.provider.name)
        able = [entry for entry in entries if entry.error is None]
        sets: list[Inputs] = []
        for entry in able[:1]:
            # Inputs that do not fit leave no provider anything to do.
            if not self._attempt(entry, work, lambda: sets.extend(self._inputs(work))):
                for other in able:
                    other.error = entry.error
        truths: dict[SparsePattern, RowTruth] = {}
        for entry in [entry for entry in able if entry.error is None]:

            def check(entry: _Entry = entry) -> None:
                self._check(entry, work, sets[0], truths)

            self._attempt(entry, work, check)
        truths.clear()
        try:
            for number in range(settings.budget.rounds):
                self._round(number, [e for e in able if e.error is None], work, sets)
        finally:
            # Also when interrupted: what was timed is not thrown away.
            for entry in entries:
                self._report(entry, work)
        sets.clear()
        clear(self.settings.device)

    def _inputs(self, work: Work) -> list[Inputs]:
        """Draw as many sets of inputs as it takes to have none of them in the L2 cache."""
        device, shape = self.settings.device, work.shape
        generator = torch.Generator(device).manual_seed(self.settings.seed)

        def draw(heads: int) -> torch.Tensor:
            size = (1, work.length, heads, shape.head_dim)
            return torch.randn(size, generator=generator, device=device, dtype=work.dtype)

        per_token = (shape.heads + 2 * shape.kv_heads) * shape.head_dim * work.dtype.itemsize
        return [
            Inputs(draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads), draw(shape.heads))
            for _ in range(self.clock.copies(work.length * per_token))
        ]

    def _check(
        self, entry: _Entry, work: Work, inputs: Inputs, truths: dict[SparsePattern, RowTruth]
    ) -> None:
        sees, directions = entry.job.sees, self.settings.directions
        if sees not in truths:
            truths[sees] = RowTruth(
                inputs, sees, gradients="backward" in directions, seed=self.settings.seed
            )
        if entry.job.tune:
            entry.job.tune(work, inputs, directions)
        name = entry.provider.name
        check_full_length(name, entry.job.attend, inputs, truths[sees], directions)

    def _round(
        self, number: int, entries: Sequence[_Entry], work: Work, sets: Sequence[Inputs]
    ) -> None:
        turn = number % max(len(entries), 1)
        for entry in [*entries[turn:], *entries[:turn]]:
            for direction in self.settings.directions:
                if entry.error is None:

                    def visit(entry: _Entry = entry, direction: str = direction) -> None:
                        times = self._visit(entry.job, direction, sets)
                        entry.times.setdefault(direction, []).extend(times)

                    self._attempt(entry, work, visit)

    def _visit(self, job: Job, direction: str, sets: Sequence[Inputs]) -> list[float]:
        """Warm a provider up and time it for its share of a round; return milliseconds."""
        limits = self.settings.budget.visit
        if direction == "forward":
            with torch.no_grad():
                return self.clock.times(lambda i: job.attend(*sets[i % len(sets)][:3]), limits)
        graphs = []
        for inputs in sets:
            leaves = [x.detach().requires_grad_() for x in inputs[:3]]
            graphs.append((job.attend(*leaves), leaves, inputs.grad))

        def backward(i: int) -> None:
            out, leaves, grad = graphs[i % len(graphs)]
            torch.autograd.grad(out, leaves, grad, retain_graph=True)

        return self.clock.times(backward, limits)

    def _report(self, entry: _Entry, work: Work) -> None:
        """Give the rows of one provider: with figures, or with what went wrong."""
        if entry.error == "":  # it cannot do this, and is listed in `skipped`
            return
        for direction in self.settings.directions:
            row = self._row(entry, work, direction)
            if row is not None:
                self.rows.append(row)
                self.on_row(row)

    def _row(self, entry: _Entry, work: Work, direction: str) -> ResultRow | None:
        shape, sees, ceiling = work.shape, entry.job.sees, self.ceiling
        assert ceiling is not None
        flops = attention_flops(sees, work.length, shape, direction)
        row: ResultRow = {
            "case": work.case(direction),
            "provider": entry.provider.name,
            "length": work.length,
            "unit": UNIT,
            "batch": 1,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "dtype": self.settings.dtype,
            "pattern": str(work.pattern),
            "flops": flops,
            "ceiling": ceiling.matmul.median / 1e12,
        }
        if sees != work.pattern:
            row["sees"] = sees.to_dict()
        if entry.job.note:
            row["note"] = entry.job.note
        times = entry.times.get(direction, [])
        if entry.error:
            return row | {"value": None, "n": 0, "error": entry.error}
        if not times:  # interrupted before its turn
            return None
        found = Spread.of(times)
        value = flops / found.median / 1e9
        self.say(
            f"{row['case']} {say_tokens(work.length)} {entry.provider.name}: {value:.4g} {UNIT}, "
            f"{found.median:.4g} ms"
        )
        return row | {
            "value": value,
            "spread": [flops / found.high / 1e9, flops / found.low / 1e9],
            "spread_is": found.kind,
            "n": found.n,
            "ms": found.median,
            "ms_spread": [found.low, found.high],
            "share_of_matmul": 1e12 * value / ceiling.matmul.median,
        }
