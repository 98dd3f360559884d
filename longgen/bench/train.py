"""`longgen bench train`: a training step of a hybrid, of the same model all full, and of
transformers.

Lengths go from short to long; at each, one variant after the other gets a model of its own, makes
its steps, and gives everything back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from longgen.accounting import full_plan, training_flops
from longgen.bench.communication import profile_communication
from longgen.bench.failures import check_device, reason
from longgen.bench.memory import peak_bytes, restart_peak
from longgen.bench.timing import Ceiling, Clock, Spread, measure_ceiling
from longgen.bench.train_settings import STOCK, TrainSettings
from longgen.bench.train_step import TrainStep, make_step
from longgen.bench.train_summary import communication_share
from longgen.errors import UsageError
from longgen.evaluate.cost import timed
from longgen.evaluate.results import card_name, say_bytes, say_tokens
from longgen.gpus import GpuGroup, find_gpu, machine_gpus, mfu, peak_flops
from longgen.memory import clear
from longgen.plan import LayerPlan
from longgen.train.processes import Processes
from longgen.training_memory import choose_checkpointing, training_memory
from longgen.training_setup import TrainingSetup
from longgen.training_time import training_time

ResultRow = dict[str, Any]
# A first step that takes this many times as long as all timed ones may is the only one.
_LONGEST_WARMUP = 4


class TrainBench:
    """Measure training steps as `settings` say; under torchrun every process does the same.

    Attributes:
        rows: results rows so far.
        skipped: what was not measured, and why: variant, length, reason.
        ceiling: what the device reaches by itself; None before it was measured.
    """

    def __init__(
        self,
        settings: TrainSettings,
        base: Any,
        processes: Processes,
        *,
        on_row: Callable[[ResultRow], None] = lambda row: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Prepare; nothing is made yet.

        Args:
            settings: what to measure.
            base: transformers' config of the model with as many layers.
            processes: those of the run.
            on_row: called with every row.
            say: prints a line of progress.
        """
        self.settings, self.base, self.processes = settings, base, processes
        self.on_row, self.say = on_row, say
        self.clock = Clock(settings.device)
        self.rows: list[ResultRow] = []
        self.skipped: list[ResultRow] = []
        self.ceiling: Ceiling | None = None
        self._begin = time.monotonic()
        on_gpu = settings.device.type == "cuda"
        self.peak = peak_flops(card_name(settings.device)) if on_gpu else None
        self.memory_bytes = processes.least_memory(machine_gpus() if on_gpu else None)

    def run(self) -> list[ResultRow]:
        """Measure everything and return the rows; what was measured before an interrupt is kept.

        Raises:
            UsageError: something broke the GPU for all that follows, or, with several processes,
                failed in one of them.
        """
        settings = self.settings
        if settings.device.type != "cuda":
            return self._run()
        with torch.cuda.device(settings.device):
            return self._run()

    def _run(self) -> list[ResultRow]:
        settings = self.settings
        self.ceiling = measure_ceiling(
            self.clock,
            settings.dtype,
            settings.budget,
            matmul_size=settings.matmul_size,
            copy_bytes=settings.copy_bytes,
        )
        clear(settings.device)
        for length in sorted(settings.lengths):
            for name in settings.variants:
                why = self._obstacle(name, length)
                if why is None:
                    self._measure(name, length)
                else:
                    self.skipped.append({"variant": name, "length": length, "reason": why})
                    self.say(f"{name} {say_tokens(length)}: {why}")
        return self.rows

    def timing(self) -> ResultRow:
        """Return how times were taken, for a results file."""
        settings = self.settings
        return {
            "steps": settings.steps,
            "seconds_at_most": settings.seconds_each,
            "a_step_is": "forward, backward, clipping, AdamW"
            if settings.setup.optimizer
            else "forward, backward",
            "order": "by length; variants one after the other in the order given, each with a "
            "model of its own",
        }

    def _plan(self, name: str) -> LayerPlan:
        settings = self.settings
        return settings.plan if name == "hybrid" else full_plan(settings.shape)

    def _setup(self, name: str, length: int) -> TrainingSetup:
        """Return how a variant is trained at a length."""
        setup = self.settings.setup
        if name == STOCK:
            # Transformers' own checkpointing is of whole layers.
            whole = self.settings.chooses_checkpointing or setup.checkpointing != "off"
            return replace(setup, checkpointing="full") if whole else setup
        if not self.settings.chooses_checkpointing:
            return setup
        return choose_checkpointing(
            "auto",
            self.settings.shape,
            length,
            replace(setup, accumulates=False),
            self._plan(name),
            self.memory_bytes,
            fp8=self.settings.fp8,
        )

    def _obstacle(self, name: str, length: int) -> str | None:
        """Return why a variant has no turn at a length; all processes come to the same."""
        settings = self.settings
        over = settings.seconds is not None and time.monotonic() - self._begin > settings.seconds
        if self.processes.any(over):
            return f"{settings.seconds:.0f} seconds were over before its turn."
        if name == "hybrid" and settings.plan.pattern.covers(length):
            return f"At {length:,} tokens the pattern hides nothing: it is full there."
        shared = settings.setup.context_parallel
        if name == STOCK and shared > 1:
            return f"transformers' own attention cannot share a sequence among {shared} processes."
        if length % shared:
            return f"{length:,} tokens do not divide by {shared} processes."
        return None

    def _measure(self, name: str, length: int) -> None:
        """Give the row of one variant at one length."""
        settings, several = self.settings, self.processes.count > 1
        planned = self._planned(name, length)
        gpus = machine_gpus() if settings.device.type == "cuda" else None
        if several and planned and gpus and not settings.force:
            # Elsewhere the attempt tells more; here one process that fails would leave the others
            # waiting for it.
            memory, most = planned["planned_total_bytes"], gpus.gpu.memory_bytes
            if memory > most:
                why = (
                    f"The plan needs {say_bytes(memory)} of each GPU, which has {say_bytes(most)}."
                )
                return self._add(name, length, planned, [], None, None, why)
        times: list[float] = []
        found: dict[str, Any] = {}
        error: str | None = None
        try:
            found = self._steps(name, length, times)
        except Exception as failure:
            # Whatever a kernel, a compiler or transformers throws: the others go on.
            error = reason(failure, f"at {length:,} tokens")
        torch._dynamo.reset()
        clear(settings.device)
        if error:
            advice = "Leave it out with --variants; the results so far are kept."
            if several:
                raise UsageError(
                    f"train_step.{name} failed in process {self.processes.rank} of "
                    f"{self.processes.count} at {length:,} tokens: {error} {advice}"
                )
            blame = f"train_step.{name} left the GPU unusable at {length:,} tokens: {error}"
            check_device(self.clock, blame, advice)
        planned |= found.get("communication", {})
        peak = found.get("peak_bytes")
        return self._add(name, length, planned, times, peak, found.get("loss"), error)

    def _steps(self, name: str, length: int, times: list[float]) -> dict[str, Any]:
        """Make steps; `times` gets the seconds of each timed one. Return the loss and the peak."""
        settings, device = self.settings, self.settings.device
        settings = replace(settings, setup=self._setup(name, length))
        step = make_step(settings, name, self._plan(name), self.base, length, self.processes)

        def once() -> tuple[torch.Tensor, float]:
            step.forget_gradients()
            self.processes.wait()
            loss, seconds = timed(device, step.run)
            # The slowest process's time is that of all.
            return loss, max(self.processes.each(seconds))

        loss, first = once()
        value = step.check(loss)
        if first > _LONGEST_WARMUP * settings.seconds_each:
            self.say(f"The next figure is of a first step, of {first:.0f} s: too slow to repeat.")
            times.append(first)
        else:
            restart_peak(device)
            while not times or (len(times) < settings.steps and sum(times) < settings.seconds_each):
                loss, seconds = once()
                value = step.check(loss)
                times.append(seconds)
        peak = peak_bytes(device)
        peaks = self.processes.each(float(peak or 0))
        # Each process has its share of the loss of its group's sequence.
        losses = self.processes.each(value)
        return {
            "loss": sum(losses) / self.processes.data_parallel,
            "peak_bytes": int(max(peaks)) if peak is not None else None,
            "communication": self._communication(step),
        }

    def _communication(self, step: TrainStep) -> dict[str, Any]:
        """Make one more step to see what of it is communication: of the process with most, which
        waits the longest, and of each."""
        if self.processes.count == 1 or self.settings.device.type != "cuda":
            return {}
        step.forget_gradients()
        self.processes.wait()
        all_found = self.processes.gather(profile_communication(step.run))
        return {
            "communication_seconds": max(found.seconds for found in all_found),
            "communication_exposed_seconds": max(found.exposed_seconds for found in all_found),
            "communication_by_process": [found._asdict() for found in all_found],
        }

    def _planned(self, name: str, length: int) -> dict[str, Any]:
        """Return what the plan says, for the variants that it knows."""
        settings = self.settings
        if name == STOCK:
            return {}
        setup, plan = replace(self._setup(name, length), accumulates=False), self._plan(name)
        memory = training_memory(settings.shape, length, setup, plan)
        found: dict[str, Any] = {
            "planned_bytes": memory.allocated,
            "planned_total_bytes": memory.total,
            "planned_phases": memory.phases,
        }
        card = find_gpu(card_name(settings.device)) if settings.device.type == "cuda" else None
        if card is not None:
            gpus = GpuGroup(setup.gpus, card)
            groups = setup.gpus // setup.context_parallel
            time = training_time(settings.shape, plan, length, gpus, setup, groups)
            if time is not None:
                parts = dict(time.parts)
                if not setup.optimizer:
                    parts.pop("optimizer")
                found |= {"planned_seconds": sum(parts.values()), "planned_parts": parts}
        return found

    def _add(
        self,
        name: str,
        length: int,
        planned: dict[str, Any],
        times: list[float],
        peak: int | None,
        loss: float | None,
        error: str | None,
    ) -> None:
        """Give a row: the median of `times`, or why there is none."""
        settings = self.settings
        setup, plan = self._setup(name, length), self._plan(name)
        gpus = self.processes.count
        sequences = gpus // setup.context_parallel
        flops = sequences * training_flops(settings.shape, plan, length)
        row: ResultRow = {
            "case": f"train_step.{name}",
            "length": length,
            "unit": "s",
            "shape": settings.name,
            "layers": plan.layers,
            "layers_of": settings.whole_layers,
            "pattern": str(plan.pattern) if "S" in plan.layers else None,
            "batch": sequences,
            "gpus": gpus,
            "context_parallel": setup.context_parallel,
            "sharding": (setup.is_sharded and "fsdp") or (gpus > 1 and "ddp") or None,
            "checkpointing": setup.checkpointing,
            "offload": setup.offload and name != STOCK,
            "compile": setup.compile and name != STOCK,
            "fp8": settings.fp8 and name != STOCK,
            "optimizer": setup.optimizer,
            "dtype": "bf16" if setup.is_bf16 else "fp32",
            "flops": flops,
            **planned,
        }
        if error:
            row |= {"value": None, "n": 0, "error": error}
            said = error
        else:
            spread = Spread.of(times)
            rate = sequences * length / spread.median / gpus
            row |= {
                "value": spread.median,
                "spread": [spread.low, spread.high],
                "n": spread.n,
                "loss": loss,
                "tokens_per_second_per_gpu": rate,
                "mfu": mfu(flops, spread.median, self.peak, gpus) if self.peak else None,
                "peak_bytes": peak,
            }
            said = f"{spread.median:.4g} s, {rate:,.0f} tokens/s/GPU"
            said += f", MFU {row['mfu']:.0%}" if row["mfu"] else ""
            if "communication_seconds" in row:
                said += f", communication {communication_share(row)}"
            said += f", peak {say_bytes(peak)}" if peak else ""
            if peak and "planned_bytes" in row:
                said += f" ({say_bytes(row['planned_bytes'])} planned)"
        self.say(f"{row['case']} {say_tokens(length)}: {said}")
        self.rows.append(row)
        self.on_row(row)
