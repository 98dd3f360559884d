"""Ask models for what was planted in text, by kind and distance, as in practice of recall.

    python -m benchmarks.recall_probe hybrid=DIR full=DIR --text DIR --context 128K --out FILE

The needle evaluation asks one question of many texts, at the end of each; this asks some hundred
of each text, wherever they stand. `longgen.data.RecallText` plants pairs of one kind at a time in
held-out text, a model reads it once, and of each second place counts whether it gives the
number that stands there (in copies the tokens after the first few), each token after the right
ones before it. Models with the same tokenizer are asked the same.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from longgen.checkpoint import load_model, load_tokenizer, read_config
from longgen.cli.options import parse_tokens
from longgen.data import RecallText
from longgen.data.recall import Planted
from longgen.errors import UsageError
from longgen.evaluate.results import say_tokens, write_results
from longgen.evaluate.text import plain_ids
from longgen.recall_kinds import KINDS

SEED = 7
MOST_TEXTS = 7
# From here on a copied passage can be known to be one.
COPY_LEAD = 8
# Shorter numbers could be guessed; facts' values are words as well, which aren't asked for.
MIN_DIGITS = 3
# Between these distances, in sixteenths of the context, questions are counted together.
_EDGES = (0, 1, 2, 4, 8, 12, 16)

Row = dict[str, Any]


def asked(pair: Planted, ids: np.ndarray, tokenizer: Any) -> list[int]:
    """Return the positions of the tokens that a pair's second place asks for; none if it has no
    number, or its tokens hold more than the number.

    Args:
        pair: where it was planted.
        ids: the text with it, [n].
        tokenizer: spells it.
    """
    if pair.kind == "copies":
        return list(pair.second)[COPY_LEAD:]
    numbers = re.findall(r"[0-9]+", tokenizer.decode(ids[list(pair.second)]))
    if not numbers or len(numbers[-1]) < MIN_DIGITS:
        return []
    for stop in reversed(pair.second):
        for start in range(stop, pair.second.start - 1, -1):
            found = tokenizer.decode(ids[start : stop + 1]).lstrip()
            if found == numbers[-1]:
                return list(range(start, stop + 1))
            if not numbers[-1].endswith(found):
                break
    return []


@torch.no_grad()
def probe(model: Any, tokenizer: Any, texts: Sequence[Sequence[int]]) -> list[Row]:
    """Ask a model, and return a row for each question.

    Args:
        model: a causal language model, on its device.
        tokenizer: its own.
        texts: token ids of each text.

    Returns:
        Mappings of `kind`, `text` (which), `distance` (in tokens), `right` (whether all tokens
        are), `share` (of tokens that are right) and `loss` (nats a token).
    """
    rows: list[Row] = []
    for kind in KINDS:
        practice = RecallText(tokenizer, kinds=kind)
        for number, text in enumerate(texts):
            ids, pairs = practice.plant(np.array(text), np.random.default_rng((SEED, number)))
            hidden = model.model(
                torch.tensor(ids, device=model.device)[None], use_cache=False
            ).last_hidden_state[0]
            for pair in pairs:
                places = asked(pair, ids, tokenizer)
                if not places:
                    continue
                logits = model.lm_head(hidden[[i - 1 for i in places]]).float()
                targets = torch.tensor(ids[places], device=logits.device)
                hits = (logits.argmax(-1) == targets).float()
                rows.append(
                    {
                        "kind": kind,
                        "text": number,
                        "distance": pair.distance,
                        "right": bool(hits.all()),
                        "share": hits.mean().item(),
                        "loss": F.cross_entropy(logits, targets).item(),
                    }
                )
    return rows


def summarize(rows: Sequence[Row], variant: str, context: int) -> list[Row]:
    """Return results rows: of each kind, the mean and that by distance.

    A kind's `value` is the share of questions answered in every token; `token_value` that of
    tokens, which says more of copies, the passages of which are long.
    """
    edges = [context * edge // _EDGES[-1] for edge in _EDGES]
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        bins = [
            [row for row in own if low <= row["distance"] < high] for low, high in pairwise(edges)
        ]
        found.append(
            {
                "case": f"recall_{kind}.{variant}",
                "length": context,
                "unit": "share of questions",
                "value": _mean(own, "right"),
                "token_value": _mean(own, "share"),
                "loss": _mean(own, "loss"),
                "n": len(own),
                "edges": edges,
                "n_by_distance": [len(of) for of in bins],
                "by_distance": [_mean(of, "right") for of in bins],
                "token_by_distance": [_mean(of, "share") for of in bins],
            }
        )
    return found


def _mean(rows: Sequence[Row], what: str) -> float | None:
    return float(np.mean([row[what] for row in rows])) if rows else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME=DIR", help="hybrid=DIR full=DIR")
    parser.add_argument("--text", type=Path, required=True, help="held-out texts (.txt)")
    parser.add_argument("--context", default="128K", help="tokens of each text; it is cut there")
    parser.add_argument("--out", type=Path, required=True, help="results file (.json)")
    given = parser.parse_args(argv)
    try:
        rows = measure(given)
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    # Folders say nothing to others.
    names = " ".join(f"{one.partition('=')[0]}=DIR" for one in given.models)
    command = f"python -m benchmarks.recall_probe {names} --text DIR --context {given.context}"
    print(write_results(given.out, "recall", rows, command=command, seed=SEED))
    return 0


def measure(given: argparse.Namespace) -> list[Row]:
    """Return the results rows of all models.

    Raises:
        UsageError: there is no such checkpoint, or no text is long enough.
    """
    context = parse_tokens(given.context)
    prepared = {}
    # All of it before any model is measured, which may take long.
    for one in given.models:
        name, _, folder = one.partition("=")
        if not (name and folder):
            raise UsageError(f"{one} is not NAME=DIR, as in hybrid=out/hybrid.")
        if name in prepared:
            raise UsageError(f"{name} is there twice; give each model another name.")
        read_config(folder)
        tokenizer = load_tokenizer(folder)
        texts: list[list[int]] = []
        for path in sorted(given.text.glob("*.txt")):
            ids = plain_ids(path.read_text(encoding="utf-8", errors="replace"), tokenizer)
            if len(ids) >= context:
                texts.append(ids[:context])
            if len(texts) == MOST_TEXTS:
                break
        if not texts:
            raise UsageError(
                f"No text (.txt) in {given.text} has {context:,} tokens; give longer ones, or a "
                "shorter --context."
            )
        prepared[name] = folder, tokenizer, texts

    rows = []
    gpu = torch.cuda.is_available()
    for name, (folder, tokenizer, texts) in prepared.items():
        dtype = torch.bfloat16 if gpu else torch.float32
        model = load_model(folder, dtype=dtype, device="cuda" if gpu else "cpu").eval()
        found = summarize(probe(model, tokenizer, texts), name, context)
        del model
        if len(found) < len(KINDS):
            raise UsageError(
                f"In {context:,} tokens there is no room for every kind of question; give a longer "
                "--context."
            )
        for row in found:
            share = f"{row['value']:.2f} of {row['n']} answered"
            print(f"{row['case']} at {say_tokens(context)}: {share}", flush=True)
        rows += found
    return rows


if __name__ == "__main__":
    sys.exit(main())
