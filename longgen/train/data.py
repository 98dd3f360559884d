"""Packed data in a run: opened and checked before it begins, and the same when it is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longgen.checkpoint import write_json
from longgen.data.mixture import Mixture, open_mixture, packed_parts
from longgen.data.recall import RecallText
from longgen.errors import UsageError
from longgen.train.config import ExtendConfig
from longgen.train.trainer import Say

DATA = "data.json"


def recall_text(config: ExtendConfig, tokenizer: Any) -> RecallText | None:
    """Return the recall text that a run plants, None if it plants none."""
    if not config.recall_share:
        return None
    return RecallText(
        tokenizer, records_per_sequence=config.recall_records, kinds=config.recall_kinds
    )


def mixture_of(config: ExtendConfig, tokenizer: Any, recall: RecallText | None) -> Mixture | None:
    """Open the packed sets that `config.data` names, None if it names text.

    Raises:
        UsageError: they are damaged, of another length or tokenizer, or do not fit together; or
            options for text were given with them.
    """
    parts = packed_parts(config.data)
    if parts is None:
        return None
    default = {"join_folders": False, "text_field": "text", "strict": False}
    given = [name for name, value in default.items() if getattr(config, name) != value]
    if given:
        raise UsageError(
            f"{', '.join(given)} tells how to read text, but the data are packed already. Leave "
            "it out, or give it to `longgen tokenize`."
        )
    mixture = open_mixture(
        parts,
        seed=config.seed,
        recall=recall,
        recall_share=config.recall_share,
    )
    if mixture.context != config.context:
        raise UsageError(
            f"{parts[0].folder} is packed to sequences of {mixture.context:,} tokens, but the "
            f"context is {config.context:,}. Pack the tokens again with --context "
            f"{config.context}, or extend to {mixture.context}."
        )
    mixture.sets[0].check_tokenizer(tokenizer)
    return mixture


def remember_data(folder: Path, mixture: Mixture, resume: bool) -> None:
    """Write down which data a run is on, or check that a resumed one is still on them.

    Args:
        folder: of the run's files.
        mixture: its data.
        resume: check, if there is something to check.

    Raises:
        UsageError: the data are others.
    """
    path = folder / DATA
    if resume and path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["fingerprint"] != mixture.fingerprint:
            known = {one["fingerprint"] for one in earlier["sets"]}
            changed = [str(one.folder) for one in mixture.sets if one.fingerprint not in known]
            raise UsageError(
                "The packed data have changed since the run began"
                + (f" ({', '.join(changed)})" if changed else "")
                + ", so that it would not go on with the same sequences. Put the earlier ones "
                "back, or begin another run."
            )
        return
    sets = [{"folder": str(one.folder), "fingerprint": one.fingerprint} for one in mixture.sets]
    write_json(path, {"fingerprint": mixture.fingerprint, "sets": sets})


def say_mixture(mixture: Mixture, config: ExtendConfig, heldout: int, say: Say) -> None:
    """Say what a run takes of each set, and which begin anew."""
    report = mixture.report(config.num_sequences)
    say(
        f"{config.num_sequences:,} sequences of {config.context:,} tokens of {len(report)} packed "
        f"set{'s' if len(report) > 1 else ''}; {heldout:,} tokens held out"
    )
    for one in report:
        times = f", {one['epochs']:.2f} times over" if one["epochs"] > 1 else ""
        say(
            f"  {one['name']}: {one['weight']:.1%}, {one['sequences']:,} sequences of "
            f"{one['rows']:,}{times}, {one['padding_rate']:.1%} padding"
        )
