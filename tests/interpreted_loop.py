"""A loop whose end is known at run time, which not every pair of Triton and NumPy can interpret:

TRITON_INTERPRET=1 python -m tests.interpreted_loop
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _sum(out, count):
    total = 0
    for step in range(0, count):
        total += step
    tl.store(out, total)


if __name__ == "__main__":
    found = torch.zeros(1, dtype=torch.int32)
    _sum[(1,)](found, 5)
    assert found.item() == 10
