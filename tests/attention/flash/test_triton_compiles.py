"""The kernel that packs lists compiles for Hopper on any machine that has Triton."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")


@pytest.mark.parametrize("block", [1, 64, 1024])
def test_pack_rows_compiles(block: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from longgen.attention.flash.triton_lists import _pack

    pointers = {"tiles_ptr": "*u8", "start_ptr": "*i32", "out_ptr": "*i32"}
    numbers = {"num_columns": "i32", "row_stride": "i32", "column_stride": "i32"}
    source = ASTSource(_pack, {**pointers, **numbers, "BLOCK": "constexpr"}, {"BLOCK": block})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
