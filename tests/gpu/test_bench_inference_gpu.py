"""The inference benchmark on a GPU: captured graphs, peak memory, and what fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from longgen.bench.inference import InferenceBench
from longgen.bench.inference_settings import TINY, InferenceSettings, quick_settings
from longgen.bench.models import random_model, shape_config
from longgen.pattern import SparsePattern
from longgen.plan import LayerPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SHAPE = replace(TINY, hidden_size=256, head_dim=64, num_hidden_layers=4)


@pytest.mark.parametrize("stride", [0, 4])
def test_every_row_has_a_figure(stride: int) -> None:
    pattern = SparsePattern(
        block_size=64, sink_blocks=1, local_blocks=4, stride_blocks=stride, head_shift=stride // 4
    )
    settings = quick_settings(
        InferenceSettings(
            name="small",
            shape=SHAPE,
            plan=LayerPlan("SFFS", pattern),
            lengths=(2048, 4096),
            device=torch.device("cuda"),
            batches=(1, 3),
            variants=("hybrid", "hybrid_fp8", "full", "transformers"),
            prefill_chunk=1024,
            decode_tokens=4,
        )
    )
    settings = replace(settings, seconds=None)

    def load() -> Any:
        config = shape_config(SHAPE, settings.context)
        return random_model(config, dtype=torch.bfloat16, device=settings.device, seed=0)

    bench = InferenceBench(settings, load)
    rows = bench.run()
    assert [row for row in rows if row.get("error")] == [] and not bench.skipped
    assert len(rows) == 2 * (3 * 5 + 4)
    for row in rows:
        assert row["value"] > 0
        if row["case"].startswith("prefill."):
            # Some activations, and no more than of all tokens at once.
            assert 0 < row["peak_bytes"] < 2**30
        if row["case"].startswith("kv_bytes."):
            assert row["max_sequences"] > 3
    for model in bench._models.values():
        assert all(parameter.is_cuda for parameter in model.parameters())
