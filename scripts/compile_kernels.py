"""Compile the flash backend's kernels that tests and benchmarks need, on a machine without a GPU.

    python scripts/compile_kernels.py --out kernels [--all-shapes] [--part 0/2]

Needs flash-attn-4 and the Python version of the machine that will use them. There, put the folder
where FLASH_ATTENTION_CUTE_DSL_CACHE_DIR points. Kernels that are there already are left alone, so
parts can run side by side and go on after an interrupt.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROCESSORS = 132  # of an H100 or H200
Key = tuple[Any, ...]


def target_hopper(folder: Path) -> None:
    """Say what to compile for, before the packages are imported that read it."""
    os.environ |= {
        "FLASH_ATTENTION_ARCH": "sm_90",
        "CUTE_DSL_ARCH": "sm_90a",
        "FLASH_ATTENTION_NUM_SMS": str(PROCESSORS),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(folder.absolute()),
    }


def listed(
    pattern: Any, layout: Any, heads: int, group: int, head_dim: int, dtype: Any, offset: int = 0
) -> Iterator[Key]:
    """Give what a call by lists compiles, forward and backward, by the keys of their caches."""
    import torch

    from longgen.attention.flash import hopper
    from longgen.attention.flash.plan import documents_alone, is_plain, tables

    is_full = pattern.is_full or pattern.covers(layout.num_keys)
    alone = is_plain(layout) or documents_alone(layout) is not None
    if is_full and alone and head_dim % 32 == 0:
        return  # the package's own kernels
    made = tables(
        *(pattern, layout, layout.num_rows, heads * group, heads, offset),
        *(hopper.tiles_q(head_dim), torch.device("cpu"), True),
    )
    yield "forward", hopper.ARCH, dtype, head_dim, made.mask, made.tile_k, PROCESSORS
    for mask in (made.backward_mask, made.strided_mask):
        if mask is not None:
            yield "backward", hopper.ARCH, dtype, head_dim, mask


def of_tests() -> Iterator[Key]:
    """Give the keys of tests/gpu/test_flash_gpu.py."""
    import torch

    from longgen.layout import Layout
    from tests.gpu import test_flash_gpu as tests

    for name, group, head_dim in tests.shapes():
        pattern = tests.PATTERNS[name]
        dtype = torch.float16 if (group, head_dim) == (3, 64) else torch.bfloat16
        for layout in tests.layouts(pattern, 2).values():
            yield from listed(pattern, layout, 2, group, head_dim, dtype)
            if dtype == torch.float16:  # tests/gpu/sanitize.py
                yield from listed(pattern, layout, 2, group, head_dim, torch.bfloat16)
    for pattern in tests.PATTERNS.values():
        for offset in (0, 5):
            yield from listed(pattern, Layout.causal(700), 4, 1, 64, torch.bfloat16, offset)
        for kind in ("plain", "packed", "left_padded"):
            layout = tests.layouts(pattern, 2)[kind]
            yield from listed(pattern, layout, 2, 2, 64, torch.bfloat16)


def of_benchmarks() -> Iterator[Key]:
    """Give the keys of `longgen bench attention` and of prompts' pieces in `bench inference`."""
    import torch

    from longgen.attention.flash import hopper
    from longgen.attention.flash.plan import Mask
    from longgen.bench.checks import gate_length, gate_shape
    from longgen.bench.work import PATTERNS, Heads
    from longgen.layout import Layout

    for shape in (Heads(), Heads(kv_heads=8), Heads(heads=9, kv_heads=3, head_dim=64)):
        for pattern in PATTERNS.values():
            small = gate_shape(pattern, shape)
            for length, heads in ((gate_length(pattern), small), (8192, shape)):
                args = heads.kv_heads, heads.group, heads.head_dim, torch.bfloat16
                yield from listed(pattern, Layout.causal(length), *args)
    for name in ("sink_2k", "sink_2k_64"):
        for group in (1, 4):
            mask = Mask(PATTERNS[name], group=group, by_places=True)
            for tile_k in (64, 128):
                yield "forward", hopper.ARCH, torch.bfloat16, 128, mask, tile_k, PROCESSORS


def package_kernels() -> None:
    """Compile flash-attn-4's own kernels of the benchmarks, on tensors that are not there."""
    import torch
    from flash_attn.cute import interface
    from torch._subclasses.fake_tensor import FakeTensorMode

    for heads, key_heads, size in ((32, 32, 128), (32, 8, 128), (9, 3, 64)):
        for window in (None, 4096):
            with FakeTensorMode():
                q, k, v, grad = (
                    torch.empty(1, 8192, h, size, dtype=torch.bfloat16, device="cuda")
                    for h in (heads, key_heads, key_heads, heads)
                )
                kind: dict[str, Any] = {"causal": True}
                if window:
                    kind = {"window_size_left": window, "window_size_right": 0}
                out, lse, *_ = interface._flash_attn_fwd(
                    q, k, v, softmax_scale=0.1, return_lse=True, **kind
                )
                interface._flash_attn_bwd(q, k, v, out, grad, lse, softmax_scale=0.1, **kind)


def main() -> None:
    """Read the arguments and compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--all-shapes", action="store_true", help="as LONGGEN_ALL_SHAPES=1 tests")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every Nth, from the Ith on")
    args = parser.parse_args()
    target_hopper(args.out)
    if args.all_shapes:
        os.environ["LONGGEN_ALL_SHAPES"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from longgen.attention.flash import hopper

    part, parts = map(int, args.part.split("/"))
    if part == 0:
        package_kernels()
    keys = list(dict.fromkeys([*of_benchmarks(), *of_tests()]))[part::parts]
    for number, (kind, *key) in enumerate(keys, start=1):
        cache = hopper._FORWARD if kind == "forward" else hopper._BACKWARD
        if tuple(key) not in cache:
            make: Any = hopper._compile_forward if kind == "forward" else hopper._compile_backward
            cache[tuple(key)] = make(*key[1:])
        print(f"{number} of {len(keys)}", end="\r", flush=True)


if __name__ == "__main__":
    main()
