"""One token's products and rotation against fp64; with Triton also through its interpreter.

Without a GPU these are the PyTorch paths, and the last test runs the file again where
TRITON_INTERPRET makes the kernels run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from longgen.engine.kernels import Places, store_tokens, use_triton
from longgen.engine.linear import Norm, Rotary, project, project_gated, rotate_and_store
from tests.engine.test_kernels import bits, poisoned

FP8 = torch.float8_e4m3fn
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = use_triton(torch.device("cpu"))


def exact_norm(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    x = x.double()
    if norm is None:
        return x
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def close(found: torch.Tensor, exact: torch.Tensor) -> bool:
    tolerance = 1e-5 if found.dtype == torch.float32 else 3e-2
    return torch.allclose(found.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [48, 100, 5000])
@pytest.mark.parametrize("rows", [(24,), (97,), (16, 8), (24, 8, 8), (12, 3, 5)])
def test_products(rows: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    """With and without norm, biases and residual; what lies beside is never read."""
    torch.manual_seed(0)
    x, residual = 3 * torch.randn(1, size).to(dtype), torch.randn(1, sum(rows)).to(dtype)
    weights = []
    for count in rows:
        wide = poisoned(count + 2, size, dtype=dtype)
        wide[1:-1] = torch.randn(count, size) / size**0.5
        weights.append(wide[1:-1])
    biases = [torch.randn(count).to(dtype) for count in rows]
    norm = Norm((torch.rand(size) + 0.5).to(dtype), 0.3)
    for own_norm, own_biases, own_residual in (
        (None, [None] * len(rows), None),
        (norm, biases, None),
        (None, biases, residual),
        (norm, [], residual),
    ):
        out = project(x, weights, own_biases, norm=own_norm, residual=own_residual)
        exact = exact_norm(x, own_norm) @ torch.cat([w.double() for w in weights]).T
        if own_biases and own_biases[0] is not None:
            exact += torch.cat(biases).double()
        if own_residual is not None:
            exact += residual.double()
        assert out.dtype == dtype and out.shape == (1, sum(rows))
        assert close(out, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows, size", [(24, 48), (97, 100), (4, 5000)])
def test_the_gate(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, size).to(dtype)
    gate, up = (torch.randn(2, rows, size) / size**0.5).to(dtype)
    norm = Norm((torch.rand(size) + 0.5).to(dtype), 1e-6)
    normed = exact_norm(x, norm)
    exact = F.silu(normed @ gate.double().T) * (normed @ up.double().T)
    assert close(project_gated(x, gate, up, norm=norm), exact)


@pytest.mark.parametrize("kept", ["fp8", torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("heads, key_heads, dim", [(4, 4, 8), (6, 2, 12)])
def test_rotation(heads: int, key_heads: int, dim: int, normed: bool, kept: object) -> None:
    """Queries against fp64; keys and values stored as `store_tokens` stores what is rotated."""
    torch.manual_seed(0)
    number, size = 3, 5
    dtype = kept if isinstance(kept, torch.dtype) else torch.bfloat16
    qkv = torch.randn(number, (heads + 2 * key_heads) * dim).to(dtype)
    angles = torch.randn(number, dim // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = [Norm((torch.rand(dim) + 0.5).to(dtype), 0.1) for _ in range(2)] if normed else []
    rotary = Rotary(cos, sin, *norms)
    pages = torch.tensor([4, 0, 2])
    entries = torch.randint(size - 1, (number, key_heads))
    moved = torch.where(torch.rand(number, key_heads) < 0.5, size - 1, entries)
    scales = torch.rand(2, key_heads) + 0.1 if kept == "fp8" else None
    stores = [
        poisoned(6, size, key_heads, dim, dtype=FP8 if kept == "fp8" else dtype) for _ in range(2)
    ]
    for store in stores:
        store[4] = torch.randn(size, key_heads, dim).to(store.dtype)
    for moves in (None, moved):
        places = Places(pages, entries, moves)
        found = [store.clone() for store in stores]
        q = rotate_and_store(*found, qkv, rotary, num_heads=heads, places=places, scales=scales)
        split = qkv.view(number, -1, dim).split((heads, key_heads, key_heads), 1)
        turned = []
        for x, norm in zip(split, (rotary.q_norm, rotary.k_norm), strict=False):
            y = exact_norm(x, norm)
            half = torch.cat((-y[..., dim // 2 :], y[..., : dim // 2]), -1)
            turned.append(y * cos.double()[:, None] + half * sin.double()[:, None])
        assert q.shape == (number, heads, dim) and close(q, turned[0])
        expected = [store.clone() for store in stores]
        k = turned[1].to(dtype)
        store_tokens(*expected, k, split[2], **places._asdict(), scales=scales)
        assert torch.equal(bits(found[1]), bits(expected[1]))
        a, b = (x.float() for x in (found[0], expected[0]))
        # Keys may be rounded otherwise, and only there.
        step = 0.13 if kept == "fp8" else 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(a, b, rtol=step, atol=step / 2, equal_nan=True)


@pytest.mark.skipif(not HAS_TRITON, reason="triton isn't installed")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter already")
def test_the_same_with_the_kernels() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
