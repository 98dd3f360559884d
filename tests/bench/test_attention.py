from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from longgen.bench import attention as module
from longgen.bench.attention import AttentionBench
from longgen.bench.providers import CannotDo, Job, Provider
from longgen.bench.settings import Settings
from longgen.bench.work import Work, attention_flops
from longgen.errors import UsageError
from longgen.pattern import SparsePattern
from tests.bench.fakes import SMALL, provider, right, wrong_mask


def run(settings: Settings, *providers: Provider, **changes: Any) -> AttentionBench:
    bench = AttentionBench(replace(settings, providers=providers or settings.providers, **changes))
    bench.run()
    return bench


def test_rows_have_the_shape_of_all_results(settings: Settings) -> None:
    bench = run(settings)
    forward, backward = bench.rows
    assert [row["case"] for row in bench.rows] == [
        "attention.small.forward",
        "attention.small.backward",
    ]
    for row in bench.rows:
        assert (row["provider"], row["length"], row["unit"]) == ("good", 192, "TFLOP/s")
        assert (row["heads"], row["kv_heads"], row["head_dim"]) == (2, 1, 16)
        assert row["value"] == pytest.approx(row["flops"] / row["ms"] / 1e9)
        low, high = row["spread"]
        assert low <= row["value"] <= high
        assert row["n"] >= 4 and row["pattern"] == str(SMALL) and row["dtype"] == "fp32"
        assert row["share_of_matmul"] == pytest.approx(row["value"] / row["ceiling"])
        assert "sees" not in row and "error" not in row
    assert forward["flops"] == attention_flops(SMALL, 192, settings.shape, "forward")
    assert backward["flops"] == 2.5 * forward["flops"]
    assert bench.timing()["rounds"] == 2


def test_compiled_graphs_keep_their_memory(settings: Settings) -> None:
    """Many backward passes go through each."""
    donated = []

    def note(work: Work, *qkv: torch.Tensor) -> torch.Tensor:
        donated.append(torch._functorch.config.donated_buffer)
        return right(work, *qkv)

    run(settings, provider("good", note))
    assert donated and not any(donated)


def test_a_provider_with_a_wrong_mask_gets_no_time(settings: Settings) -> None:
    bench = run(settings, provider("bad", wrong_mask), provider("good", right))
    bad = [row for row in bench.rows if row["provider"] == "bad"]
    assert len(bad) == 2
    for row in bad:
        assert row["value"] is None and row["n"] == 0 and "ms" not in row
        assert "wrong result at 128 tokens: bad out" in row["error"]
    assert all(row["value"] for row in bench.rows if row["provider"] == "good")


def test_a_provider_that_is_wrong_at_full_length_only_gets_no_time(settings: Settings) -> None:
    def late(work: Work, *qkv: torch.Tensor) -> torch.Tensor:
        return (wrong_mask if qkv[0].shape[1] > 128 else right)(work, *qkv)

    (first, _) = run(settings, provider("bad", late)).rows
    assert first["value"] is None and "full length" in first["error"]


