"""Other people's kernels as providers: PyTorch's SDPA, FlashAttention-4, flash-sparse-attn."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longgen.attention.testing import Attend, Inputs
from longgen.bench.providers import CannotDo, Job, Provider
from longgen.bench.work import Work, token_window

FA4_MODULE = "flash_attn.cute"
FSA_MODULE = "flash_sparse_attn.ops.triton.interface"
# Where flash-sparse-attn keeps the launch configurations that it has tuned.
_FSA_FOLDER = "FLASH_SPARSE_ATTENTION_LAUNCH_CONFIG_DIR"
# (query tile, key tile, warps, stages, CTAs). Its own search tries 36 and 54 for every length, each
# compiled first, which takes longer than the rest of the benchmark.
_FSA_FORWARD = ((128, 128, 8, 2, 1), (128, 64, 8, 3, 1), (128, 64, 4, 3, 1), (64, 64, 4, 3, 1))
_FSA_BACKWARD = ((64, 128, 8, 2, 1), (64, 128, 8, 1, 1), (128, 128, 8, 1, 1), (64, 64, 4, 2, 1))


def _only_full(work: Work, name: str) -> None:
    if not work.pattern.is_full:
        raise CannotDo(f"{name} has no sparse patterns; it computes the full one only.")


def _needs_half(work: Work, name: str) -> None:
    if work.dtype not in (torch.bfloat16, torch.float16):
        raise CannotDo(f"{name} computes in bf16 and fp16 only, not in {work.dtype}.")


def _sdpa(name: str, label: str, title: str, backend: SDPBackend) -> Provider:
    """Return PyTorch's scaled dot product attention held to one backend: it runs that or raises."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                qh, kh, vh, is_causal=True, enable_gqa=qh.shape[1] != kh.shape[1]
            )
        return out.transpose(1, 2)

    def make(work: Work) -> Job:
        _only_full(work, title)
        _needs_half(work, title)
        return Job(attend=attend, sees=work.pattern)

    def missing(device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"{title} needs an NVIDIA GPU."

    return Provider(name=name, label=label, make=make, missing=missing)


def _no_module(
    probe: str, package: str, install: str | None = None
) -> Callable[[torch.device], str | None]:
    """Return a check that there is a GPU for a package's kernels, and its module `probe`; `install`
    is what pip is to be given if not the package itself."""

    def missing(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"{package} needs an NVIDIA GPU."
        try:
            found = importlib.util.find_spec(probe)
        except (ImportError, ValueError):
            found = None
        if found is None:
            return f"{package} is not installed; run: pip install {install or package}."
        return None

    return missing


def _fa4(**options: Any) -> Attend:
    try:
        function = importlib.import_module(FA4_MODULE).flash_attn_func
    except Exception as error:
        raise CannotDo(f"flash-attn-4 cannot be imported: {error}.") from error

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = function(q, k, v, causal=True, **options)
        # The output, and the logarithms of the softmax's sums.
        out: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return out

    return attend


def _fa4_full(work: Work) -> Job:
    _only_full(work, "Dense FlashAttention-4")
    _needs_half(work, "FlashAttention-4")
    return Job(attend=_fa4(), sees=work.pattern)


def _fa4_window(work: Work) -> Job:
    if work.pattern.is_full:
        raise CannotDo("It is measured on patterns with a window; the full pattern is fa4's.")
    if work.pattern.stride_blocks:
        raise CannotDo("window_size of FlashAttention-4 has no strided blocks.")
    _needs_half(work, "FlashAttention-4")
    sees = token_window(work.pattern, sink=False)
    window = sees.local_blocks
    return Job(
        attend=_fa4(window_size=(window - 1, 0)),
        sees=sees,
        note=f"a window of {window:,} tokens that slides by token; no sink",
    )


@cache
def _fsa() -> Any:
    """Import flash-sparse-attn's interface, with its launch configurations in a folder of ours."""
    if _FSA_FOLDER not in os.environ:
        # Otherwise it writes into its own package.
        os.environ[_FSA_FOLDER] = tempfile.mkdtemp(prefix="longgen-bench-")
        atexit.register(shutil.rmtree, os.environ[_FSA_FOLDER], ignore_errors=True)
    stubs: dict[str, types.ModuleType] = {}
    if importlib.util.find_spec("triton_kernels") is None:
        # Imported at the top, for fused projections that are not used here. Only the names are
        # needed; they are taken away again, lest another library believe that it is installed.
        stubs = {
            name: types.ModuleType(name)
            for name in ("triton_kernels", "triton_kernels.matmul_ogs", "triton_kernels.numerics")
        }
        for name in ("matmul_ogs", "PrecisionConfig", "FlexCtx"):
            setattr(stubs["triton_kernels.matmul_ogs"], name, None)
        for name in ("InFlexData", "OutFlexData"):
            setattr(stubs["triton_kernels.numerics"], name, None)
        sys.modules.update(stubs)
    try:
        return importlib.import_module(FSA_MODULE)
    except Exception as error:
        raise CannotDo(f"flash-sparse-attn cannot be imported: {error}.") from error
    finally:
        for name in stubs:
            sys.modules.pop(name, None)


@lru_cache(maxsize=16)
def _fsa_windows(sink: int, window: int, kv_heads: int, device: torch.device) -> torch.Tensor:
    """Return window_sizes (Hkv, 4): tokens of the sink, of a far band, of a gap, and next to the
    query.

    The band right next to the query is the same window as a near one of that size, and its inner
    tiles run without a mask.
    """
    return torch.tensor([[sink, window, 0, 0]] * kv_heads, dtype=torch.int32, device=device)


def _store_fsa(work: Work, kernel: str, device: torch.device, config: Sequence[int]) -> None:
    """Make flash-sparse-attn launch one of its kernels with a configuration."""
    launch = importlib.import_module("flash_sparse_attn.ops.triton.launch_template")
    launch.store_launch_config(
        device=device,
        kernel_name=kernel,
        seqlen_q=work.length,
        seqlen_k=work.length,
        tile_k=max(1 << (work.shape.head_dim - 1).bit_length(), 16),
        config=tuple(config),
        is_local=not work.pattern.is_full,
        qhead_per_kvhead=work.shape.group,
        is_causal=True,
    )


def _fastest(
    configs: Sequence[Sequence[int]],
    store: Callable[[Sequence[int]], None],
    call: Callable[[], Any],
) -> None:
    """Leave the configuration stored whose call is fastest; those that do not launch are passed
    over."""
    times: list[tuple[float, Sequence[int]]] = []
    errors: list[Exception] = []
    for config in configs:
        store(config)
        try:
            call()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            call()
            end.record()
            end.synchronize()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # too much shared memory, or a compiler's refusal
            errors.append(error)
        else:
            times.append((start.elapsed_time(end), config))
    if not times:
        raise errors[-1]
    store(min(times)[1])


def _fsa_job(work: Work) -> Job:
    pattern = work.pattern
    if pattern.stride_blocks:
        raise CannotDo("flash-sparse-attn's windows have no strided blocks.")
    _needs_half(work, "flash-sparse-attn")
    sees = pattern if pattern.is_full else token_window(pattern, sink=True)
    function = _fsa().flash_dense_attn_func
    started: set[torch.device] = set()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.device not in started:
            # Before the first call, which would start its own search otherwise.
            started.add(q.device)
            _store_fsa(work, "fwd_dense", q.device, _FSA_FORWARD[2])
            _store_fsa(work, "bwd_dense", q.device, _FSA_BACKWARD[1])
        windows = None
        if not sees.is_full:
            windows = _fsa_windows(sees.sink_blocks, sees.local_blocks, k.shape[2], q.device)
        out: torch.Tensor = function(q, k, v, is_causal=True, window_sizes=windows)
        return out

    def tune(work: Work, inputs: Inputs, directions: Sequence[str]) -> None:
        device = inputs.q.device
        started.add(device)

        def forward() -> None:
            with torch.no_grad():
                attend(*inputs[:3])

        _fastest(_FSA_FORWARD, lambda c: _store_fsa(work, "fwd_dense", device, c), forward)
        if "backward" not in directions:
            return
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        out = attend(*leaves)

        def backward() -> None:
            torch.autograd.grad(out, leaves, inputs.grad, retain_graph=True)

        _fastest(_FSA_BACKWARD, lambda c: _store_fsa(work, "bwd_dense", device, c), backward)

    note = "launch configuration: the best of 4 a direction"
    if not sees.is_full:
        note = (
            f"{sees.sink_blocks:,} sink tokens and a window of {sees.local_blocks:,} tokens that "
            f"slides by token; {note}"
        )
    return Job(attend=attend, sees=sees, note=note, tune=tune)


_no_fa4 = _no_module(FA4_MODULE, "flash-attn-4", "'longgen[flash]'")

PEERS = (
    _sdpa(
        "sdpa_flash",
        "SDPA flash",
        "PyTorch's flash backend",
        SDPBackend.FLASH_ATTENTION,
    ),
    _sdpa(
        "sdpa_cudnn",
        "SDPA cuDNN",
        "PyTorch's cuDNN backend",
        SDPBackend.CUDNN_ATTENTION,
    ),
    Provider(
        name="fa4",
        label="FlashAttention-4",
        make=_fa4_full,
        missing=_no_fa4,
        package="flash-attn-4",
    ),
    Provider(
        name="fa4_window",
        label="FlashAttention-4 window",
        make=_fa4_window,
        missing=_no_fa4,
        package="flash-attn-4",
    ),
    Provider(
        name="fsa",
        label="flash-sparse-attn",
        make=_fsa_job,
        missing=_no_module("flash_sparse_attn", "flash-sparse-attn"),
        package="flash-sparse-attn",
    ),
)
