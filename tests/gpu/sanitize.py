"""One small case of each kind through the kernels of a backend, for NVIDIA's checker of memory:

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.gpu.sanitize flash

Kernels should have been compiled before (`make test-gpu`): under the checker that takes an hour.
"""

from __future__ import annotations

import sys

import torch

from longgen.attention import attention
from longgen.attention.testing import random_inputs
from tests.gpu.test_flash_gpu import KEY_VALUE_HEADS, PATTERNS, layouts, shapes

KINDS = ("plain", "offset", "packed", "left_padded", "caches")


def main(impl: str) -> None:
    """Run forward and backward, each pattern with its first shape."""
    seen = set()
    for name, group, head_dim in shapes():
        if name in seen:
            continue
        seen.add(name)
        pattern = PATTERNS[name]
        for kind in KINDS:
            layout = layouts(pattern, KEY_VALUE_HEADS)[kind]
            inputs = random_inputs(
                layout.num_queries,
                layout.num_keys,
                batch=max(layout.num_rows, 1),
                heads=KEY_VALUE_HEADS * group,
                key_value_heads=KEY_VALUE_HEADS,
                head_dim=head_dim,
                dtype=torch.bfloat16,
                device="cuda",
            )
            leaves = [x.requires_grad_() for x in inputs[:3]]
            out = attention(*leaves, pattern=pattern, layout=layout, impl=impl)
            torch.autograd.grad(out, leaves, inputs.grad)
            torch.cuda.synchronize()
            print(name, kind, group, head_dim, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
