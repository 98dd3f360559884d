"""bf16 on a CPU: the engine rounds no worse than eager transformers; texts part at near-ties alone.

`tests/gpu/test_engine_gpu.py` shows the same of a GPU's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longgen.engine import kernels
from tests.engine.rounding import compare


def test_the_engine_rounds_no_worse_than_eager(
    build: Callable[..., Any], tokens: Callable[..., torch.Tensor], pattern: Any
) -> None:
    model = build(pattern=pattern)
    prompts = [tokens(n, seed=n).tolist() for n in (3, 40, 90, 21)]
    found = compare(model, prompts, 40, 16, page_size=8)
    found.check()
    assert found.num_tokens == 160 and found.num_logits == 154 + 4 * 39


def test_a_wrong_scale_is_no_rounding(
    build: Callable[..., Any],
    tokens: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = kernels._plain

    def wrong(q: Any, k: Any, v: Any, tables: Any, scale: float, *rest: Any) -> torch.Tensor:
        return real(q, k, v, tables, 1.3 * scale, *rest)

    monkeypatch.setattr(kernels, "_plain", wrong)
    prompts = [tokens(n, seed=n).tolist() for n in (40, 90)]
    found = compare(build(), prompts, 40, 16, page_size=8)
    with pytest.raises(AssertionError, match="rows of logits against fp32"):
        found.check()
