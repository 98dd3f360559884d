"""Keys and values that lie in pages: storing one token a sequence, attending with one query.

Bound by memory and by launches: on NVIDIA GPUs Triton kernels store a token's key and value at once
and split each sequence's keys over programs; elsewhere plain PyTorch does it.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


class Places(NamedTuple):
    """Hold where one token of each of N sequences goes, as `store_tokens` takes it."""

    pages: torch.Tensor
    entries: torch.Tensor
    moved: torch.Tensor | None = None


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    scale: float,
    lengths: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Attend with one query a sequence.

    Args:
        q: (N, H, D).
        keys: (pages, P, Hkv, D); H is a multiple of Hkv.
        values: (pages, P, Hkv, D).
        block_tables: each sequence's pages in order, (N, most), integers, rows without gaps. A
            slot is a sequence's only page.
        scale: factor on the scores.
        lengths: keys of each sequence, from its first page on, (N,); None if `visible` says all.
            From Hopper on these and `block_tables` are read before the kernel ahead is done: it
            must not be the one that writes them.
        visible: bool (N, heads, most * P) with heads 1 or Hkv: keys that are seen.
        scales: factors (2, Hkv) that turn stored keys and values into what was meant; None where
            they are the same.
        arrivals: zeros (N, Hkv), int32, that are zeros again afterwards: with them the last of a
            few parts puts all together, and one launch is enough. Not for two streams at a time.
        num_splits: parts that a sequence's keys are cut into; None chooses.

    Returns:
        (N, H, D) in q's dtype. A query that sees nothing gives zeros.
    """
    if use_triton(q.device):
        from longgen.engine.triton_decode import paged_decode

        return paged_decode(
            q,
            keys,
            values,
            block_tables,
            scale,
            lengths,
            visible,
            num_splits,
            scales=scales,
            arrivals=arrivals,
        )
    return _plain(q, keys, values, block_tables, scale, lengths, visible, scales)


def store_tokens(
    keys: torch.Tensor,
    values: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pages: torch.Tensor,
    entries: torch.Tensor,
    moved: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> None:
    """Store one token a sequence.

    Args:
        keys: (pages, P, Hkv, D), written to.
        values: (pages, P, Hkv, D), written to.
        k: new keys (N, Hkv, D), in the dtype of `keys` if there are no `scales`.
        v: new values (N, Hkv, D).
        pages: the page of each sequence, (N,), integers.
        entries: where in it the new token goes, (N, heads) with heads 1 or Hkv, integers.
        moved: where the token goes that stood there, like `entries`; the same entry where it is
            dropped. None drops all.
        scales: factors (2, Hkv) of an e4m3 cache: what is stored is the new number divided by them,
            clamped and rounded (`EngineCache.encode`). None stores k and v as they are.
    """
    if use_triton(keys.device):
        from longgen.engine.triton_store import paged_store

        return paged_store(keys, values, k, v, pages, entries, moved, scales)
    heads = torch.arange(keys.shape[2], device=keys.device)[None]
    places = pages[:, None], entries.expand(-1, keys.shape[2]), heads
    largest = torch.finfo(keys.dtype).max
    for index, (store, new) in enumerate(((keys, k), (values, v))):
        if scales is not None:
            # Beyond the range PyTorch's conversion gives NaN on some devices.
            new = (new / scales[index][:, None]).clamp(-largest, largest).to(store.dtype)
        if moved is not None:
            store[pages[:, None], moved.expand(-1, keys.shape[2]), heads] = store[places]
        store[places] = new


def use_triton(device: torch.device) -> bool:
    """Whether the Triton kernels can run: on NVIDIA GPUs, or under Triton's interpreter."""
    return HAS_TRITON and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: Triton's launches, graphs and new events go there, wherever
    tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def overlaps_launches(device: torch.device) -> bool:
    """Whether kernels can be launched while the one ahead still runs, to wait for it themselves
    (programmatic dependent launch): on NVIDIA GPUs from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device, overlaps: bool | None) -> dict[str, Any]:
    """Return the options of a kernel's launch that say whether it may begin before the one ahead is
    done; `overlaps` None asks the device."""
    overlaps = overlaps_launches(device) if overlaps is None else overlaps
    return {"OVERLAPS": True, "launch_pdl": True} if overlaps else {"OVERLAPS": False}


def _plain(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    lengths: torch.Tensor | None,
    visible: torch.Tensor | None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    number, num_heads, _ = q.shape
    num_key_heads = keys.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x[block_tables.long()].flatten(1, 2).to(dtype) for x in (keys, values))
    if scales is not None:
        k, v = k * scales[0][:, None], v * scales[1][:, None]
    mask: Any = torch.ones(1, 1, k.shape[1], dtype=torch.bool, device=q.device)
    if lengths is not None:
        mask = mask & (torch.arange(k.shape[1], device=q.device) < lengths[:, None, None])
    if visible is not None:
        mask = mask & visible
    grouped = q.to(dtype).view(number, num_key_heads, num_heads // num_key_heads, -1)
    scores = torch.einsum("nhgd,nshd->nhgs", grouped, k) * scale
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    # Other sequences' pages stand there too, and what is no number would be none times nothing.
    v = v.masked_fill(~mask.transpose(1, 2)[..., None], 0.0)
    seen = mask.any(-1)[:, :, None, None]
    weights = torch.softmax(scores.masked_fill(~seen, 0.0), -1) * seen
    return torch.einsum("nhgs,nshd->nhgd", weights, v).reshape(q.shape).to(q.dtype)
