"""Mix packed sets by weight into one endless stream of training sequences."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from longgen.data.packed import PACKED_FILE, PackedSet
from longgen.data.packing import check_recall, plant, row_of
from longgen.data.recall import RecallText
from longgen.data.schedule import Schedule
from longgen.data.shards import is_tokenized
from longgen.errors import UsageError

MIXTURE_FILE = "mixture.json"  # lists the sets in the folders beside it
MIXTURE_FORMAT = 1
_ORDER = 3  # numbers apart the random streams of one seed


class Mixture(Dataset[dict[str, torch.Tensor]]):
    """Serve sequences of packed sets; item i is a pure function of (sets, weights, seed, i).

    `Schedule` says which set item i comes from, so that weights count sequences, and so tokens
    and padding, in every prefix. Each set is gone through in another seeded order in every epoch of
    its own. A set that runs out begins anew, by itself: the proportions never change.

    Items are what `PackedDataset` describes. Iteration goes through `len(self)` items, the most of
    which none is from a set's second epoch; any i >= 0 can be asked for.
    """

    def __init__(
        self,
        sets: Sequence[PackedSet],
        weights: Sequence[float],
        *,
        seed: int,
        recall: RecallText | None = None,
        recall_share: float = 0.0,
    ) -> None:
        """Mix packed sets.

        Args:
            sets: of one context length and one tokenizer.
            weights: of each, above 0, in any unit.
            seed: at least 0.
            recall, recall_share: as `PackedDataset` takes them.

        Raises:
            UsageError: a value out of its range, or sets that do not fit together.
        """
        assert len(sets) == len(weights)
        if seed < 0:
            raise UsageError(f"The seed is {seed}, but must be at least 0.")
        check_recall(recall, recall_share)
        self.schedule = Schedule(weights)
        for one in sets[1:]:
            if one.context != sets[0].context:
                raise UsageError(
                    f"{sets[0].folder} is packed to {sets[0].context:,} tokens, {one.folder} to "
                    f"{one.context:,}. Pack them to one length."
                )
            first, other = sets[0].info["tokenizer"], one.info["tokenizer"]
            if first["fingerprint"] != other["fingerprint"]:
                raise UsageError(
                    f"{sets[0].folder} was tokenized with {first['name']!r}, {one.folder} with "
                    f"{other['name']!r}. Tokenize them with the same one."
                )
        self.sets = tuple(sets)
        self.context = sets[0].context
        self.seed = seed
        self.recall = recall
        self.recall_share = recall_share
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        """Return how many items there are before a set has to begin anew."""
        low, high = 0, sum(len(one) for one in self.sets)
        while low < high:
            middle = (low + high + 1) // 2
            counts = self.schedule.counts(middle)
            if all(n <= len(one) for n, one in zip(counts, self.sets, strict=True)):
                low = middle
            else:
                high = middle - 1
        return low

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self.item(i) for i in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.item(index)

    def locate(self, index: int) -> tuple[int, int, int]:
        """Return which set item `index` is from, which of its rows it is, and in which epoch.

        Raises:
            IndexError: the index is below 0.
        """
        index = operator.index(index)
        if index < 0:
            raise IndexError(f"item {index}: items are counted from 0 on")
        source, number = self.schedule.place(index)
        epoch, place = divmod(number, len(self.sets[source]))
        if self._orders.get(source, (-1,))[0] != epoch:
            rng = np.random.default_rng((self.seed, _ORDER, source, epoch))
            self._orders[source] = (epoch, rng.permutation(len(self.sets[source])))
        return source, int(self._orders[source][1][place]), epoch

    def item(self, index: int) -> dict[str, torch.Tensor]:
        """Return item `index` (see `PackedDataset` for its tensors).

        Raises:
            IndexError: the index is below 0.
        """
        source, row, _ = self.locate(index)
        ids, bounds = self.sets[source].row(row)
        plant(ids, bounds, index, self)
        return row_of(ids, bounds, self.context)

    def report(self, num: int) -> list[dict[str, Any]]:
        """Say what the first `num` items take of each set.

        Returns:
            For each set: name, folder, weight (adding up to 1), rows taken, rows there are, epochs,
            tokens and padding_rate of its rows, and its fingerprint.
        """
        return [
            {
                "name": one.name,
                "folder": str(one.folder),
                "weight": weight / self.schedule.period,
                "sequences": taken,
                "rows": len(one),
                "epochs": taken / len(one),
                "packed_tokens": one.info["report"]["packed_tokens"],
                "padding_rate": one.info["report"]["padding_rate"],
                "fingerprint": one.fingerprint,
            }
            for one, weight, taken in zip(
                self.sets, self.schedule.weights, self.schedule.counts(num), strict=True
            )
        ]

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the items, recall text apart."""
        facts = [[one.fingerprint for one in self.sets], self.schedule.weights, self.seed]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def check_enough(self, num_sequences: int, *, allow_repeat: bool) -> None:
        """Refuse a run that asks for more of a set than there is.

        Args:
            num_sequences: items that the run will take.
            allow_repeat: whether rows may be taken more than once.

        Raises:
            UsageError: there is too little data, with the numbers of each set that runs out.
        """
        if allow_repeat:
            return
        out = [
            f"{one['name']} holds {one['rows']:,} and {one['sequences']:,} are to be taken"
            for one in self.report(num_sequences)
            if one["sequences"] > one["rows"]
        ]
        if out:
            raise UsageError(
                f"There is too little data: for {num_sequences:,} sequences of {self.context:,} "
                f"tokens in these proportions, {'; '.join(out)}. Give more data, take fewer steps "
                "or other weights, or allow the data to be repeated (--allow-repeat)."
            )

    def heldout(self, tokens: int) -> np.ndarray:
        """Return about so many held-out tokens, of each set by its weight, as far as there are.

        Raises:
            UsageError: no set holds any.
        """
        parts = [
            one.heldout(max(tokens * weight // self.schedule.period, 1))
            for one, weight in zip(self.sets, self.schedule.weights, strict=True)
        ]
        text = np.concatenate(parts)
        if not len(text):
            raise UsageError(
                "The packed data hold no held-out text, which `longgen evaluate` needs. Pack at "
                "least one source with --heldout-tokens above 0."
            )
        return text


@dataclass(frozen=True, slots=True)
class Part:
    """Name a folder of packed data and its weight in a mixture, None if it was given none."""

    folder: Path
    weight: float | None


def split_weight(text: str) -> tuple[str, float | None]:
    """Split "PATH@WEIGHT"; without a number after an @, or if there is such a path, it is all path.

    Raises:
        UsageError: the weight is not above 0.
    """
    path, at, number = text.rpartition("@")
    if not at or os.path.exists(text):
        return text, None
    try:
        weight = float(number)
    except ValueError:
        return text, None
    if not 0 < weight < float("inf"):
        raise UsageError(f"The weight in {text!r} is {number}; give a number above 0.")
    return path, weight


def packed_parts(data: Sequence[str]) -> list[Part] | None:
    """Tell packed data from text: None if the paths are of text, the parts of a mixture if not.

    Raises:
        UsageError: text and packed data together, weights for some or for text, or tokens that
            are not packed.
    """
    # A recipe's paths have not been through a shell.
    given = [(os.path.expanduser(path), weight) for path, weight in map(split_weight, data)]
    packed = [_is_packed(path) for path, _ in given]
    for path, weight in given:
        if is_tokenized(path):
            raise UsageError(
                f"{path} holds tokens that are not packed. Run: longgen pack {path} --context "
                "TOKENS --out DIR, and give that DIR."
            )
        if weight is not None and not _is_packed(path):
            raise UsageError(
                f"{path!r} has a weight ({weight}), but is not packed data, which alone can be "
                "mixed by weight. Run `longgen tokenize` and `longgen pack` first, or leave the "
                "weight out."
            )
    if not any(packed):
        return None
    if not all(packed):
        raise UsageError(
            f"{given[packed.index(False)][0]} is not packed data, {given[packed.index(True)][0]} "
            "is; they cannot be trained on together. Tokenize and pack both, or give one kind."
        )
    parts = [Part(Path(path), weight) for path, weight in given]
    if len({part.weight is None for part in parts}) > 1:
        raise UsageError(
            "Some of the packed data have a weight and some have none. Give all of them one, as "
            "DIR@0.3, or none: then each counts by its size."
        )
    return parts


def _is_packed(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in (PACKED_FILE, MIXTURE_FILE))


def open_mixture(
    parts: Sequence[Part],
    *,
    seed: int,
    recall: RecallText | None = None,
    recall_share: float = 0.0,
) -> Mixture:
    """Open packed sets and folders of them as one mixture.

    A part without a weight counts by its rows. Inside a folder of sets its own weights hold, those
    that `longgen pack` was given.

    Raises:
        UsageError: something is damaged, or does not fit together.
    """
    sets: list[PackedSet] = []
    weights: list[float] = []
    for part in parts:
        if (part.folder / PACKED_FILE).is_file():
            found, inner = [PackedSet(part.folder)], [1.0]
        else:
            found, inner = _open_folder(part.folder)
        sets += found
        whole = sum(len(one) for one in found) if part.weight is None else part.weight
        # Alone, weights stay as they are written, which keeps them exact.
        factor = 1.0 if len(parts) == 1 else whole / sum(inner)
        weights += [weight * factor for weight in inner]
    return Mixture(sets, weights, seed=seed, recall=recall, recall_share=recall_share)


def _open_folder(folder: Path) -> tuple[list[PackedSet], list[float]]:
    path = folder / MIXTURE_FILE
    try:
        listing = json.loads(path.read_text(encoding="utf-8"))
        if listing["format"] != MIXTURE_FORMAT:
            raise ValueError(f"format {listing['format']}, this version reads {MIXTURE_FORMAT}")
        entries = [(str(entry["name"]), entry["weight"]) for entry in listing["sources"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}). Pack the data again.") from error
    sets = [PackedSet(folder / name) for name, _ in entries]
    return sets, [
        float(len(one) if weight is None else weight)
        for one, (_, weight) in zip(sets, entries, strict=True)
    ]
