"""LayerPlan: which layers stay full, in every way of saying it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longgen.errors import UsageError
from longgen.pattern import SparsePattern
from longgen.plan import FULL_LAYER, SPARSE_LAYER, LayerPlan


def test_default_is_the_middle_third_rounded_up() -> None:
    assert LayerPlan.build(30).full_layers == tuple(range(10, 20))
    assert LayerPlan.build(32).full_layers == tuple(range(10, 21))
    assert LayerPlan.build(32).pattern == SparsePattern()


def test_the_papers_plan() -> None:
    plan = LayerPlan.build(32, "middle:12", SparsePattern.attention_sink())
    assert str(plan) == "S" * 10 + "F" * 12 + "S" * 10
    assert plan.pattern == SparsePattern.attention_sink()


@pytest.mark.parametrize(
    ("choice", "layers"),
    [
        ("top", "SSSSFF"),
        ("bottom", "FFSSSS"),
        ("bottom:1", "FSSSSS"),
        ("interleaved", "SFSSFS"),
        ("interleaved:3", "SFSFSF"),
        ("middle:1", "SSFSSS"),
        ("middle:6", "FFFFFF"),
        ("middle:0", "SSSSSS"),
        ("all", "FFFFFF"),
        ("none", "SSSSSS"),
        ("2-3", "SSFFSS"),
        ("0, 2,4-5", "FSFSFF"),
        ("SFSFSF", "SFSFSF"),
        ([5, 0], "FSSSSF"),
    ],
)
def test_choices(choice: str | list[int], layers: str) -> None:
    assert LayerPlan.build(6, choice).layers == layers


@given(st.integers(1, 100), st.data())
def test_named_choices_have_their_count_and_place(num_layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, num_layers))
    indices = {
        name: LayerPlan.build(num_layers, f"{name}:{count}").full_layers
        for name in ("middle", "top", "bottom", "interleaved")
    }
    assert {len(chosen) for chosen in indices.values()} == {count}
    if not count:
        return
    before, after = indices["middle"][0], num_layers - 1 - indices["middle"][-1]
    assert after - before in (0, 1)
    assert indices["top"][-1] == num_layers - 1
    assert indices["bottom"][0] == 0
    even = indices["interleaved"]
    gaps = [b - a for a, b in pairwise(even)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


@given(st.text("FS", min_size=1, max_size=90))
def test_layer_types_round_trip(layers: str) -> None:
    plan = LayerPlan(layers, SparsePattern.block_sparse())
    assert LayerPlan.from_layer_types(plan.layer_types, plan.pattern) == plan
    assert LayerPlan.build(plan.num_layers, plan.full_layers, plan.pattern) == plan
    assert set(plan.layer_types) <= {FULL_LAYER, SPARSE_LAYER}
    for index, kind in enumerate(layers):
        assert plan.pattern_of(index).is_full == (kind == "F")
        assert (index in plan.full_layers) == (kind == "F")


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("middle:7", "asks for 7 full layers; the model has only 6"),
        ("top:99", "asks for 99 full layers"),
        ("4-9", r"\[6, 7, 8, 9\] do not exist: the model has layers 0 to 5"),
        ([-1], r"\[-1\] do not exist"),
        ("5-2", "runs backwards; write 2-5"),
        ("centre", "'centre' is not understood; give middle"),
        ("1,,2", "'1,,2' is not understood"),
        ("", "'' is not understood"),
        ("FFS", "has 3 letters, the model 6 layers"),
    ],
)
def test_wrong_choices_are_named(choice: str | list[int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LayerPlan.build(6, choice)


def test_wrong_letters_and_layer_types_are_named() -> None:
    with pytest.raises(UsageError, match="'SXF'"):
        LayerPlan("SXF", SparsePattern())
    with pytest.raises(UsageError, match="sliding_attention"):
        LayerPlan.from_layer_types([FULL_LAYER, "sliding_attention"], SparsePattern())
