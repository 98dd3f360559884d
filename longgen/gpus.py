"""What GPUs can do: datasheet figures by name, choices such as 8xH100, and the share of a peak."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass

from longgen.errors import UsageError

GIB = 1 << 30

_DRIVER_DEVICES = ("/dev/nvidiactl", "/dev/dxg")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Describe one GPU.

    Attributes:
        name: short name, as `--gpus` takes it.
        memory_bytes: memory of the card in bytes.
        flops: peak of dense bf16 matrix products with fp32 sums, in FLOP/s; None if not known.
        bandwidth: peak memory bandwidth in bytes per second; None if not known.
    """

    name: str
    memory_bytes: int
    flops: float | None = None
    bandwidth: float | None = None


@dataclass(frozen=True, slots=True)
class GpuGroup:
    """Hold `count` equal GPUs of one machine or job."""

    count: int
    gpu: Gpu

    def __str__(self) -> str:
        return f"{self.count} x {self.gpu.name}"


def _datasheet(name: str, memory: int, teraflops: float, terabytes: float) -> Gpu:
    """Build an entry: what datasheets call GB of memory is GiB, their TB/s are decimal."""
    return Gpu(
        name=name,
        memory_bytes=memory * GIB,
        flops=teraflops * 1e12,
        bandwidth=terabytes * 1e12,
    )


# NVIDIA's datasheet figures of the SXM (or only) versions, dense: real cards reach less, and show
# programs a little less memory.
CATALOGUE: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _datasheet("H100-80GB", 80, 989.4, 3.35),
        _datasheet("H200", 141, 989.4, 4.8),
        _datasheet("B200", 180, 2250.0, 8.0),
        _datasheet("A100-40GB", 40, 312.0, 1.555),
        _datasheet("A100-80GB", 80, 312.0, 2.039),
        _datasheet("L40S", 48, 362.05, 0.864),
        _datasheet("RTX-4090", 24, 165.2, 1.008),
    )
}

# Other spellings, and the names that the driver reports, in `_key`'s form. Listed one by one: a
# PCIe, NVL, laptop or partitioned (MIG) card has a similar name and other figures.
_ALIASES = {
    "h100": "H100-80GB",
    "h100-80gb-hbm3": "H100-80GB",
    "a100": "A100-80GB",
    "a100-sxm4-40gb": "A100-40GB",
    "a100-pcie-40gb": "A100-40GB",
    "a100-sxm4-80gb": "A100-80GB",
    "a100-80gb-pcie": "A100-80GB",
    "4090": "RTX-4090",
    "rtx4090": "RTX-4090",
}


def _key(name: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return words.removeprefix("nvidia-").removeprefix("geforce-")


_BY_KEY = {_key(name): gpu for name, gpu in CATALOGUE.items()} | {
    alias: CATALOGUE[name] for alias, name in _ALIASES.items()
}


def find_gpu(card_name: str) -> Gpu | None:
    """Return the catalogue's entry for a card, by its name there or the driver's, or None."""
    return _BY_KEY.get(_key(card_name))


def peak_flops(card_name: str) -> float | None:
    """Return a card's datasheet peak for dense bf16 in FLOP/s, or None if it is not known.

    `card_name` is what `torch.cuda.get_device_name()` reports, or a name of the catalogue.
    """
    gpu = find_gpu(card_name)
    return gpu.flops if gpu else None


def mfu(model_flops: float, seconds: float, peak: float, gpus: int = 1) -> float:
    """Return the model FLOPs utilisation: the FLOPs done over what the cards could have done.

    Args:
        model_flops: FLOPs that the model needs (`training_flops` of what was trained on), without
            recompute.
        seconds: wall-clock time.
        peak: peak of one card in FLOP/s (`peak_flops`).
        gpus: number of cards.
    """
    return model_flops / (seconds * peak * gpus)


def parse_gpus(text: str) -> GpuGroup:
    """Read a choice such as "8xH100", "H200" or "2 x RTX-4090".

    Raises:
        UsageError: if it is not understood or the card is unknown.
    """
    form = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(\S.*?)\s*", text, re.IGNORECASE)
    gpu = find_gpu(form[2]) if form else None
    if form is None or gpu is None:
        raise UsageError(
            f"The GPUs {text!r} are not known; write a number and a card, such as 8xH100. "
            f"The known cards are {', '.join(CATALOGUE)}."
        )
    count = int(form[1] or 1)
    if count < 1:
        raise UsageError(f"The GPUs {text!r} are {count} cards; give at least 1.")
    return GpuGroup(count, gpu)


def machine_gpus() -> GpuGroup | None:
    """Return this machine's GPUs (those that equal the first), or None if torch sees none.

    Memory is what the card really has; peaks are the catalogue's, None where it lacks the card.
    """
    # Importing torch takes seconds; a Linux machine without the driver's device (or WSL's) has
    # nothing that it could find.
    if sys.platform == "linux" and not any(os.path.exists(path) for path in _DRIVER_DEVICES):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    first = devices[0]
    known = find_gpu(first.name)
    gpu = Gpu(
        name=known.name if known else first.name,
        memory_bytes=first.total_memory,
        flops=known.flops if known else None,
        bandwidth=known.bandwidth if known else None,
    )
    return GpuGroup(sum(device.name == first.name for device in devices), gpu)
