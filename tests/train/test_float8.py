"""fp8 products: which layers, and where they are refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from longgen.errors import UsageError
from longgen.pattern import SparsePattern
from longgen.train.config import ExtendConfig
from longgen.train.extend import extend
from longgen.train.float8 import check_float8, use_float8
from tests.train.work import Training, make_model

RUN = Training(SparsePattern(block_size=8, sink_blocks=1, local_blocks=2), (4, 2), packed=True)


def test_a_machine_without_a_gpu_is_refused_before_anything_is_written(
    settings: Callable[..., ExtendConfig], tmp_path: Any
) -> None:
    with pytest.raises(UsageError, match=r"need an NVIDIA GPU\. Leave --fp8 out"):
        extend(settings(fp8=True), say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_gpu_without_fp8_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(UsageError, match=r"capability 8\.9 .*NVIDIA A100 has 8\.0"):
        check_float8("cuda")


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UsageError, match=r"pip install 'longgen\[fp8\]'"):
        check_float8("cuda")


def test_projections_are_turned_and_nothing_else() -> None:
    pytest.importorskip("torchao")
    plain, model = make_model(RUN).train(), make_model(RUN).train()
    names = list(model.state_dict())
    # Of each of three layers all seven; 8 x 4 heads and 48 are multiples of 16.
    assert use_float8(model, emulate=True) == 21
    assert list(model.state_dict()) == names
    assert "Float8" not in type(model.lm_head).__name__
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {"Float8Linear", "LMHead"}
    ids = torch.randint(0, 97, (1, 128), generator=torch.Generator().manual_seed(0))
    losses = []
    for one in (plain, model):
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
    # fp8 has 3 bits behind the point.
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.1)
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        # Those of norms are small sums of terms of both signs.
        if one.dim() == 2:
            cosine = torch.cosine_similarity(one.grad.flatten(), other.grad.flatten(), 0)
            # Errors add up from layer to layer; gradients of another loss would be at 0.
            assert cosine > 0.8, (name, cosine)


def test_a_model_with_odd_sides_is_refused() -> None:
    pytest.importorskip("torchao")
    model = make_model(Training(RUN.pattern, (3, 3), packed=True))
    for layer in model.model.layers:
        layer.mlp = torch.nn.Identity()
    with pytest.raises(UsageError, match="multiples of 16"):
        use_float8(model)
