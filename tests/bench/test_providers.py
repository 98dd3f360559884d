import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from longgen.attention import attention
from longgen.attention.testing import random_inputs
from longgen.bench import peers
from longgen.bench.providers import CannotDo, choose, default_providers, registry
from longgen.bench.work import PATTERNS, Heads, Work
from longgen.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PEERS = {"sdpa_flash", "sdpa_cudnn", "fa4", "fa4_window", "fsa"}


def half_work(name: str) -> Work:
    return Work(
        name=name,
        pattern=PATTERNS[name],
        length=8192,
        shape=Heads(heads=4, kv_heads=2, head_dim=64),
        dtype=torch.bfloat16,
    )


def test_own_providers_come_first_and_all_are_named() -> None:
    names = list(registry())
    assert names[0] == "ours" and {"flash", "flex", "blocked", "reference"} <= set(names)
    assert set(names) >= PEERS
    assert set(default_providers(CUDA, quick=False)) >= PEERS | {"ours", "flash", "flex"}
    assert "reference" not in default_providers(CUDA, quick=False)
    # What compiles for long is not for a minute.
    assert not {"flex", "fsa"} & set(default_providers(CUDA, quick=True))
    assert default_providers(CPU, quick=True) == ("ours", "blocked", "reference")


def test_unknown_providers_are_named() -> None:
    with pytest.raises(UsageError, match="'fa5'; choose from ours"):
        choose(["ours", "fa5"])
    assert [p.name for p in choose(["flex", "ours", "flex"])] == ["flex", "ours"]


def test_own_provider_is_attention_with_that_implementation(work: Work) -> None:
    inputs = random_inputs(work.length, heads=4, key_value_heads=2, head_dim=16)
    for name, impl in (("ours", "auto"), ("reference", "reference")):
        job = registry()[name].make(work)
        expected = attention(*inputs[:3], pattern=work.pattern, impl=impl)
        assert job.sees == work.pattern
        assert torch.equal(job.attend(*inputs[:3]), expected)


def test_an_implementation_that_is_not_there_gives_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from longgen.bench import providers

    monkeypatch.setattr(providers, "IMPLEMENTATIONS", ("auto", "flex"))
    reason = registry()["flash"].missing(CPU)
    assert reason and "no attention implementation 'flash'" in reason


@pytest.mark.parametrize("name", sorted(PEERS))
def test_peers_say_why_they_are_not_there(name: str) -> None:
    reason = registry()[name].missing(CPU)
    assert reason and reason.endswith(".")
    assert "NVIDIA GPU" in reason


@pytest.mark.parametrize("name", ["fa4", "fa4_window"])
def test_the_version_that_longgen_needs_is_recommended(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one would run as a peer and keep the flash backend from running."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = registry()[name].missing(CUDA)
    assert reason == "flash-attn-4 is not installed; run: pip install 'longgen[flash]'."


def test_peers_refuse_what_they_cannot_do() -> None:
    known = registry()
    for name, pattern, reason in (
        ("sdpa_flash", "sink", "no sparse patterns"),
        ("sdpa_cudnn", "strided", "no sparse patterns"),
        ("fa4", "sink", "no sparse patterns"),
        ("fa4_window", "full", "patterns with a window"),
        ("fa4_window", "strided", "no strided blocks"),
        ("fsa", "strided_2k", "no strided blocks"),
    ):
        with pytest.raises(CannotDo, match=reason):
            known[name].make(half_work(pattern))
    for name in ("sdpa_flash", "sdpa_cudnn", "fa4", "fsa"):
        with pytest.raises(CannotDo, match="bf16 and fp16 only"):
            known[name].make(replace(half_work("full"), dtype=torch.float32))


def test_sdpa_is_held_to_its_backend() -> None:
    """On a CPU there is no flash kernel of CUDA's kind and no cuDNN: it must not go elsewhere."""
    q, k, v, _ = random_inputs(8, heads=4, key_value_heads=2, head_dim=64, dtype=torch.bfloat16)
    attend = registry()["sdpa_cudnn"].make(half_work("full")).attend
    with pytest.raises(RuntimeError, match=r"[Nn]o (available|viable) "):
        attend(q, k, v)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for the packages of the peers; return what they are called with."""
    found: list[dict[str, Any]] = []

    def fa4(q: Any, k: Any, v: Any, **options: Any) -> Any:
        found.append(options)
        return q, None

    def fsa(q: Any, k: Any, v: Any, **options: Any) -> Any:
        found.append({**options, "stubbed": "triton_kernels" in sys.modules})
        return q

    def store(**fields: Any) -> None:
        found.append(fields)

    modules = {
        "flash_attn.cute": {"flash_attn_func": fa4},
        "flash_sparse_attn.ops.triton.interface": {"flash_dense_attn_func": fsa},
        "flash_sparse_attn.ops.triton.launch_template": {"store_launch_config": store},
    }
    for name, fields in modules.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(
                sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i]))
            )
        module = types.ModuleType(name)
        for key, value in fields.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    peers._fsa.cache_clear()
    monkeypatch.setenv(peers._FSA_FOLDER, "unused")
    return found


def test_fa4_is_called_as_its_interface_has_it(calls: list[dict[str, Any]]) -> None:
    inputs = random_inputs(8, heads=4, key_value_heads=2, head_dim=64)
    full = registry()["fa4"].make(half_work("full"))
    assert full.attend(*inputs[:3]) is inputs.q  # the output alone, not the logarithms
    window = registry()["fa4_window"].make(half_work("sink"))
    window.attend(*inputs[:3])
    assert calls == [{"causal": True}, {"causal": True, "window_size": (4095, 0)}]
    assert window.sees.visible_pairs(8192) == sum(min(i + 1, 4096) for i in range(8192))
    assert window.note and "no sink" in window.note and full.note is None


def test_fsa_gets_windows_and_a_configuration(calls: list[dict[str, Any]]) -> None:
    inputs = random_inputs(8, heads=4, key_value_heads=2, head_dim=64)
    job = registry()["fsa"].make(half_work("sink"))
    job.attend(*inputs[:3])
    job.attend(*inputs[:3])
    forward, backward, *attends = calls
    assert (forward["kernel_name"], backward["kernel_name"]) == ("fwd_dense", "bwd_dense")
    assert forward["seqlen_q"] == forward["seqlen_k"] == 8192
    assert (forward["tile_k"], forward["is_local"], forward["qhead_per_kvhead"]) == (64, True, 2)
    assert len(attends) == 2
    assert attends[0]["window_sizes"].tolist() == [[128, 4096, 0, 0]] * 2
    assert attends[0]["window_sizes"].dtype == torch.int32
    assert attends[0]["is_causal"] and not attends[0]["stubbed"]
    full = registry()["fsa"].make(half_work("full"))
    full.attend(*inputs[:3])
    assert calls[-1]["window_sizes"] is None
    assert job.note and "slides by token" in job.note
    assert job.sees.sink_blocks == 128 and job.sees.block_size == 1


def test_the_fastest_configuration_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[int] = []
    cost = {1: 5.0, 2: 3.0, 3: 9.0}

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, end: object) -> float:
            return cost[stored[-1]]

    def call() -> None:
        if stored[-1] == 3:
            raise RuntimeError("out of shared memory")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    peers._fastest([(1,), (2,), (3,)], lambda config: stored.append(config[0]), call)
    assert stored == [1, 2, 3, 2]
    with pytest.raises(RuntimeError, match="shared memory"):
        peers._fastest([(3,)], lambda config: stored.append(config[0]), call)
