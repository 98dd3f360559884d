"""`InferenceBench` end to end on a tiny model, and what becomes of what fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from longgen.accounting import decode_bytes, forward_flops, full_plan, kv_bytes
from longgen.bench import inference, tasks
from longgen.bench.inference import InferenceBench
from longgen.bench.inference_settings import (
    MOST,
    TINY,
    TINY_PATTERN,
    InferenceSettings,
    quick_settings,
)
from longgen.bench.models import random_model, shape_config
from longgen.bench.timing import Budget
from longgen.engine import engine as engine_module
from longgen.errors import UsageError
from longgen.evaluate.reading import EnginePrefill
from longgen.plan import LayerPlan

CPU = torch.device("cpu")
SHAPE = replace(TINY, num_hidden_layers=3)
PLAN = LayerPlan("SFS", TINY_PATTERN)
# Of a token in a layer, fp32.
TOKEN = 2 * SHAPE.num_key_value_heads * SHAPE.head_dim * 4
Row = dict[str, Any]


@pytest.fixture
def settings() -> InferenceSettings:
    return InferenceSettings(
        name="tiny",
        shape=SHAPE,
        plan=PLAN,
        lengths=(256,),
        device=CPU,
        batches=(1, 3),
        decode_tokens=3,
        prefill_chunk=96,
        dtype="fp32",
        repeats=3,
        budget=Budget(warmup_ms=0.0, repeat_ms=1.0, least=2, rounds=1),
        matmul_size=64,
        copy_bytes=1 << 12,
    )


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave memory to be collected when Python sees fit: doing it after every attempt takes most of
    the time of these tests."""
    monkeypatch.setattr(inference, "clear", lambda device: None)


def load() -> Any:
    return random_model(shape_config(SHAPE, 600), dtype=torch.float32, device=CPU, seed=0)


def run(settings: InferenceSettings, model: Callable[[], Any] = load, **changes: Any) -> Any:
    bench = InferenceBench(replace(settings, **changes), model)
    bench.run()
    return bench


def one(bench: Any, case: str, **fields: Any) -> Row:
    found = [
        row
        for row in bench.rows
        if row["case"] == case and all(row.get(key) == value for key, value in fields.items())
    ]
    assert len(found) == 1, (case, fields, bench.rows)
    row: Row = found[0]
    return row


def test_rows_are_whole_and_consistent(settings: InferenceSettings) -> None:
    bench = run(settings, lengths=(512, 256))
    assert [(row["case"], row["length"], row["batch"]) for row in bench.rows] == [
        (f"{metric}.{name}", length, batch)
        for length in (256, 512)
        for name in ("hybrid", "full", "transformers")
        for metric, batch in (
            *(("prefill", 1),) * (1 if name == "transformers" else 2),
            ("kv_bytes", 1),
            ("decode", 1),
            ("decode", 3),
        )
    ]
    assert bench.weight_bytes == 4 * SHAPE.num_parameters
    for row in bench.rows:
        assert row["value"] > 0 and "error" not in row
        assert row["spread"][0] <= row["value"] <= row["spread"][1]
        assert (row["shape"], row["dtype"]) == ("tiny", "fp32")
        assert row["share_of_ceiling"] == pytest.approx(row["ceiling"] / row["value"])
    for name, plan in (("hybrid", PLAN), ("full", full_plan(SHAPE))):
        for chunk in (96, 512):
            row = one(bench, f"prefill.{name}", length=512, prefill_chunk=chunk)
            assert row["flops"] == forward_flops(SHAPE, plan, 512, prefill_logits=True)
            assert row["n"] == 3 and row["unit"] == "s" and row["layers"] == plan.layers
            assert ("chunked_over_one_piece" in row) == (chunk == 512)
        row = one(bench, f"decode.{name}", length=512, batch=3)
        assert row["bytes"] == decode_bytes(SHAPE, plan, 512, 3, 4)
        assert row["n"] == 3 and row["unit"] == "ms per token"
        assert row["tokens_per_second"] == pytest.approx(3000 / row["value"])
    assert one(bench, "prefill.transformers", length=512)["prefill_chunk"] == 512


def test_bytes_held_are_those_of_the_formula(settings: InferenceSettings) -> None:
    bench = run(settings, batches=(1,))
    for name in ("full", "transformers"):
        row = one(bench, f"kv_bytes.{name}")
        assert row["value"] == row["formula_bytes"] == 3 * 256 * TOKEN
    row = one(bench, "kv_bytes.hybrid")
    assert row["formula_bytes"] == kv_bytes(SHAPE, PLAN, 256, bytes_per_element=4)
    # A slot has room for the whole window; after 256 tokens the block of the next one is empty.
    # One entry of each slot is there for rows that are no sequence's.
    assert row["value"] == row["formula_bytes"] + 2 * (TINY_PATTERN.block_size + 1) * TOKEN
    # One page of 128 tokens more for what is written; a spare page.
    assert row["bytes_each"] == row["value"] + 128 * TOKEN
    assert row["spare_bytes"] == 128 * TOKEN
    assert row["allocated_bytes"] == row["bytes_each"] + row["spare_bytes"]


