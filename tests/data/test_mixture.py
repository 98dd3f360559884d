"""Mixtures: item i is a pure function of (sets, weights, seed, i), in the given proportions."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from longgen.data import RecallText, collate
from longgen.data.mixture import (
    Mixture,
    Part,
    open_mixture,
    packed_parts,
    split_weight,
)
from longgen.data.pack import PackSource, pack_sources
from longgen.data.packed import PackOptions
from longgen.data.shards import write_shard
from longgen.errors import UsageError
from longgen.train.trainer import TrainingSequences

CONTEXT = 64
SIZES = {"books": (40, 130), "web": (50, 40), "wiki": (9, 60)}


def quiet(line: str) -> None:
    """Print nothing."""


Pack = Callable[..., Path]


@pytest.fixture
def pack(tmp_path: Path, tokenizer: Any) -> Pack:
    """Return a packer of three sources whose tokens tell them apart: (weights, name, **options)."""

    def make(
        weights: Sequence[float | None] = (None, None, None), name: str = "packed", **options: Any
    ) -> Path:
        rng = np.random.default_rng(0)
        sources = []
        for number, ((source, (count, longest)), weight) in enumerate(
            zip(SIZES.items(), weights, strict=True)
        ):
            lengths = rng.integers(2, longest, count)
            folder = tmp_path / "tokens" / source
            folder.mkdir(parents=True, exist_ok=True)
            ids = 10 + 100 * number + np.arange(lengths.sum()) % 100
            (folder / "t").write_bytes(ids.astype("<u2").tobytes())
            write_shard(folder, "0", folder / "t", np.cumsum(lengths))
            chosen = PackOptions(**{"context": CONTEXT, "heldout_tokens": 50, **options})
            sources.append(
                PackSource(name=source, tokens=str(folder), options=chosen, weight=weight)
            )
        pack_sources(sources, tmp_path / name, tokenizer=tokenizer, plot=False, say=quiet)
        return tmp_path / name

    return make


def source_of(item: dict[str, torch.Tensor]) -> int:
    return (int(item["input_ids"][0]) - 10) // 100


def as_bytes(item: dict[str, torch.Tensor]) -> bytes:
    return b"".join(item[key].numpy().tobytes() for key in sorted(item))


def test_items_keep_the_proportions_in_every_prefix(pack: Pack) -> None:
    mixture = open_mixture(packed_parts([str(pack((0.5, 0.3, 0.2)))]) or [], seed=1)
    assert mixture.schedule.weights == [5, 3, 2]
    counts: Counter[int] = Counter()
    for index in range(60):
        counts[source_of(mixture[index])] += 1
        for source, share in enumerate((0.5, 0.3, 0.2)):
            assert abs(counts[source] - share * (index + 1)) < 1
    report = mixture.report(60)
    assert [one["sequences"] for one in report] == [30, 18, 12]
    assert [one["weight"] for one in report] == [0.5, 0.3, 0.2]


def test_every_epoch_of_a_set_has_each_of_its_rows_once(pack: Pack) -> None:
    mixture = open_mixture([Part(pack((0.5, 0.3, 0.2)), None)], seed=1)
    rows = [len(one) for one in mixture.sets]
    seen: dict[tuple[int, int], list[int]] = {}
    for index in range(20 * sum(rows)):
        source, row, epoch = mixture.locate(index)
        seen.setdefault((source, epoch), []).append(row)
    whole = [key for key in seen if (key[0], key[1] + 1) in seen]
    assert len(whole) > 6
    for source, epoch in whole:
        assert sorted(seen[source, epoch]) == list(range(rows[source]))
    # Another order each time.
    assert seen[0, 0] != seen[0, 1]
    first_repeat = min(i for i in range(20 * sum(rows)) if mixture.locate(i)[2] == 1)
    assert len(mixture) == first_repeat == len(list(mixture))


def test_an_item_depends_on_its_index_alone(pack: Pack, tokenizer: Any) -> None:
    folder = pack((2, 1, 1))
    recall = RecallText(tokenizer, kinds="codes")

    def opened(seed: int = 3) -> Mixture:
        parts = [Part(folder, None)]
        return open_mixture(parts, seed=seed, recall=recall, recall_share=0.5)

    whole = [as_bytes(opened()[0])]
    mixture = opened()
    whole = [as_bytes(mixture[i]) for i in range(50)]
    # Resumed in the middle, in another order, and in other processes.
    assert [as_bytes(opened()[i]) for i in (49, 7, 23)] == [whole[i] for i in (49, 7, 23)]
    resumed = opened()
    assert [as_bytes(resumed[i]) for i in range(20, 50)] == whole[20:]
    copy = pickle.loads(pickle.dumps(mixture))
    assert [as_bytes(copy[i]) for i in range(50)] == whole
    loader = DataLoader(TrainingSequences(opened(), 50), batch_size=None, num_workers=2)
    ids = [item["input_ids"].numpy().tobytes() for item in loader]
    assert ids == [mixture[i]["input_ids"].numpy().tobytes() for i in range(50)]
    assert [as_bytes(opened(4)[i]) for i in range(50)] != whole
    assert opened().fingerprint == mixture.fingerprint != opened(4).fingerprint


def test_items_treat_each_piece_as_a_document(pack: Pack) -> None:
    mixture = open_mixture([Part(pack(), None)], seed=0)
    for item in mixture:
        bounds = item["cu_seqlens"].tolist()
        assert bounds[0] == 0 and bounds[-1] == CONTEXT
        for start, end in zip(bounds, bounds[1:], strict=False):
            assert item["position_ids"][start:end].tolist() == list(range(end - start))
            assert int(item["shift_labels"][end - 1]) == -100
    assert collate([mixture[0], mixture[1]])["input_ids"].shape == (2, CONTEXT)


def test_without_weights_each_counts_by_its_rows(pack: Pack) -> None:
    folder = pack()
    mixture = open_mixture([Part(folder, None)], seed=0)
    rows = [len(one) for one in mixture.sets]
    assert len(mixture) == sum(rows)
    single = [Part(folder / name, None) for name in SIZES]
    assert open_mixture(single, seed=0).fingerprint == mixture.fingerprint


def test_weights_of_folders_share_out_their_own(pack: Pack) -> None:
    first, second = pack((0.5, 0.25, 0.25), "a"), pack((1, 1, 2), "b", seed=5)
    parts = packed_parts([f"{first}@0.8", f"{second}@0.2"])
    assert parts == [Part(first, 0.8), Part(second, 0.2)]
    mixture = open_mixture(parts, seed=0)
    assert mixture.schedule.weights == [8, 4, 4, 1, 1, 2]


def test_running_out_is_refused_or_reported(pack: Pack) -> None:
    mixture = open_mixture([Part(pack((0.1, 0.1, 0.8)), None)], seed=0)
    rows = len(mixture.sets[2])
    mixture.check_enough(len(mixture), allow_repeat=False)
    with pytest.raises(UsageError, match=rf"wiki holds {rows} and 80 are to be taken\. Give more"):
        mixture.check_enough(100, allow_repeat=False)
    mixture.check_enough(100, allow_repeat=True)
    assert mixture.report(100)[2]["epochs"] == 80 / rows > 1


def test_heldout_text_is_shared_out_by_weight_and_in_no_row(pack: Pack) -> None:
    mixture = open_mixture([Part(pack((0.5, 0.3, 0.2)), None)], seed=0)
    text = mixture.heldout(40)
    assert [int((((text - 10) // 100) == s).sum()) for s in range(3)] == [20, 12, 8]
    bare = open_mixture([Part(pack(name="bare", heldout_tokens=0), None)], seed=0)
    with pytest.raises(UsageError, match="no held-out text"):
        bare.heldout(40)


def test_sets_that_do_not_fit_together_are_refused(pack: Pack, tmp_path: Path) -> None:
    a, b = pack(name="a"), pack(name="b", context=32)
    with pytest.raises(UsageError, match=r"packed to 64 tokens, .* to 32"):
        open_mixture([Part(a, None), Part(b, None)], seed=0)
    (a / "mixture.json").write_text("{}")
    with pytest.raises(UsageError, match=r"mixture\.json is damaged"):
        open_mixture([Part(a, None)], seed=0)
    with pytest.raises(UsageError, match="seed is -1"):
        open_mixture([Part(b, None)], seed=-1)
    with pytest.raises(UsageError, match="recall share is 2"):
        open_mixture([Part(b, None)], seed=0, recall_share=2)
    with pytest.raises(IndexError):
        open_mixture([Part(b, None)], seed=0).item(-1)


def test_data_paths_are_told_apart(pack: Pack, tmp_path: Path) -> None:
    folder = pack()
    text = tmp_path / "a@0.5"
    text.mkdir()
    assert split_weight(str(text)) == (str(text), None)
    assert split_weight("x@y") == ("x@y", None)
    assert split_weight("x@0.5") == ("x", 0.5)
    assert packed_parts([str(text), "missing"]) is None
    for data, words in (
        ([f"{text}@0.5"], "has a weight"),
        ([str(folder), str(text)], "cannot be trained on together"),
        ([f"{folder}@1", str(folder)], "Some of the packed data have a weight"),
        ([f"{folder}@0"], "give a number above 0"),
        ([str(tmp_path / "tokens" / "web")], "tokens that are not packed. Run: longgen pack"),
    ):
        with pytest.raises(UsageError, match=words):
            packed_parts(data)


def test_a_recipes_path_may_begin_at_home(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pack()
    monkeypatch.setenv("HOME", str(folder.parent))
    for data, weight in ((f"~/{folder.name}", None), (f"~/{folder.name}@0.5", 0.5)):
        assert packed_parts([data]) == [Part(folder, weight)]


def test_what_cannot_be_packed_leaves_nothing(
    pack: Pack, tmp_path: Path, tokenizer: Any, build_tokenizer: Callable[..., Any]
) -> None:
    pack()
    options = PackOptions(context=CONTEXT)
    web = str(tmp_path / "tokens" / "web")
    wiki = str(tmp_path / "tokens" / "wiki")
    out = tmp_path / "out"

    def source(name: str = "web", **fields: Any) -> PackSource:
        return PackSource(**{"name": name, "tokens": web, "options": options, **fields})

    long = PackOptions(context=CONTEXT, min_length=60, heldout_tokens=0)
    for sources, known, words in (
        ([], tokenizer, "No tokens were given"),
        ([source("../x")], tokenizer, "makes no folder name"),
        ([source(), source()], tokenizer, "Several sources are named web"),
        ([source(weight=1.0), source("b")], tokenizer, "Some sources have a weight"),
        ([source(weight=0.0)], tokenizer, "weight of web is 0.0"),
        ([source()], None, "do not say which tokenizer made them"),
        ([source(tokens=wiki)], build_tokenizer(260, adds_bos=False), "has only 26|has only 25"),
        ([source(), source("b", options=long)], tokenizer, "b: Nothing is left to pack"),
        ([source(tokens=str(tmp_path / "x"))], tokenizer, "no tokenized documents"),
    ):
        with pytest.raises(UsageError, match=words):
            pack_sources(sources, out, tokenizer=known, plot=False, say=quiet)
        assert not out.exists()
