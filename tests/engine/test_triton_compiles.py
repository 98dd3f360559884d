"""The kernels of decoding compile for Hopper on any machine that has Triton."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.engine.test_splits import programs_of

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


def compile_(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> Any:
    """Compile a kernel for sm_90: all that is neither a pointer nor a constant is a whole number,
    but for the scale and what a norm adds."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    for name in kernel.arg_names:
        number = "fp32" if name in ("scale_log2", "eps") else "i32"
        signature[name] = "constexpr" if name in constants else pointers.get(name, number)
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


def early(ptx: str) -> list[str]:
    """Return what a kernel does with memory before it waits for the one ahead: each waits, once,
    and only then lets the next begin."""
    before, wait, after = ptx.partition("griddepcontrol.wait")
    assert wait and "griddepcontrol" not in before
    assert after.count("griddepcontrol") == after.count("griddepcontrol.launch_dependents") == 1
    until, _, _ = after.partition("griddepcontrol.launch_dependents")
    accesses = ("ld.global", "st.global", "atom.", "red.", "cp.async")
    assert not any(name in until for name in accesses)
    return [line for line in before.splitlines() if any(name in line for name in accesses)]


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("kept", ["bf16", "u8"])
def test_storing_compiles(kept: str, moves: bool) -> None:
    from longgen.engine.triton_store import _store

    pointers = {"k_ptr": "*bf16", "v_ptr": "*bf16", "scales_ptr": "*fp32", "page_ptr": "*i64"}
    pointers |= {"keys_ptr": f"*{kept}", "values_ptr": f"*{kept}"}
    pointers |= {"entry_ptr": "*i64", "moved_ptr": "*i64"}
    scaled = kept == "u8"
    constants = {"HEAD_DIM": 96, "DIM_TILE": 128, "HAS_MOVED": moves, "HAS_SCALES": scaled}
    compile_(_store, pointers, constants)


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("kept", ["bf16", "u8"])
def test_rotating_compiles(kept: str, moves: bool) -> None:
    from longgen.engine.triton_store import _rotate_and_store

    kernel = _rotate_and_store
    pointers = {name: "*bf16" for name in kernel.arg_names if name.endswith("_ptr")}
    pointers |= {"keys_ptr": f"*{kept}", "values_ptr": f"*{kept}", "scales_ptr": "*fp32"}
    pointers |= {"page_ptr": "*i64", "entry_ptr": "*i64", "moved_ptr": "*i64"}
    shape = {"GROUP": 3, "HEAD_DIM": 96, "DIM_TILE": 128, "OVERLAPS": True}
    features = {"HAS_NORM": moves, "HAS_MOVED": moves, "HAS_SCALES": kept == "u8"}
    assert not early(compile_(kernel, pointers, shape | features).asm["ptx"])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("overlaps", [False, True])
def test_products_compile(overlaps: bool, gated: bool) -> None:
    """Where kernels overlap, the first weights are read before the wait, and nothing else is."""
    from longgen.engine.triton_linear import GATED_TUNING, TUNING, _project

    tuning = GATED_TUNING if gated else TUNING
    pointers = {name: "*bf16" for name in _project.arg_names if name.endswith("_ptr")}
    ptx = compile_(
        _project,
        pointers,
        {
            "K": 11008,
            "WEIGHTS": 1 if gated else 3,
            "GATED": gated,
            "HAS_NORM": True,
            "HAS_BIAS": not gated,
            "HAS_RESIDUAL": not gated,
            "ROWS": tuning.rows,
            "BLOCK": tuning.block,
            "OVERLAPS": overlaps,
        },
    ).asm["ptx"]
    if overlaps:
        loads = early(ptx)
        assert loads and all("ld.global" in line and "evict_first" in line for line in loads)
    else:
        assert "griddepcontrol" not in ptx


@pytest.mark.parametrize("splits", ["one", "few", "many"])
@pytest.mark.parametrize("kept", ["bf16", "fp8e4nv"])
@pytest.mark.parametrize("new", ["", "rotated", "rotated and normed"])
def test_attending_compiles(new: str, kept: str, splits: str) -> None:
    from longgen.engine.triton_decode import _part, _together

    pointers = {"q_ptr": "*bf16", "k_ptr": f"*{kept}", "v_ptr": f"*{kept}", "table_ptr": "*i64"}
    pointers |= {"length_ptr": "*i64", "visible_ptr": "*i1", "scales_ptr": "*fp32"}
    pointers |= {"out_ptr": "*fp32", "stats_ptr": "*fp32", "result_ptr": "*bf16"}
    scaled = kept == "fp8e4nv"
    pointers |= {"entry_ptr": "*i64"}
    for name in ("cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr"):
        pointers[name] = "*bf16"
    shape = {"GROUP": 4, "HEAD_DIM": 128, "DIM_TILE": 128, "SPLIT_TILE": 16}
    pages = splits == "many"
    pointers |= {"table_ptr": "*i32"} if pages else {}
    kernel = compile_(
        _part,
        pointers | {"arrivals_ptr": "*i32"},
        shape
        | {
            "GROUP_TILE": 16,
            "MEMBERS": 4,
            "JOIN_TILE": 16,
            "BLOCK": 64,
            "ONE_PAGE": not pages,
            "EVEN_PAGES": scaled,
            "HAS_LENGTHS": pages,
            "HAS_VISIBLE": not pages,
            "HAS_SCALES": scaled,
            "WHOLE": splits == "one",
            "JOINS": splits == "few",
            "HAS_NEW": bool(new),
            "HAS_NORM": "normed" in new,
            "PAIRS": scaled,
            "AHEAD": 128 if new else 0,
            "OVERLAPS": bool(new),
        },
    )
    both = [kernel]
    if pages:
        features = {"HAS_SCALES": scaled, "OVERLAPS": bool(new)}
        both.append(compile_(_together, pointers, shape | features))
    if new:
        # A slot's number, or a length and pages; keys go to the second-level cache alone.
        loads, *others = (early(one.asm["ptx"]) for one in both)
        fetches = [line for line in loads if "cp.async.bulk.prefetch.L2" in line]
        assert len(fetches) == 2 and 3 <= len(loads) <= 4
        assert loads[-2:] == fetches and not any(others)


def test_programs_are_those_that_were_measured() -> None:
    from longgen.engine.triton_decode import ALONE, EIGHT_BITS, SHARED

    assert (ALONE.programs, SHARED.programs) == (programs_of("bf16", 1), programs_of("bf16", 4))
    assert EIGHT_BITS.programs == programs_of("fp8", 1) == programs_of("fp8", 4)
