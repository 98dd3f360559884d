"""The GPU catalogue, how cards are named, and the share of their peak."""

from types import SimpleNamespace

import pytest
import torch

from longgen import gpus
from longgen.errors import UsageError
from longgen.gpus import CATALOGUE, GIB, machine_gpus, mfu, parse_gpus, peak_flops


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("h100", "H100-80GB"),
        ("RTX 4090", "RTX-4090"),
    ],
)
def test_names_of_driver_and_user_find_the_card(card: str, name: str) -> None:
    assert peak_flops(card) == CATALOGUE[name].flops
    assert parse_gpus(card).gpu is CATALOGUE[name]


@pytest.mark.parametrize(
    "card",
    [
        # Other figures behind similar names.
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Tesla T4",
    ],
)
def test_other_cards_are_unknown_rather_than_guessed(card: str) -> None:
    assert peak_flops(card) is None


def test_counts_and_cards_are_read() -> None:
    group = parse_gpus("8xH200")
    assert (group.count, group.gpu.name, str(group)) == (8, "H200", "8 x H200")
    assert parse_gpus(" 2 X rtx-4090 ").count == 2
    assert parse_gpus("H100").count == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [("8xH300", "'8xH300'.*H100-80GB.*RTX-4090"), ("", "''"), ("8", "'8'"), ("0xH100", "0 cards")],
)
def test_wrong_gpus_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_gpus(text)


def test_mfu_is_flops_over_what_all_cards_could_do() -> None:
    assert mfu(1e15, 2.0, 1e15) == 0.5
    assert mfu(1e15, 2.0, 1e15, gpus=4) == 0.125


def fake_cuda(monkeypatch: pytest.MonkeyPatch, *devices: tuple[str, int]) -> None:
    cards = [SimpleNamespace(name=name, total_memory=memory) for name, memory in devices]
    monkeypatch.setattr(gpus, "_DRIVER_DEVICES", ("/",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])


def test_the_machines_cards_keep_their_real_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, *[("NVIDIA H200", 139 * GIB)] * 2)
    group = machine_gpus()
    assert group is not None and (group.count, group.gpu.name) == (2, "H200")
    assert group.gpu.memory_bytes == 139 * GIB
    assert group.gpu.flops == CATALOGUE["H200"].flops


def test_an_unknown_card_has_memory_but_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, ("NVIDIA H100 PCIe", 79 * GIB), ("Tesla T4", 15 * GIB))
    group = machine_gpus()
    assert group is not None and (group.count, group.gpu.name) == (1, "NVIDIA H100 PCIe")
    assert (group.gpu.memory_bytes, group.gpu.flops, group.gpu.bandwidth) == (79 * GIB, None, None)


def test_no_driver_or_no_device_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch)
    assert machine_gpus() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpus, "_DRIVER_DEVICES", ("/no/such/device",))
    monkeypatch.setattr(gpus.sys, "platform", "linux")
    assert machine_gpus() is None
