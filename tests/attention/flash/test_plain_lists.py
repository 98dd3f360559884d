"""Lists that Triton makes of plain layouts are those that PyTorch makes, entry by entry.

The closed form of the tiles is written down twice, in `tile_lists` for all layouts and in Triton:
this binds the second to the first, which test_lists.py holds to the dense mask.
"""

from __future__ import annotations

import pytest
import torch

from longgen.attention.flash.plan import _by_triton
from longgen.layout import Layout
from tests.interpreter import interpreted

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("layout", "device", "expected"),
    [
        (Layout.causal(50), GPU, True),
        (Layout.causal(50, 80), GPU, True),
        (Layout.packed([0, 20, 50]), GPU, False),
        (Layout.causal(50), CPU, False),
    ],
)
def test_plain_lists_on_gpus_are_triton(
    layout: Layout, device: torch.device, expected: bool
) -> None:
    assert _by_triton(layout, device) is expected


# In a process of its own: Triton reads when it is imported whether to interpret kernels.
PROGRAM = """
import random

import torch

from longgen.attention.flash import plan, triton_lists, triton_work
from longgen.layout import Layout
from longgen.pattern import SparsePattern

torch.set_num_threads(1)
# Whatever is not written shows.
torch.use_deterministic_algorithms(True)
draw = random.Random(0)


def sparse(block_size, sink_blocks, local_blocks, stride_blocks=0, head_shift=0):
    return SparsePattern(
        block_size=block_size,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        stride_blocks=stride_blocks,
        head_shift=head_shift,
    )


def any_pattern():
    stride = draw.choice((0, 0, 1, 2, 3, 7, 100))
    return sparse(
        draw.choice((1, 16, 64, 64, 100, 128, 128, 192, 256, 5000)),
        draw.choice((0, 1, 2, 50)),
        draw.choice((1, 1, 2, 3, 9)),
        stride,
        draw.randrange(2 * stride) if stride else 0,
    )


def any_layout():
    length = draw.choice((1, 127, 128, 384, draw.randrange(1, 640), draw.randrange(1, 640)))
    return Layout.causal(length, length + draw.choice((0, 64, 128, 300, draw.randrange(1, 400))))


# Long enough to outgrow the patterns, with tiles that far more queries see than others.
CASES = [
    *((SparsePattern.full(), Layout.causal(n, m)) for n, m in ((1200, 1200), (500, 777))),
    (sparse(64, 1, 2), Layout.causal(1300)),
    (sparse(128, 1, 1), Layout.causal(1100, 1228)),
    (sparse(100, 3, 3), Layout.causal(1250)),
    (sparse(16, 0, 1, 1), Layout.causal(500)),
    (sparse(128, 0, 2, 4, 1), Layout.causal(1280)),
    (sparse(64, 1, 1, 5, 2), Layout.causal(900, 1000)),
    *((any_pattern(), any_layout()) for _ in range(16)),
]
for case, (pattern, layout) in enumerate(CASES):
    # Mostly few enough to go round every loop more than once.
    triton_lists.BLOCK, triton_work.BLOCK = draw.choice((4, 8, 128)), draw.choice((4, 8, 128))
    triton_lists.ROWS, triton_work.SCAN_BLOCK = draw.choice((2, 4, 8)), draw.choice((4, 8))
    key_value_heads = draw.choice((1, 2, 2, 3, 4))
    tiles_q = draw.choice(((128, 64), (192, 64), (192, 128)))
    sizes = (draw.choice((1, 1, 2)), key_value_heads * draw.choice((1, 1, 2)))
    given = (
        *(pattern, layout, *sizes, key_value_heads, draw.choice((0, 0, 1, 6, 1000))),
        *(tiles_q, torch.device("cpu"), draw.random() < 0.9),
    )
    made = []
    for by_triton in (False, True):
        plan._by_triton = lambda layout, device, by_triton=by_triton: by_triton
        plan.tables.cache_clear()
        made.append(plan.tables(*given))
    for name, expected, actual in zip(made[0]._fields, *made):
        where = f"case {case}: {given}: {name}"
        if not isinstance(expected, list):
            assert expected == actual, where
            continue
        assert len(expected) == len(actual), where
        for i, (x, y) in enumerate(zip(expected, actual)):
            assert x.dtype == y.dtype and y.is_contiguous(), (where, i)
            assert torch.equal(x, y), (where, i, x, y)
print("equal")
"""


def test_triton_makes_what_pytorch_does() -> None:
    done = interpreted("-c", PROGRAM)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "equal"
