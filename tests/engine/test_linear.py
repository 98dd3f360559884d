"""One token's products and rotation against fp64; with Triton also through its interpreter.

Without a GPU these are the PyTorch paths, and the last test runs the file again where
TRITON_INTERPRET makes the kernels run.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longgen.engine.kernels import Places, decode_attention, store_tokens, use_triton
from longgen.engine.linear import Norm, Rotary, Seen, project, project_gated, rotate_and_attend
from tests.engine.test_kernels import bits, poisoned
from tests.interpreter import assert_passes

FP8 = torch.float8_e4m3fn
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
@pytest.mark.parametrize("heads, key_heads, dim", [(4, 4, 32), (6, 2, 20)])
@pytest.mark.parametrize("where", ["pages", "slots", "moving slots"])
def test_rotating_and_attending(
    where: str, heads: int, key_heads: int, dim: int, normed: bool, kept: object
) -> None:
    """Against rotation in fp64, `store_tokens` and `decode_attention`; a row is no sequence's."""
    torch.manual_seed(0)
    number, size = 3, 40
    dtype = kept if isinstance(kept, torch.dtype) else torch.bfloat16
    qkv = torch.randn(number, (heads + 2 * key_heads) * dim).to(dtype)
    qkv[1, :dim] = 0.0  # a query of no size, which e4m3's would be divided by
    angles = torch.randn(number, dim // 2).repeat(1, 2)
    norms = [Norm((torch.rand(dim) + 0.5).to(dtype), 0.1) for _ in range(2)] if normed else []
    rotary = Rotary(angles.cos().to(dtype), angles.sin().to(dtype), *norms)
    scales = torch.rand(2, key_heads) + 0.1 if kept == "fp8" else None
    stores = [torch.randn(7, size + 1, key_heads, dim).to(FP8 if kept == "fp8" else dtype)] * 2
    counts = torch.zeros(number, key_heads, dtype=torch.int32)
    if where == "pages":
        tables, lengths = torch.tensor([[4, 0, 3], [2, 5, 3], [6, 6, 6]]), torch.tensor([97, 41, 0])
        stores = [store[:, :size].contiguous() for store in stores]
        places = Places(torch.tensor([3, 5, 6]), torch.tensor([[96 % size], [0], [0]]))
        seen = Seen(tables, lengths=lengths)
    else:
        pages = torch.tensor([4, 0, 2])
        entries = torch.randint(size, (number, key_heads if where == "moving slots" else 1))
        entries[2] = size  # of a row that only fills the batch up
        moved = None
        if where == "moving slots":
            moved = torch.where(torch.rand(number, key_heads) < 0.5, size - 1 - entries, entries)
            moved[2] = size
        places = Places(pages, entries, moved)
        visible = torch.rand(number, entries.shape[1], size) < 0.7
        visible[:2].scatter_(2, entries[:2, :, None], True)
        visible[2] = False
        seen = Seen(pages[:, None], held=size, visible=visible, arrivals=counts)
    found = [store.clone() for store in stores]
    out = rotate_and_attend(
        *found, qkv, rotary, num_heads=heads, places=places, seen=seen, scale=0.3, scales=scales
    )
    split = qkv.view(number, -1, dim).split((heads, key_heads, key_heads), 1)
    turned = []
    for x, norm in zip(split, (rotary.q_norm, rotary.k_norm), strict=False):
        y = exact_norm(x, norm)
        half = torch.cat((-y[..., dim // 2 :], y[..., : dim // 2]), -1)
        turned.append(y * rotary.cos.double()[:, None] + half * rotary.sin.double()[:, None])
    expected = [store.clone() for store in stores]
    k = turned[1].to(dtype)
    store_tokens(*expected, k, split[2], **places._asdict(), scales=scales)
    # A row of no sequence may write to where nobody looks, or not.
    idle = (6,) if where == "pages" else (2, size)
    for store in (*found, *expected):
        store[idle] = torch.zeros((), dtype=store.dtype)
    assert torch.equal(bits(found[1]), bits(expected[1]))
    # Keys may be rounded otherwise, and only there.
    step = 0.13 if kept == "fp8" else 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(found[0].float(), expected[0].float(), rtol=step, atol=step / 2)
    if INTERPRETED and kept == torch.bfloat16:
        return  # whose products the interpreter gets wrong
    wide = torch.float32 if kept == "fp8" else torch.float64
    again = decode_attention(
        turned[0].to(wide),
        *(store[:, : seen.held].to(FP8 if kept == "fp8" else wide) for store in found),
        seen.tables,
        scale=0.3,
        lengths=seen.lengths,
        visible=seen.visible,
        scales=scales,
    )
    assert out.shape == (number, heads, dim) and out.dtype == dtype
    assert not out[2].any() and not counts.any()
    assert torch.allclose(out.double(), again.double(), atol=step, rtol=step)


def test_the_same_with_the_kernels() -> None:
    assert_passes(__file__)
