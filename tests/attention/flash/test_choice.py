"""When the backend runs and when not: each obstacle is a sentence, and "auto" names it once."""

from __future__ import annotations

import logging
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from longgen.attention import api, attention, dense, flash
from longgen.attention.flash import DTYPES, FLASH_ATTN_4, HEAD_DIMS, flash_obstacle
from longgen.attention.testing import random_inputs
from longgen.errors import UsageError
from longgen.layout import Layout
from longgen.pattern import SparsePattern

SINK = SparsePattern(block_size=16, sink_blocks=1, local_blocks=2)
FULL = SparsePattern.full()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Ask anew about cards and packages, before and after."""
    # Filling memory with NaN, as all tests here do, asks for deterministic algorithms.
    before = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    for known in (flash._missing, flash._unfit):
        known.cache_clear()
    yield
    for known in (flash._missing, flash._unfit):
        known.cache_clear()
    torch.use_deterministic_algorithms(True, warn_only=before)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a Hopper GPU and the package."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "version", lambda name: FLASH_ATTN_4)
    monkeypatch.setitem(sys.modules, "longgen.attention.flash.hopper", sys)


def tensor(
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    length: int = 100,
    heads: int = 4,
    requires_grad: bool = False,
) -> torch.Tensor:
    """Return a tensor on a GPU that need not be there."""
    with FakeTensorMode():
        x = torch.empty(1, length, heads, head_dim, dtype=dtype, device="cuda")
        return x.requires_grad_(requires_grad)


@pytest.mark.parametrize("gradients", [False, True])
def test_nothing_keeps_it_from_running(hopper: None, gradients: bool) -> None:
    for head_dim in HEAD_DIMS:
        for dtype in DTYPES:
            assert flash_obstacle(tensor(head_dim, dtype), gradients=gradients) is None


def test_cpu_is_an_obstacle() -> None:
    assert flash_obstacle(random_inputs(5).q, gradients=False) == (
        "its kernels run on NVIDIA GPUs, the tensors are on cpu"
    )


@pytest.mark.parametrize(("capability", "digits"), [((8, 0), "8.0"), ((10, 3), "10.3")])
def test_another_card_is_an_obstacle(
    hopper: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], digits: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Other")
    assert flash_obstacle(tensor(), gradients=False) == (
        "its kernels are for Hopper GPUs (compute capability 9), NVIDIA Other has " + digits
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_are_an_obstacle(hopper: None, dtype: torch.dtype) -> None:
    assert flash_obstacle(tensor(dtype=dtype), gradients=False) == (
        f"its kernels take torch.bfloat16 or torch.float16, the tensors are {dtype}"
    )


@pytest.mark.parametrize("head_dim", [8, 72, 192, 256])
def test_other_head_sizes_are_an_obstacle(hopper: None, head_dim: int) -> None:
    assert flash_obstacle(tensor(head_dim), gradients=False) == (
        f"its kernels take head sizes (64, 80, 96, 128), the tensors have {head_dim}"
    )


def test_deterministic_algorithms_are_an_obstacle_to_training(hopper: None) -> None:
    torch.use_deterministic_algorithms(True)
    assert flash_obstacle(tensor(), gradients=False) is None
    assert flash_obstacle(tensor(), gradients=True) == (
        "its backward pass sums in no fixed order, and deterministic algorithms are asked for"
    )


def test_a_missing_package_is_an_obstacle(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(flash, "version", missing)
    assert flash_obstacle(tensor(), gradients=False) == (
        "flash-attn-4 isn't installed; pip install 'longgen[flash]'"
    )


def test_another_version_is_an_obstacle(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "version", lambda name: "4.0.0b1")
    assert flash_obstacle(tensor(), gradients=False) == (
        f"flash-attn-4 is 4.0.0b1 but {FLASH_ATTN_4} is needed; pip install 'longgen[flash]'"
    )


def test_a_broken_package_is_an_obstacle(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "longgen.attention.flash.hopper", None)
    found = flash_obstacle(tensor(), gradients=False)
    assert found is not None and found.startswith("flash-attn-4 can't be loaded: import of longgen")


def test_the_pinned_version_is_the_one_asked_for() -> None:
    root = Path(flash.__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (pinned,) = (
        re.fullmatch(r"flash-attn-4(?:\[\w+\])?==(\S+)", requirement)
        for requirement in project["optional-dependencies"]["flash"]
        if requirement.startswith("flash-attn-4")
    )
    assert pinned is not None and pinned[1] == FLASH_ATTN_4


@pytest.mark.parametrize("pattern", [None, SINK])
def test_flash_on_cpu_is_refused(pattern: SparsePattern | None) -> None:
    with pytest.raises(UsageError) as error:
        attention(*random_inputs(50)[:3], pattern=pattern, impl="flash")
    assert str(error.value) == (
        'impl="flash" can\'t run: its kernels run on NVIDIA GPUs, the tensors are on cpu. '
        'Use impl="flex", or "auto" to have one chosen.'
    )


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Let implementations do nothing but give their names."""
    names: list[str] = []

    def stub(name: str) -> Any:
        def run(q: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            names.append(name)
            return q, q

        return run

    for name in api._MASKED:
        monkeypatch.setitem(api._MASKED, name, stub(name))
    monkeypatch.setattr(api, "dense_attention", lambda q, *_, **__: (names.append("dense"), q)[1])
    monkeypatch.setattr(api, "_announced", set())
    caplog.set_level(logging.INFO, logger="longgen.attention.api")
    return names


CAUSAL = Layout.causal(100)


@pytest.mark.parametrize(
    ("pattern", "layout", "choice"),
    [
        (FULL, CAUSAL, "flash"),
        (FULL, Layout.packed([0, 30, 100]), "flash"),
        (FULL, Layout.causal(100, 300), "flash"),
        (SINK, CAUSAL, "flash"),
        (SINK, Layout.packed([0, 30, 100]), "flash"),
        # One query that sees every key, and chunks too short for a kernel.
        (FULL, Layout.causal(1, 300), "dense"),
        (FULL, Layout.causal(16), "dense"),
        (FULL, Layout.causal(17), "flash"),
        (SINK, Layout.causal(1, 300), "blocked"),
        (SINK, Layout.causal(16, 300), "blocked"),
        (SINK, Layout.causal(17, 300), "flash"),
    ],
)
@pytest.mark.parametrize("return_lse", [False, True])
def test_auto_takes_it_where_it_can(
    hopper: None,
    chosen: list[str],
    pattern: SparsePattern,
    layout: Layout,
    choice: str,
    return_lse: bool,
) -> None:
    q, k = tensor(length=layout.num_queries), tensor(length=layout.num_keys, heads=2)
    attention(q, k, k, pattern=pattern, layout=layout, return_lse=return_lse)
    # PyTorch's own kernels keep the log-sum-exp to themselves.
    assert chosen == ["flex" if choice == "dense" and return_lse else choice]


@pytest.mark.parametrize(("pattern", "choice"), [(FULL, "dense"), (SINK, "flex")])
def test_auto_names_the_obstacle_once(
    hopper: None,
    chosen: list[str],
    caplog: pytest.LogCaptureFixture,
    pattern: SparsePattern,
    choice: str,
) -> None:
    q, k = tensor(72), tensor(72, heads=2)
    for _ in range(3):
        attention(q, k, k, pattern=pattern)
    assert chosen == [choice] * 3
    assert caplog.messages == [
        f"attention ({pattern}) on cuda: {'dense_causal' if choice == 'dense' else choice} "
        "(not flash: its kernels take head sizes (64, 80, 96, 128), the tensors have 72)"
    ]


@pytest.mark.parametrize(("head_dim", "choice"), [(8, "blocked"), (16, "flex")])
@pytest.mark.parametrize("return_lse", [False, True])
def test_small_heads_are_not_left_to_flex(
    hopper: None, chosen: list[str], head_dim: int, choice: str, return_lse: bool
) -> None:
    q, k = tensor(head_dim), tensor(head_dim, heads=2)
    attention(q, k, k, pattern=SINK, return_lse=return_lse)
    assert chosen == [choice]


def test_flex_refuses_small_heads() -> None:
    q, k = tensor(8), tensor(8, heads=2)
    with pytest.raises(UsageError, match="heads of at least 16 on a GPU, the tensors have 8; use"):
        attention(q, k, k, pattern=SINK, impl="flex")


def test_fp64_is_not_left_to_kernels_that_sum_in_fp32(
    hopper: None, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = tensor(dtype=torch.float64), tensor(dtype=torch.float64, heads=2)
    attention(q, k, k, pattern=SINK)
    attention(q, k, k)
    assert chosen == ["blocked", "dense"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Hopper")
    backends = dense._backends.__wrapped__(torch.device("cuda", 0), torch.float64, True)
    assert backends == (SDPBackend.MATH,)


def test_auto_says_that_it_took_it(
    hopper: None, chosen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    q, k = tensor(), tensor(heads=2)
    for _ in range(2):
        attention(q, k, k, pattern=SINK)
    assert caplog.messages == [f"attention ({SINK}) on cuda: flash"]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_auto_asks_about_gradients(hopper: None, chosen: list[str], which: int) -> None:
    torch.use_deterministic_algorithms(True)
    qkv = [tensor(heads=heads, requires_grad=i == which) for i, heads in enumerate((4, 2, 2))]
    attention(*qkv, pattern=SINK)
    with torch.no_grad():
        attention(*qkv, pattern=SINK)
    assert chosen == ["flex", "flash"]
