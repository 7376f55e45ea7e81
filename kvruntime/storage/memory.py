"""How much memory is free: NVML's and torch's word for a GPU, psutil's and the cgroup's for a
host.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from kvruntime.sizes import parse_bytes, parse_share

_CGROUPS = (  # (limit, in use), version 2 and version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def free_bytes(device: torch.device) -> int:
    """What is free on the device: by its driver (NVML where it answers, else torch), or by the
    host's system, within the limits of the control group and of the process (ulimit -d, -v).
    """
    if device.type == "cuda":
        told = nvml_memory(device)
        return int(torch.cuda.mem_get_info(device)[0] if told is None else told.free)
    free = int(psutil.virtual_memory().available)
    for limit, in_use in _CGROUPS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(in_use).read_text()))
        except (OSError, ValueError):  # no such version, or "max"
            continue
    return max(0, min(free, *_left_to_process()))


def _left_to_process() -> list[int]:
    """What it may yet take by each limit that is set; a large number where none is."""
    process, left = psutil.Process(), [sys.maxsize]
    if not psutil.LINUX:
        return left
    used = process.memory_info()
    for limit, taken in ((psutil.RLIMIT_DATA, used.data), (psutil.RLIMIT_AS, used.vms)):
        most = process.rlimit(limit)[0]
        if most != psutil.RLIM_INFINITY:
            left.append(most - taken)
    return left


def nvml_memory(device: torch.device) -> Any:
    """NVML's reading of a GPU, with ``free``, ``used`` and ``total`` bytes; None where it does not
    answer.
    """
    pynvml, _ = start_nvml()
    if pynvml is None:
        return None
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def start_nvml() -> tuple[Any, str]:
    """pynvml with NVML started, for the caller to shut down; or None, and what is in the way."""
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"no NVIDIA driver answers: {error}"
    return pynvml, ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed for want of memory, and not for anything else."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def asked_bytes(memory: int | str | None, device: torch.device, least: int) -> int:
    """How much a pool may take: a number of bytes, "2GiB", or "80%" of what is free. Raises
    ValueError for anything else, and where it does not hold a page of ``least`` bytes.
    """
    share = parse_share(memory) if isinstance(memory, str) else None
    if share is not None:
        size = int(share * free_bytes(device))
    elif isinstance(memory, str):
        size = parse_bytes(memory)
    elif isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0:
        raise ValueError(f"memory must be a positive number of bytes, got {memory!r}")
    else:
        size = memory
    if size < least:
        raise ValueError(f"{size} bytes of memory hold no page of {least} bytes")
    return size


def real_device(device: torch.device | str) -> torch.device:
    """The device with its index. Raises ValueError for CUDA where torch has none."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")  # cpu:0 is the same, and not equal
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch sees no CUDA device here, use device='cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
