"""FlashAttention-4's kernels (extra `flash`) under sparse patterns: the fast path on Hopper."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from longgen.attention.flash.plan import Tables, documents_alone, is_plain, tables
from longgen.errors import UsageError
from longgen.layout import Axis, Layout, Run
from longgen.pattern import SparsePattern

HEAD_DIMS = (64, 80, 96, 128)
DTYPES = (torch.bfloat16, torch.float16)
# The version whose kernel classes we build on; pyproject.toml pins it too, and a test compares.
FLASH_ATTN_4 = "4.0.0b36"


@lru_cache(maxsize=1)
def _missing() -> str | None:
    """Say why the package can't be used, if so."""
    try:
        found = version("flash-attn-4")
    except PackageNotFoundError:
        return "flash-attn-4 isn't installed; pip install 'longgen[flash]'"
    if found != FLASH_ATTN_4:
        return f"flash-attn-4 is {found} but {FLASH_ATTN_4} is needed; pip install 'longgen[flash]'"
    try:
        import longgen.attention.flash.hopper  # noqa: F401
    except Exception as error:
        return f"flash-attn-4 can't be loaded: {error}"
    return None


# Compilers look through the cache, and not every release of PyTorch sees through the search.
@torch.compiler.assume_constant_result
def _missing_constant() -> str | None:
    return _missing()


@lru_cache(maxsize=8)
def _unfit(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        # AMD's are "cuda" too, and report capability 9 without being Hopper.
        maker = " of AMD" if device.type == "cuda" else ""
        return f"its kernels run on NVIDIA GPUs, the tensors are on {device}{maker}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return (
            f"its kernels are for Hopper GPUs (compute capability 9), "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
        )
    return None


def flash_obstacle(q: torch.Tensor, *, gradients: bool) -> str | None:
    """Say what keeps these kernels from running on q (B, T, H, D), or return None.

    Args:
        q: queries.
        gradients: whether a backward pass will follow.
    """
    unfit = _unfit(q.device)
    if unfit:
        return unfit
    if q.dtype not in DTYPES:
        return f"its kernels take {' or '.join(str(x) for x in DTYPES)}, the tensors are {q.dtype}"
    if q.shape[3] not in HEAD_DIMS:
        return f"its kernels take head sizes {HEAD_DIMS}, the tensors have {q.shape[3]}"
    if gradients and torch.are_deterministic_algorithms_enabled():
        return (
            "its backward pass sums in no fixed order, and deterministic algorithms are asked for"
        )
    return _missing_constant()


def flash_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pattern: SparsePattern,
    layout: Layout,
    scale: float,
    head_offset: int = 0,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of q (B, T, H, D) over k, v (B, S, Hkv, D).

    Returns:
        out (B, T, H, D) and the log-sum-exp of the scores (B, H, T) in fp32, -inf where a query
        sees nothing. Both are differentiable.

    Raises:
        UsageError: if the kernels can't do it; the message says why.
    """
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    obstacle = flash_obstacle(q, gradients=gradients)
    if obstacle:
        raise UsageError(
            f'impl="flash" can\'t run: {obstacle}. Use impl="flex", or "auto" to have one chosen.'
        )
    from longgen.attention.flash.hopper import tiles_q
    from longgen.attention.flash.ops import attend_dense, attend_listed

    # Positions in both cases below are smaller than the number of keys.
    # The package's own backward pass lays its sums out wrongly for other head sizes.
    whole = q.shape[3] % 32 == 0 or not gradients
    if whole and (pattern.is_full or pattern.covers(layout.num_keys)):
        if is_plain(layout):
            return attend_dense(q, k, v, None, scale)
        bounds = documents_alone(layout)
        if bounds is not None:
            return _documents(q, k, v, tuple(bounds), scale)
    sizes, tiles = (q.shape[0], q.shape[2], k.shape[2], head_offset), tiles_q(q.shape[3])
    if torch.compiler.is_compiling():
        # Numbers in tuples: a compiler can't hand over objects that it only imagines.
        fields = _fixed(getattr(pattern, name) for name in _FIELDS)
        queries = tuple(_fixed_axis(axis) for axis in layout.queries)
        keys = tuple(tuple(_fixed_axis(axis) for axis in row) for row in layout.keys)
        made = _constants(fields, queries, keys, *_fixed(sizes), tiles, q.device, gradients)
    else:
        made = _arguments(tables(pattern, layout, *sizes, tiles, q.device, gradients))
    lists, masks, tile_k = made
    return attend_listed(q, k, v, *lists, *masks, tile_k, scale)


_Arguments = tuple[tuple[list[torch.Tensor], ...], tuple[str, ...], int]
_Numbers = tuple[int, ...]
_FIELDS = tuple(SparsePattern.__dataclass_fields__)


def _arguments(made: Tables) -> _Arguments:
    """Return what `attend_listed` takes behind q, k and v: lists, masks, key tile."""
    masks = (made.mask, made.backward_mask, made.strided_mask)
    texts = tuple("" if mask is None else mask.encode() for mask in masks)
    return (made.forward, made.backward, made.strided), texts, made.tile_k


@torch.compiler.assume_constant_result
def _constants(
    fields: tuple[int, ...],
    queries: tuple[_Numbers, ...],
    keys: tuple[tuple[_Numbers, ...], ...],
    *args: Any,
) -> _Arguments:
    """Make tables while a graph is made, which is made anew for another pattern or layout."""
    pattern = SparsePattern(**dict(zip(_FIELDS, fields, strict=True)))
    layout = Layout(
        tuple(_axis(axis) for axis in queries),
        tuple(tuple(_axis(axis) for axis in row) for row in keys),
    )
    return _arguments(tables(pattern, layout, *args))


def _fixed(numbers: Iterable[int]) -> _Numbers:
    """Have a compiler take numbers as they are; one that changes would become a symbol."""
    return tuple([range(number).stop for number in numbers])


def _fixed_axis(axis: Axis) -> _Numbers:
    return _fixed([number for run in axis for number in run])


def _axis(numbers: _Numbers) -> Axis:
    return tuple(Run(*numbers[at : at + 3]) for at in range(0, len(numbers), 3))


def _documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: tuple[int, ...], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within documents packed into rows that may share their cumulative lengths."""
    from longgen.attention.flash.ops import attend_dense

    batch, length, heads, _ = q.shape
    flat, lse = attend_dense(
        *(x.flatten(0, 1) for x in (q, k, v)), _cumulative(bounds, batch, length, q.device), scale
    )
    return flat.view(q.shape), lse.view(heads, batch, length).transpose(0, 1)


@lru_cache(maxsize=8)
def _cumulative(
    bounds: tuple[int, ...], batch: int, length: int, device: torch.device
) -> torch.Tensor:
    with torch.inference_mode(False):
        rows = [torch.tensor(bounds)]
        if bounds[-1] != batch * length:
            rows = [rows[0][1 if row else 0 :] + row * length for row in range(batch)]
        return torch.cat(rows).to(device, torch.int32)
