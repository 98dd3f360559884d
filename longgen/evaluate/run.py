"""Evaluate one model on held-out text: needle grid, loss by position, cost of a context.

Everything is saved as it is measured. A later call with the same model, text and settings takes
over what it finds and measures only what is missing.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longgen.errors import UsageError
from longgen.evaluate.asking import run_needle
from longgen.evaluate.cost import Cost, measure_cost
from longgen.evaluate.kv_dtypes import say_difference, write_comparison
from longgen.evaluate.needle import NeedleCell, NeedleResult, NeedleTask, Tokens
from longgen.evaluate.plots import plot_decode_time, plot_kv_bytes, plot_loss, plot_needle
from longgen.evaluate.positions import (
    LOSS_BUCKETS,
    LOSS_WINDOWS,
    loss_by_position,
    rows_of_windows,
)
from longgen.evaluate.report import Picture
from longgen.evaluate.results import say_bytes, say_tokens
from longgen.evaluate.saved import Rows, SavedResults
from longgen.evaluate.text import Text
from longgen.hf import is_hybrid
from longgen.runtime import ENGINE, runtime_of

METRICS = ("needle", "loss", "cost")
DECODE_STEPS = 32
REPEATS = 3
PREFILL_CHUNK = 8192
SECONDS_BETWEEN_LINES = 10
_PICTURES = {
    "needle": "Needle accuracy with keys and values in 8 bits",
    "loss": "Loss by position",
    "kv": "Keys and values held",
    "decode": "Time a token",
}

Say = Callable[[str], None]


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Tokens | Text,
    out: str | Path,
    *,
    variant: str | None = None,
    model_name: str | None = None,
    lengths: Sequence[int],
    num_depths: int = 11,
    samples: int = 10,
    seed: int = 0,
    repeat_text: bool = False,
    loss_context: int | None = None,
    loss_windows: int = LOSS_WINDOWS,
    cost_lengths: Sequence[int] | None = None,
    only: Sequence[str] = METRICS,
    original_context: int | None = None,
    kv_dtypes: Sequence[str | None] = (None,),
    command: str = "",
    say: Say = print,
) -> Rows:
    """Measure a model and write `needle.json`, `loss.json`, `cost.json` and their pictures.

    With keys and values in 8 bits they are `needle_fp8.json` and so on; with both formats asked for
    there are also `kv_dtypes.json` and a report, which set them side by side.

    Figures of other lengths in the same files stay there if model, text and settings are the same;
    otherwise the files are begun anew. An interrupt loses at most the cells being measured.

    Args:
        model: a hybrid or plain causal language model, on its device and in its dtype. Lengths may
            go beyond its context: that is where it is to be compared.
        tokenizer: the model's tokenizer.
        heldout: text that the model was not trained on, as token ids; special tokens are left out.
            Where it says where documents begin, the loss is taken within documents.
        out: folder for the results.
        variant: what results call the model; by default `variant_of(model.config)`.
        model_name: stands in the title of the needle picture; by default the variant.
        lengths: of the needle grid, in tokens.
        num_depths: of the needle grid.
        samples: per cell of the needle grid.
        seed: of needles and random prompts.
        repeat_text: repeat held-out text that is shorter than a needle's length.
        loss_context: window of the loss, in tokens; by default the greatest of `lengths` that the
            text can fill.
        loss_windows: windows of the loss, at most.
        cost_lengths: where cache and times are measured; by default `lengths`.
        only: which of `METRICS` to measure.
        original_context: marks in the loss picture where the original model's context ends.
        kv_dtypes: formats of keys and values to measure with, as `Engine` takes them; None is the
            model's own. Others are for hybrids, and their variant's name ends with theirs.
        command: the command line that makes these figures.
        say: prints one line of progress.

    Returns:
        The results rows of what was asked for, as the files hold them.

    Raises:
        UsageError: before anything runs, if the text is too short or an argument makes no sense;
            later, if the device runs out of memory in a needle test.
    """
    unknown = [name for name in only if name not in METRICS]
    if unknown or not only:
        raise UsageError(
            f"There is no {', '.join(unknown) or 'metric'} to evaluate; choose from "
            f"{', '.join(METRICS)}."
        )
    text, longest = usable_text(heldout, tokenizer, lengths, loss_context, only, repeat_text)
    task = NeedleTask(
        lengths=tuple(sorted(set(lengths))),
        num_depths=num_depths,
        samples=samples,
        seed=seed,
        wrap_haystack=repeat_text,
    )
    if any(kv_dtypes) and not is_hybrid(model.config):
        raise UsageError(
            "Keys and values in another format are for hybrids, which the engine runs, and "
            f"{type(model).__name__} isn't one. Convert the model with `longgen convert`."
        )
    own = variant or variant_of(model.config)
    wanted = {
        "needle": set(lengths),
        "loss": {longest},
        "cost": set(cost_lengths or lengths),
    }
    rows: list[dict[str, Any]] = []
    for kv_dtype in dict.fromkeys(kv_dtypes):
        saved = SavedResults(
            Path(out),
            model,
            tokenizer,
            text.ids,
            variant=f"{own}_{kv_dtype}" if kv_dtype else own,
            seed=seed,
            kv_dtype=kv_dtype,
            command=command,
            say=say,
        )
        if "needle" in only:
            _needle(model, tokenizer, text.ids, task, saved)
        if "loss" in only:
            bos = _leading_bos(tokenizer)
            _loss(model, text, longest, loss_windows, bos, saved)
        if "cost" in only:
            _cost(model, sorted(wanted["cost"]), saved)
        rows += [
            row
            for metric in METRICS
            if metric in only
            for row in saved.rows(metric)
            if row["length"] in wanted[metric]
        ]
        name = model_name or saved.variant
        if kv_dtype:
            name += f", keys and values in {kv_dtype}"
        try:
            # What was measured in other formats in the same call shows in the same pictures.
            _draw(saved, rows, only, name, original_context)
        except UsageError as error:
            # matplotlib may be missing; figures without pictures are worth keeping.
            say(f"no pictures: {error}")
    if None in kv_dtypes and any(kv_dtypes):
        pictures = [
            Picture(saved.folder / f"{saved.name(what)}.png", words)
            for what, words in _PICTURES.items()
        ]
        title = f"Keys and values in 8 bits: {model_name or own}"
        for row in write_comparison(saved, rows, own, title, pictures):
            say(say_difference(row))
    return rows


def variant_of(config: Any) -> str:
    """Return what results call a model by default: original, hybrid, full or sparse."""
    if not is_hybrid(config):
        return "original"
    return {"F": "full", "S": "sparse"}.get("".join(set(config.layer_plan.layers)), "hybrid")


def default_lengths(context: int) -> tuple[int, ...]:
    """Return the powers of two from min(4096, context / 8) up to the context, and the context."""
    first = 1 << (max(min(4096, context // 8), 1).bit_length() - 1)
    lengths = [first << i for i in range(context.bit_length()) if first << i < context]
    return (*lengths, context)


def usable_text(
    heldout: Tokens | Text,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    loss_context: int | None = None,
    only: Sequence[str] = METRICS,
    repeat: bool = False,
) -> tuple[Text, int]:
    """Return text without special tokens, and the window to take the loss over.

    Arguments are those of `evaluate_model`.

    Raises:
        UsageError: if the text is too short for what is asked.
    """
    text = heldout if isinstance(heldout, Text) else Text(np.asarray(heldout))
    text = text.without(tokenizer.all_special_ids)
    longest = loss_context or max((n for n in lengths if n < len(text)), default=max(lengths))
    if "needle" in only:
        task = NeedleTask(lengths=tuple(sorted(set(lengths))), wrap_haystack=repeat)
        for length in task.lengths:
            task.check_haystack(len(text), length)
    if "loss" in only and len(text) <= longest:
        raise UsageError(
            f"The held-out text has {len(text):,} tokens; loss by position over {longest:,} needs "
            f"{longest + 1:,}. Give more text, ask for shorter lengths, or leave the loss out."
        )
    return text, longest


def _needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: np.ndarray,
    task: NeedleTask,
    saved: SavedResults,
) -> None:
    settings = {
        "num_depths": task.num_depths,
        "samples": task.samples,
        "seed": task.seed,
        "repeat_text": task.wrap_haystack,
        **_runtime(model),
    }
    found = saved.read("needle", settings)
    others = [row for row in found if row["length"] not in task.lengths]
    cells = task.finished_cells(found)
    if cells:
        saved.say(f"needle: {len(cells)} cells were measured before")
    last = time.perf_counter()

    def save(cell: NeedleCell) -> None:
        nonlocal last
        cells.append(cell)
        result = NeedleResult(task, tuple(cells), len(text), runtime_of(model))
        saved.write("needle", settings, others + result.rows(saved.variant))
        here = [one for one in cells if one.length == cell.length]
        if len(here) == task.num_depths:
            hits = [hit for one in here for hit in one.hits]
            saved.say(f"needle at {say_tokens(cell.length)}: {sum(hits)} of {len(hits)} found")
        elif time.perf_counter() - last > SECONDS_BETWEEN_LINES:
            number = len(task.lengths) * task.num_depths
            saved.say(f"needle at {say_tokens(cell.length)}: cell {len(cells)} of {number}")
        else:
            return
        last = time.perf_counter()

    run_needle(
        model,
        tokenizer,
        text,
        task,
        finished=tuple(cells),
        on_cell=save,
        kv_dtype=saved.kv_dtype,
    )


def _loss(
    model: PreTrainedModel,
    text: Text,
    context: int,
    num_windows: int,
    bos_token_id: int | None,
    saved: SavedResults,
) -> None:
    buckets = min(LOSS_BUCKETS, context)
    settings = {"windows": num_windows, "buckets": buckets, **_runtime(model)}
    found = saved.read("loss", settings)
    rows = rows_of_windows(found, len(text), num_windows, text.starts, bos_token_id)
    if len(rows) < len(found):
        saved.say("loss: figures of windows that lay elsewhere are left out")
    result = None
    if all(row["length"] != context for row in rows):
        result = loss_by_position(
            model,
            text.ids,
            context,
            num_windows=num_windows,
            num_buckets=buckets,
            document_starts=text.starts,
            bos_token_id=bos_token_id,
            kv_dtype=saved.kv_dtype,
        )
        rows += result.rows(saved.variant)
    if rows != found:
        saved.write("loss", settings, rows)
    if result:
        saved.say(
            f"loss over {say_tokens(context)}: {result.overall:.3f} nats a token, from "
            f"{result.mean[0]:.2f} at the start to {result.mean[-1]:.2f} at the end"
        )


def _cost(model: PreTrainedModel, lengths: Sequence[int], saved: SavedResults) -> None:
    settings = {
        "decode_steps": DECODE_STEPS,
        "repeats": REPEATS,
        "prefill_chunk": PREFILL_CHUNK,
        "seed": saved.seed,
        **_runtime(model),
    }
    rows = saved.read("cost", settings)
    too_long: int | None = None
    for length in lengths:
        if any(row["length"] == length for row in rows):
            continue
        if too_long is None:
            [cost] = measure_cost(
                model,
                [length],
                decode_steps=DECODE_STEPS,
                repeats=REPEATS,
                prefill_chunk=PREFILL_CHUNK,
                seed=saved.seed,
                kv_dtype=saved.kv_dtype,
            )
        else:
            reason = f"Not tried: {too_long:,} tokens did not fit already."
            runtime = runtime_of(model)
            cost = Cost(length=length, prefill_chunk=PREFILL_CHUNK, runtime=runtime, error=reason)
        rows += cost.rows(saved.variant)
        saved.write("cost", settings, rows)
        if cost.error is not None or cost.kv_bytes is None:
            too_long = too_long or length
            saved.say(f"cost at {say_tokens(length)}: {cost.error}")
        else:
            saved.say(
                f"cost at {say_tokens(length)}: {say_bytes(cost.kv_bytes)} of keys and values, "
                f"prefill {statistics.median(cost.prefill_seconds):.2f} s, "
                f"{statistics.median(cost.decode_ms):.1f} ms a token ({cost.runtime})"
            )


def _runtime(model: PreTrainedModel) -> dict[str, str]:
    """Return the setting that keeps a hybrid's figures apart from those of transformers.

    Files from before there was a choice have no such setting: transformers made them.
    """
    runtime = runtime_of(model)
    return {"runtime": runtime} if runtime == ENGINE else {}


def _draw(
    saved: SavedResults,
    others: Rows,
    only: Sequence[str],
    model_name: str,
    original_context: int | None,
) -> None:
    def place(what: str) -> Path:
        return saved.folder / f"{saved.name(what)}.png"

    def shown(metric: str) -> Rows:
        rest = [row for row in others if not str(row["case"]).endswith(f".{saved.variant}")]
        return [*rest, *saved.rows(metric)]

    if "needle" in only:
        plot_needle(saved.rows("needle"), place("needle"), model_name=model_name)
    if "loss" in only:
        plot_loss(shown("loss"), place("loss"), original_context=original_context)
    if "cost" in only and any(row["value"] is not None for row in saved.rows("cost")):
        plot_kv_bytes(shown("cost"), place("kv"))
        plot_decode_time(shown("cost"), place("decode"))


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return bos if the tokenizer starts every sequence with it."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None
