"""Parts of keys fill a GPU, and are not a few more than it runs at a time."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from longgen.engine.splits import FEW_KEYS, MOST_SPLITS, SPLIT_KEYS, WHOLE_KEYS, choose_splits

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
MEASURED = RESULTS / "2026-11-25_nvidia-h100_decode-splits.json"
PROCESSORS = 132


def programs_of(dtype: str, group: int) -> int:
    """As `triton_decode` has them for many keys; it can't be loaded without Triton."""
    return 9 if dtype == "fp8" else 4 if group > 1 else 8


def test_what_is_chosen_was_as_fast_as_the_best() -> None:
    """Within 2 % for 131,072 keys, at every batch that was measured."""
    rates: dict[tuple[str, int, int], dict[int, float]] = defaultdict(dict)
    for row in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]:
        group, pairs = row["heads"] // row["kv_heads"], row["batch"] * row["kv_heads"]
        rates[row["dtype"], group, pairs][row["parts"]] = row["value"]
    assert len(rates) == 16
    for (dtype, group, pairs), found in rates.items():
        programs = programs_of(dtype, group)
        parts = choose_splits(pairs, 131072, programs=programs, processors=PROCESSORS)
        assert found[parts] >= 0.98 * max(found.values()), (dtype, group, pairs, parts)


def test_little_of_a_gpu_waits() -> None:
    """In the last round, wherever keys are cut; pairs that aren't can be just more than fit."""
    for programs in (4, 8, 9):
        for pairs in range(1, 4 * programs * PROCESSORS):
            parts = choose_splits(pairs, 1 << 20, programs=programs, processors=PROCESSORS)
            assert 1 <= parts <= MOST_SPLITS
            rounds = parts * pairs / (programs * PROCESSORS)
            if parts < MOST_SPLITS:
                filled = rounds / -(-rounds // 1)
                assert filled > (0.75 if parts > 1 else 0.66), (programs, pairs, parts)


def test_few_keys_are_cut_into_few_parts() -> None:
    for pairs in (1, 8, 300):
        for keys in (1, WHOLE_KEYS):
            assert choose_splits(pairs, keys, programs=4, processors=PROCESSORS) == 1
        for keys in (WHOLE_KEYS + 1, 2112, FEW_KEYS, FEW_KEYS + 1):
            parts = choose_splits(pairs, keys, programs=4, processors=PROCESSORS)
            assert (parts - 1) * SPLIT_KEYS < keys
