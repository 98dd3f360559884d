"""The kernels that make lists compile for Hopper on any machine that has Triton."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

triton = pytest.importorskip("triton")


def compiles(kernel: Any, num_warps: int = 4, **constants: Any) -> None:
    """Compile with pointers to int32 unless to bytes, and numbers that nothing is known about."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = inspect.signature(kernel.fn).parameters
    signature = {
        name: "constexpr" if name in constants else "*i32" if name.endswith("_ptr") else "i32"
        for name in names
    }
    if "tiles_ptr" in signature:
        signature["tiles_ptr"] = "*u8"
    source = ASTSource(kernel, signature, constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


@pytest.mark.parametrize("block", [1, 64, 1024])
def test_pack_rows_compiles(block: int) -> None:
    from longgen.attention.flash.triton_lists import _pack

    compiles(_pack, BLOCK=block)


@pytest.mark.parametrize("tile_q", [128, 192])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("fill", [False, True])
def test_forward_lists_compile(tile_q: int, strided: bool, fill: bool) -> None:
    from longgen.attention.flash.triton_lists import BLOCK, ROWS, _forward

    tiles = {"TILE_Q": tile_q, "TILE_K": 64, "STRIDED": strided}
    compiles(_forward, **tiles, FILL=fill, ROWS=ROWS, BLOCK=BLOCK)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("maps", [1, 16])
def test_backward_work_compiles(strided: bool, maps: int) -> None:
    from longgen.attention.flash import triton_work

    tiles = {"TILE_Q": 64, "TILE_K": 128, "STRIDED": strided, "BLOCK": triton_work.BLOCK}
    compiles(triton_work._backward_counts, num_warps=1, **tiles)
    compiles(triton_work._backward_scan, BLOCK=triton_work.SCAN_BLOCK)
    compiles(triton_work._backward_fill, num_warps=1, **tiles, MAPS=maps)