def test_what_fails_is_a_row_and_the_others_go_on(settings: Settings) -> None:
    def full(work: Work, *qkv: torch.Tensor) -> torch.Tensor:
        if qkv[0].shape[1] > 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(work, *qkv)

    def crash(work: Work, *qkv: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("kernel\n  fell over")

    bench = run(settings, provider("full", full), provider("bad", crash), provider("good", right))
    errors = {row["provider"]: row.get("error") for row in bench.rows}
    assert errors == {
        "full": "Out of memory at 192 tokens.",
        "bad": "RuntimeError: kernel fell over",
        "good": None,
    }


def test_what_cannot_be_done_is_listed_with_its_reason(settings: Settings) -> None:
    def refuse(work: Work) -> Job:
        raise CannotDo("It has no sinks.")

    def late(work: Work, *qkv: torch.Tensor) -> torch.Tensor:
        raise UsageError("Not on this card.")

    there = provider("absent", right, missing=lambda device: "Not installed.")
    unable = Provider(name="unable", label="unable", make=refuse)
    covering = SparsePattern(block_size=64, local_blocks=8)
    bench = run(
        settings,
        there,
        unable,
        provider("late", late),
        provider("good", right),
        patterns={"small": SMALL, "covering": covering},
    )
    found = {(s["provider"], s["pattern"]): s["reason"] for s in bench.skipped}
    assert found == {
        ("absent", None): "Not installed.",
        ("unable", "small"): "It has no sinks.",
        ("late", "small"): "Not on this card.",
        ("all", "covering"): "At 192 tokens the pattern hides nothing: it is full there.",
    }
    assert {row["provider"] for row in bench.rows} == {"good"}


def test_no_provider_at_all_is_an_error(settings: Settings) -> None:
    with pytest.raises(UsageError, match=r"No provider is left to measure\. Not installed\."):
        run(settings, provider("absent", right, missing=lambda device: "Not installed."))


def test_another_pattern_is_checked_and_counted_as_its_own(settings: Settings) -> None:
    window = SparsePattern(block_size=1, sink_blocks=0, local_blocks=32)

    def make(work: Work) -> Job:
        own = replace(work, pattern=window)
        return Job(attend=lambda q, k, v: right(own, q, k, v), sees=window, note="no sink")

    (row, _) = run(settings, Provider(name="window", label="window", make=make)).rows
    assert row["value"] and row["note"] == "no sink"
    assert row["sees"] == window.to_dict() and row["pattern"] == str(SMALL)
    assert row["flops"] == attention_flops(window, 192, settings.shape, "forward")


def test_turns_move_from_round_to_round(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits: list[tuple[str, str]] = []
    visit: Callable[..., list[float]] = AttentionBench._visit

    def watched(self: AttentionBench, job: Job, direction: str, sets: Any) -> list[float]:
        visits.append((jobs[id(job.attend)], direction))
        return visit(self, job, direction, sets)

    jobs: dict[int, str] = {}
    providers = []
    for name in ("a", "b", "c"):
        good = provider(name, right)

        def make(work: Work, good: Provider = good) -> Job:
            job = good.make(work)
            jobs[id(job.attend)] = good.name
            return job

        providers.append(replace(good, make=make))
    monkeypatch.setattr(AttentionBench, "_visit", watched)
    run(settings, *providers, directions=("forward",))
    assert "".join(name for name, _ in visits) == "abcbca"


def test_a_provider_tunes_itself_before_the_clock(settings: Settings) -> None:
    tuned: list[int] = []

    def make(work: Work) -> Job:
        return Job(
            attend=lambda q, k, v: right(work, q, k, v),
            sees=work.pattern,
            tune=lambda work, inputs, directions: tuned.append(inputs.q.shape[1]),
        )

    run(settings, Provider(name="tuned", label="tuned", make=make))
    assert tuned == [192]


def test_rows_come_one_by_one_and_an_interrupt_keeps_them(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit, done = AttentionBench._visit, 0

    def interrupted(self: AttentionBench, *arguments: Any) -> list[float]:
        nonlocal done
        done += 1
        if done == 6:  # in the second pattern
            raise KeyboardInterrupt
        return visit(self, *arguments)

    monkeypatch.setattr(AttentionBench, "_visit", interrupted)
    seen: list[Any] = []
    other = SparsePattern(block_size=16, sink_blocks=0, local_blocks=3)
    bench = AttentionBench(
        replace(settings, patterns={"small": SMALL, "other": other}), on_row=seen.append
    )
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert seen == bench.rows
    assert [row["case"] for row in seen] == [
        "attention.small.forward",
        "attention.small.backward",
        "attention.other.forward",
    ]


def test_nothing_new_is_begun_after_the_time(settings: Settings) -> None:
    bench = run(settings, seconds=0.0)
    assert not bench.rows
    assert "were over before its turn" in bench.skipped[0]["reason"]


def test_a_broken_gpu_ends_the_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(work: Work, *qkv: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def wait(self: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench = AttentionBench(replace(settings, providers=(provider("bad", crash),)))
    monkeypatch.setattr(module, "measure_ceiling", lambda *a, **k: None)
    monkeypatch.setattr(module.Clock, "wait", wait)
    bench.say = lambda line: None
    with pytest.raises(UsageError, match="bad left the GPU unusable"):
        bench._gate(
            Work(
                name="small", pattern=SMALL, length=192, shape=settings.shape, dtype=torch.float32
            ),
            bench.settings.providers,
        )