def test_eight_bits_hold_a_quarter_of_four_bytes(settings: InferenceSettings) -> None:
    names = ("hybrid", "hybrid_fp8", "full_fp8")
    bench = run(settings, batches=(1,), variants=names)
    plain, small, full = (one(bench, f"kv_bytes.{name}") for name in names)
    assert 4 * small["value"] == plain["value"]
    assert 4 * small["formula_bytes"] == plain["formula_bytes"]
    assert (plain["kv_dtype"], small["kv_dtype"], small["dtype"]) == ("fp32", "fp8", "fp32")
    assert full["value"] == full["formula_bytes"] == 3 * 256 * TOKEN // 4
    plain, small = (one(bench, f"decode.{name}") for name in names[:2])
    saved = kv_bytes(SHAPE, PLAN, 256, bytes_per_element=3)
    assert plain["bytes"] - small["bytes"] == saved


def test_what_fits_follows_from_free_memory(
    settings: InferenceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = one(run(settings, batches=(1,)), "kv_bytes.hybrid")
    free = 5 * held["bytes_each"] + held["spare_bytes"] + 17
    before_weights = iter([10**9])
    monkeypatch.setattr(inference, "free_bytes", lambda device: next(before_weights, free))
    bench = run(settings, batches=(1, 1000, MOST), variants=("hybrid",))
    row = one(bench, "kv_bytes.hybrid")
    fits = 5
    assert row["max_sequences"] == fits and row["free_bytes"] == free
    batches = [row["batch"] for row in bench.rows if row["case"] == "decode.hybrid"]
    assert batches == [1, fits, 1000]
    assert one(bench, "decode.hybrid", batch=fits)["value"] > 0
    row = one(bench, "decode.hybrid", batch=1000)
    assert row["value"] is None and f"{fits} such sequences fit" in row["error"]


def test_a_length_that_cannot_fit_is_a_row_with_the_numbers(
    settings: InferenceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([10**9, 10**9])
    needed = kv_bytes(SHAPE, full_plan(SHAPE), 256, bytes_per_element=4)
    monkeypatch.setattr(inference, "free_bytes", lambda device: next(sizes, needed - 1))
    bench = run(settings)
    for metric in ("prefill", "kv_bytes", "decode"):
        assert one(bench, f"{metric}.full")["value"] is None
    error = one(bench, "prefill.full")["error"]
    assert "keys and values of 256 tokens take 192 KiB" in error and "are free" in error
    assert one(bench, "kv_bytes.hybrid")["value"] > 0


def test_what_can_never_fit_is_refused_before_it_is_loaded(
    settings: InferenceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "free_bytes", lambda device: 1000)
    bench = InferenceBench(settings, lambda: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=r"tiny does not fit: .* 1,000 bytes of memory are free"):
        bench.run()


def test_running_out_of_memory_costs_one_variant_its_row(
    settings: InferenceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tasks.StockPrefill, "read", read)
    bench = run(settings)
    row = one(bench, "prefill.transformers")
    assert (row["value"], row["n"], row["error"]) == (None, 0, "Out of memory at 256 tokens.")
    assert "nothing to measure" in one(bench, "kv_bytes.transformers")["error"]
    assert one(bench, "decode.transformers", batch=1)["value"] > 0
    assert one(bench, "prefill.full", prefill_chunk=96)["value"] > 0


def test_the_engine_may_not_go_on_in_smaller_pieces(
    settings: InferenceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory it would halve its pieces; a time of those has no place in this row."""
    real = engine_module.run

    def most(model: Any, step: Any, *rest: Any) -> torch.Tensor:
        if any(span.length > 100 for span in step.spans):
            raise torch.OutOfMemoryError("no memory for that")
        return real(model, step, *rest)

    monkeypatch.setattr(engine_module, "run", most)
    bench = run(settings, variants=("hybrid",))
    assert one(bench, "prefill.hybrid", prefill_chunk=96)["value"] > 0
    assert "Out of memory" in one(bench, "prefill.hybrid", prefill_chunk=256)["error"]
    assert one(bench, "kv_bytes.hybrid")["value"] > 0


def test_a_step_that_runs_out_of_memory_is_no_time(
    settings: InferenceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine_module.run

    def most(model: Any, step: Any, *rest: Any) -> torch.Tensor:
        if step.decode is not None and len(step.decode) > 2:
            raise torch.OutOfMemoryError("no memory for that")
        return real(model, step, *rest)

    monkeypatch.setattr(engine_module, "run", most)
    bench = run(settings, variants=("hybrid",))
    assert one(bench, "decode.hybrid", batch=1)["value"] > 0
    assert "Out of memory" in one(bench, "decode.hybrid", batch=3)["error"]


def test_numbers_that_are_none_get_no_time(settings: InferenceSettings) -> None:
    def broken() -> Any:
        model = load()
        with torch.no_grad():
            model.lm_head.weight[5] = float("nan")
        return model

    bench = run(settings, broken)
    for name, word in (("hybrid", "NaN"), ("full", "NaN"), ("transformers", "not finite")):
        for row in bench.rows:
            if row["case"] in (f"prefill.{name}", f"decode.{name}"):
                assert row["value"] is None and word in row["error"]


def test_peak_memory_is_what_comes_beside_weights_keys_and_values(
    settings: InferenceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU's figures made up: 5 MB of weights, and a peak of 9 MB."""
    monkeypatch.setattr(inference, "allocated_bytes", lambda device: 5_000_000)
    monkeypatch.setattr(inference, "peak_bytes", lambda device: 9_000_000)
    bench = run(settings, batches=(1,))
    for name in ("hybrid", "full", "transformers"):
        held = one(bench, f"kv_bytes.{name}")
        peak = 9_000_000 - 5_000_000 - held["allocated_bytes"]
        for row in bench.rows:
            if row["case"] == f"prefill.{name}":
                assert row["peak_bytes"] == peak
        assert held["work_bytes"] == peak
        room = held["free_bytes"] - held["spare_bytes"] - peak
        assert held["max_sequences"] == room // held["bytes_each"]


def test_a_slow_prefill_is_timed_once(settings: InferenceSettings) -> None:
    bench = run(settings, variants=("full",), seconds_each=0.0)
    assert one(bench, "prefill.full")["n"] == 1
    assert one(bench, "prefill.full")["prefill_chunk"] == 96
    (skip,) = bench.skipped
    assert skip["length"] == 256 and "At once not tried: in pieces it took" in skip["reason"]


@pytest.mark.parametrize(
    ("seconds", "timed"),
    [
        # Compiled in the first, then fast enough for all repeats.
        ([3.0, 0.2, 0.3, 0.25], [0.2, 0.3, 0.25]),
        ([3.0, 0.5], [0.5]),
        ([4.5], [4.5]),
    ],
)
def test_compilation_is_no_result(
    settings: InferenceSettings,
    monkeypatch: pytest.MonkeyPatch,
    seconds: list[float],
    timed: list[float],
) -> None:
    left = iter(seconds)
    monkeypatch.setattr(inference, "timed", lambda device, action: (None, next(left)))
    bench = InferenceBench(replace(settings, seconds_each=1.0, repeats=3), lambda: None)

    class Task:
        def prepare(self, chunk: int) -> None: ...

        def read(self) -> None: ...

    assert bench._read(Task(), 8) == timed  # type: ignore[arg-type]
    assert list(left) == []


def test_nothing_new_begins_when_time_is_over(settings: InferenceSettings) -> None:
    bench = run(settings, seconds=0.0)
    assert bench.rows == []
    assert [skip["variant"] for skip in bench.skipped] == ["hybrid", "full", "transformers"]


def test_a_hybrid_that_hides_nothing_is_left_out(settings: InferenceSettings) -> None:
    bench = run(settings, lengths=(64, 256), variants=("hybrid",), batches=(1,))
    assert {row["length"] for row in bench.rows} == {256}
    (skip,) = bench.skipped
    assert (skip["variant"], skip["length"]) == ("hybrid", 64) and "hides nothing" in skip["reason"]


def test_quick_settings_are_little_work(settings: InferenceSettings) -> None:
    quick = quick_settings(settings)
    assert quick.matmul_size < 1024 and quick.seconds is not None and quick.seconds < 60
    assert quick.lengths == settings.lengths


@pytest.mark.parametrize("chunk", [40, 256])
def test_what_is_timed_reads_the_whole_prompt(settings: InferenceSettings, chunk: int) -> None:
    """The engine's first token is that of transformers' model after the same prompt."""
    bench = run(settings, batches=(1,), decode_tokens=1)
    stock = bench._models["transformers"]
    prompt = tasks.random_tokens(stock, 256, 0)
    with torch.no_grad():
        expected = int(stock(torch.tensor([prompt])).logits[0, -1].argmax())
    task = EnginePrefill(bench._models["full"], prompt, 8)
    for _ in range(2):
        task.prepare(chunk)
        task.read()
        (request,) = task.engine.requests.values()
        assert request.output == [expected] and request.num_cached == 256


def test_what_is_timed_writes_with_all_tokens_in_sight(settings: InferenceSettings) -> None:
    """The first token that the engine writes is that of transformers' model over the same random
    keys and values."""
    bench = run(settings, lengths=(128,), batches=(1,), decode_tokens=1)
    stock = bench._models["transformers"]
    task = tasks.EngineDecode(bench._models["full"], 200, 1, 5, seed=3)
    stores = task.engine.cache
    cache = DynamicCache(config=stock.config)
    for layer, both in enumerate(zip(stores.keys, stores.values, strict=True)):
        k, v = (store.flatten(0, 1)[None, :199].transpose(1, 2).clone() for store in both)
        assert float(k.std()) == pytest.approx(1, abs=0.1)
        cache.update(k, v, layer)
    last = torch.tensor([[tasks.random_tokens(stock, 200, 3)[-1]]])
    with torch.no_grad():
        expected = int(stock(last, past_key_values=cache).logits.argmax())
    task.write()
    (request,) = task.engine.requests.values()
    assert request.block_table == [0, 1] and request.output == [expected]


@pytest.mark.parametrize("name", ["hybrid", "full"])
def test_sequences_grow_by_a_token_a_step(settings: InferenceSettings, name: str) -> None:
    bench = run(settings, lengths=(128,), batches=(1,), decode_tokens=1)
    task = tasks.EngineDecode(bench._models[name], 200, 2, 5, seed=3)
    stock = tasks.StockDecode(bench._models["transformers"], 200, 2, seed=3)
    # Also the first step is one of single tokens, not the end of a prompt.
    assert [request.num_left for request in task.engine.requests.values()] == [1, 1]
    for number in range(1, 4):
        task.write()
        stock.write()
        assert len(task.engine.requests) == 2
        for request in task.engine.requests.values():
            assert (request.num_cached, len(request.output)) == (199 + number, number)
        assert stock.cache.get_seq_length() == 199 + number and stock.tokens.shape == (2, 1)


def test_layers_that_share_weights_cost_as_many_steps(settings: InferenceSettings) -> None:
    """Weights of two of three layers: keys, values and work of all three."""
    seen: list[Any] = []

    def shared() -> Any:
        config = shape_config(SHAPE, 600)
        options: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "seed": 0}
        seen.append(random_model(config, resident_layers=2, **options))
        return seen[0]

    names = ("hybrid", "hybrid_fp8", "full", "transformers")
    bench = run(settings, shared, resident_layers=2, variants=names)
    (model,) = seen
    layers = [dict(layer.named_parameters()) for layer in model.model.layers]
    assert all(layers[0][name] is layers[2][name] for name in layers[0])
    assert all(layers[0][name] is not layers[1][name] for name in layers[0])
    shape = replace(SHAPE, num_hidden_layers=2)
    assert bench.weight_bytes == 4 * shape.num_parameters
    assert [row for row in bench.rows if row.get("error")] == []
    assert {row["resident_layers"] for row in bench.rows} == {2}
    row = one(bench, "kv_bytes.full")
    assert row["value"] == row["formula_bytes"] == 3 * 256 * TOKEN
    assert row["absent_weight_bytes"] == 4 * SHAPE.layer_parameters
    assert one(bench, "decode.full", batch=1)["bytes"] == decode_bytes(
        SHAPE, full_plan(SHAPE), 256, 1, 4
    )
    # What is measured is the model with these weights, three layers deep.
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = seen[0](ids).logits
        state = {name: x.clone() for name, x in model.state_dict().items()}
        own = random_model(shape_config(SHAPE, 600), dtype=torch.float32, device=CPU, seed=1)
        own.load_state_dict(state)
        assert torch.equal(own(ids).logits, expected)


def test_which_weights_are_there_is_said(settings: InferenceSettings) -> None:
    assert settings.resident_note == "" and settings.absent_bytes == 0
    few = replace(settings, resident_layers=1)
    assert few.resident_note.startswith("The weights of 1 of 3 layers are there")
    assert few.absent_bytes == 2 * 4 * SHAPE.layer_parameters


def test_only_weights_that_are_there_have_to_fit(
    settings: InferenceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = kv_bytes(SHAPE, PLAN, 256, bytes_per_element=4)
    few = replace(settings, resident_layers=1, variants=("hybrid",))
    for spare, fits in ((0, True), (-1, False)):
        free = 4 * few.resident_shape.num_parameters + cache + spare
        monkeypatch.setattr(inference, "free_bytes", lambda device, free=free: free)
        bench = InferenceBench(few, load)
        if fits:
            bench._check_memory()
        else:
            with pytest.raises(UsageError, match="--resident-layers with --shape"):
                bench._check_memory()
