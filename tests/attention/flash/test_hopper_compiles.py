"""The kernels compile for Hopper on any machine that has flash-attn-4, with or without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="flash-attn-4 isn't installed"
)

# In a process of its own: the target is read from the environment when the package is imported.
PROGRAM = """
import sys
import torch
from longgen.attention.flash import hopper
from longgen.attention.flash.plan import Mask
from longgen.pattern import SparsePattern

head_dim, group = int(sys.argv[1]), int(sys.argv[2])
pattern = SparsePattern(
    block_size=100, sink_blocks=1, local_blocks=2, stride_blocks=3, head_shift=1
)
masks = [
    Mask(pattern, group=group),
    Mask(
        pattern, only_strided=True, group=group, head_offset=2, by_places=True,
        query_rows=True, key_rows=True, key_heads=2,
    ),
]
for mask in masks:
    for tile_k in (128, 64):
        hopper._compile_forward(torch.bfloat16, head_dim, mask, tile_k, 132)
    hopper._compile_backward(torch.bfloat16, head_dim, mask)
print("compiled")
"""


@pytest.mark.parametrize(("head_dim", "group"), [(64, 3), (80, 1), (96, 8), (128, 4)])
def test_kernels_compile(tmp_path: Path, head_dim: int, group: int) -> None:
    environment = os.environ | {
        "FLASH_ATTENTION_ARCH": "sm_90",
        "CUTE_DSL_ARCH": "sm_90a",
        "FLASH_ATTENTION_NUM_SMS": "132",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(head_dim), str(group)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "compiled"
