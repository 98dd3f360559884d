"""The demo: extend SmolLM2-135M-Instruct, compare it before and after, and write a report.

python demo/run.py [--out out/demo]. Interrupted, it goes on where it stopped when it is run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.checkpoint import make_checkpoint
from demo.settings import SEED, DemoSettings, settings
from longgen.checkpoint import RECORD, load_model, load_tokenizer
from longgen.errors import UsageError
from longgen.evaluate.plots import plot_decode_time, plot_kv_bytes, plot_loss, plot_needle
from longgen.evaluate.report import Code, Picture, Section, comparison_table, write_report
from longgen.evaluate.results import card_name, read_results, versions, write_results
from longgen.evaluate.run import evaluate_model
from longgen.train.extend import extend
from longgen.train.folder import HELDOUT, read_run, training_folder

DEFAULT_OUT = Path("out/demo")
_BEGAN = time.perf_counter()


def say(line: str) -> None:
    """Print a line with the time since the start."""
    print(f"[{time.perf_counter() - _BEGAN:4.0f} s] {line}", flush=True)


def base_checkpoint(out: Path, original_context: int, source: Path | None = None) -> Path:
    """Return the base model's folder; on a CPU its config says a shorter context (see notes)."""
    base = make_checkpoint(out / "original", source)
    fields = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if fields["max_position_embeddings"] == original_context:
        return base
    short = out / f"original-{original_context}"
    if not (short / "config.json").is_file():
        draft = out / f".{short.name}.partial"
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(base, draft)
        fields["max_position_embeddings"] = original_context
        (draft / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
        draft.rename(short)
    return short


def extended(base: Path, out: Path, chosen: DemoSettings, full_layers: str) -> dict[str, Any]:
    """Train one model, or go on with it, or take it as it is if it is finished."""
    # config.json is moved into place last, so with it the model is whole.
    if not (out / "config.json").is_file():
        begun = read_run(out) is not None
        made = extend(chosen.extension(base, out, full_layers), resume=begun, say=say)
        if not made["finished"]:
            raise KeyboardInterrupt
    found: dict[str, Any] = json.loads((out / RECORD).read_text(encoding="utf-8"))
    return found


def evaluated(
    path: Path,
    variant: str,
    out: Path,
    heldout: np.ndarray,
    chosen: DemoSettings,
    only: tuple[str, ...] = ("needle", "loss", "cost"),
) -> list[dict[str, Any]]:
    """Evaluate one model; finished parts of an earlier run are taken over."""
    say(f"evaluating: {variant}")
    rows = evaluate_model(
        load_model(path),
        load_tokenizer(path),
        heldout,
        out / variant,
        variant=variant,
        lengths=chosen.lengths,
        num_depths=chosen.num_depths,
        samples=chosen.samples,
        seed=SEED,
        loss_context=chosen.context,
        loss_windows=chosen.loss_windows,
        cost_lengths=chosen.cost_lengths,
        only=only,
        command="make demo",
        say=say,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows


def settings_anywhere(record: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings but for the places of this machine."""
    places = ("model", "out", "data")
    return {name: value for name, value in record["config"].items() if name not in places}


def report(
    out: Path, chosen: DemoSettings, record: dict[str, Any], rows: list[dict[str, Any]]
) -> Path:
    """Draw the figures and write report.md and report.html; returns the page."""
    names = {"original": "SmolLM2-135M-Instruct", "hybrid": "the hybrid"}
    figures = [
        Picture(
            plot_needle(rows, out / f"needle_{variant}.png", model_name=name, variant=variant),
            f"Needle in held-out text: {name}.",
        )
        for variant, name in names.items()
    ]
    figures += [
        Picture(
            plot_loss(rows, out / "loss.png", original_context=chosen.original_context),
            "Next-token loss on held-out text by position.",
        ),
        Picture(plot_kv_bytes(rows, out / "kv.png"), "Bytes that the key/value cache holds."),
        Picture(plot_decode_time(rows, out / "decode.png"), "Time to generate one token."),
    ]
    training, config = record["training"], record["config"]
    on_gpu = torch.cuda.is_available()
    minutes = (time.perf_counter() - _BEGAN) / 60
    speed = training["tokens_per_second"]
    summary = [
        ("Card", record["card"]),
        ("Versions", ", ".join(f"{name} {value}" for name, value in versions().items())),
        ("Command", "make demo"),
        ("Seed", str(SEED)),
        ("Minutes", f"{minutes:.1f} (this run; finished parts of earlier runs are not redone)"),
        ("Context", f"{chosen.original_context:,} to {chosen.context:,} tokens"),
        ("Rotary base", f"{record['rope_theta']:,.0f}"),
        (
            "Training",
            f"{training['step']} steps, {training['tokens']:,} tokens in "
            f"{training['seconds']:.0f} s ({speed:,.0f} tokens/s), loss "
            f"{training['first_loss']:.2f} to {training['last_loss']:.2f}, recall text in "
            f"{config['recall_share']:.0%} of sequences",
        ),
        (
            "Data",
            f"{record['data']['documents']:,} documents of the Python library's sources"
            f"{' and of transformers' if on_gpu else ''}, {record['packing']['tokens']:,} tokens",
        ),
    ]
    _, page = write_report(
        out,
        title=f"SmolLM2-135M-Instruct, {chosen.original_context:,} to {chosen.context:,} tokens",
        summary_rows=summary,
        sections=[
            Section(
                "The hybrid",
                [
                    Code(config["layers"]),
                    f"One letter a layer, from the input up: F sees everything, S sees "
                    f"{chosen.pattern}.",
                ],
            ),
            Section("Before and after", [comparison_table(rows)]),
        ],
        figures=figures,
        notes=[
            *chosen.notes,
            "The original model's prefill and decode times are those of transformers, with a cache "
            "that grows by copying; the hybrid's are those of LongGen's engine. `longgen bench "
            "inference` compares a hybrid with the same model all full, both in the engine.",
        ],
    )
    return page


def run(out: Path) -> Path:
    """Run the demo; returns the report's page."""
    chosen = settings()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"on {card_name(device)}; everything goes to {out}")
    base = base_checkpoint(out, chosen.original_context)
    record = extended(base, out / "hybrid", chosen, "middle")
    heldout = np.load(training_folder(out / "hybrid") / HELDOUT)
    rows = []
    for variant, path in (("original", base), ("hybrid", out / "hybrid")):
        rows += evaluated(path, variant, out / "evaluation", heldout, chosen)
    extra = {"training": {"hybrid": record["training"]}, "config": settings_anywhere(record)}
    write_results(out / "results.json", "demo", rows, command="make demo", seed=SEED, extra=extra)
    page = report(out, chosen, record, rows)
    say(f"done: {page}")
    return page


def main(work: Any = run) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for everything made")
    out = parser.parse_args().out
    return status_of(lambda: work(out))


def status_of(work: Callable[[], object]) -> int:
    """Do the work of a command; return its exit status, 2 for what the user can put right."""
    try:
        work()
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def demo_rows(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a finished demo."""
    if not (out / "results.json").is_file():
        raise UsageError(f"There is no finished demo in {out}; run `make demo` first.")
    rows: Any = read_results(out / "results.json")["rows"]
    return list(rows)


if __name__ == "__main__":
    sys.exit(main())
