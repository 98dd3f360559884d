"""What a model's layers keep for the backward pass, and where it is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longgen.pattern import SparsePattern
from longgen.train import recompute
from longgen.train.recompute import set_recompute, to_host
from tests.train.work import Sequences, Training, make_model

RUN = Training(SparsePattern(block_size=8, sink_blocks=1, local_blocks=2), (4, 2), packed=True)
KINDS = [
    ("full", False),
    ("full", True),
    ("selective", False),
    ("selective", True),
    ("elementwise", False),
]


def gradients(mode: str, offload: bool, smallest_bytes: int = 0) -> list[torch.Tensor]:
    """Return the gradients of one packed sequence."""
    model = make_model(RUN).train()
    set_recompute(model, mode, offload=offload, smallest_bytes=smallest_bytes)
    item = {key: value[None] for key, value in Sequences(True).item(0).items()}
    model(**item, use_cache=False).loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(("mode", "offload"), KINDS)
def test_gradients_are_the_same_bits(mode: str, offload: bool) -> None:
    for one, other in zip(gradients("off", False), gradients(mode, offload), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("mode", "offload"), KINDS)
def test_what_goes_to_the_host(mode: str, offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's input, and with "selective" each attention's output; small ones stay."""
    moved: list[torch.Size] = []
    move = to_host

    def watched(tensor: torch.Tensor, *, smallest_bytes: int) -> Any:
        if tensor.is_floating_point() and tensor.nbytes >= smallest_bytes:
            moved.append(tensor.shape)
        return move(tensor, smallest_bytes=smallest_bytes)

    monkeypatch.setattr(recompute, "to_host", watched)
    gradients(mode, offload, smallest_bytes=128 * 32 * 4)
    inputs = moved.count(torch.Size([1, 128, 32]))
    outputs = moved.count(torch.Size([1, 128, 4, 8]))
    assert inputs == (3 if offload else 0)
    assert outputs == (3 if offload and mode == "selective" else 0)


def test_what_went_to_the_host_comes_back_as_it_was() -> None:
    tensor = torch.randn(3, 5, 7).transpose(0, 2)
    back = to_host(tensor, smallest_bytes=0)
    expected = tensor.clone()
    tensor.zero_()
    assert torch.equal(back(), expected) and back().stride() == tensor.stride()
    # Block lists are shared by all layers; they stay.
    numbers = torch.arange(5)
    assert to_host(numbers, smallest_bytes=0)() is numbers
    assert to_host(expected, smallest_bytes=expected.nbytes + 1)() is expected
