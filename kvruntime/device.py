"""What runs here: versions, devices, back ends and the reasons against those that cannot."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import psutil
import torch

from kvruntime.attention import sdpa

_PACKAGES = ("kvruntime", "torch", "numpy", "xformers", "triton", "nvidia-ml-py")


def versions() -> dict[str, str | None]:
    """Installed version of each package that matters, None where it is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def nvml_devices() -> tuple[list[dict[str, Any]], str | None]:
    """GPUs as the driver sees them, total and used bytes; or why it sees none."""
    try:
        import pynvml
    except ImportError:
        return [], "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"no NVIDIA driver answers: {error}"
    try:
        devices = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = str(pynvml.nvmlDeviceGetName(handle))
            devices.append({"name": name, "total_bytes": memory.total, "used_bytes": memory.used})
        return devices, None
    except pynvml.NVMLError as error:
        return [], f"the NVIDIA driver refused a question: {error}"
    finally:
        pynvml.nvmlShutdown()


def doctor() -> dict[str, Any]:
    """Everything ``kvruntime doctor`` prints."""
    memory = psutil.virtual_memory()
    devices, no_nvml = nvml_devices()
    return {
        "versions": versions(),
        "host": {
            "cores": psutil.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "total_bytes": memory.total,
            "available_bytes": memory.available,
        },
        "cuda": {"available": torch.cuda.is_available(), "nvml": devices, "why_no_nvml": no_nvml},
        "backends": {
            sdpa.SDPA.name: {"available": True, "reasons": []},
            "xformers-paged": {
                "available": False,
                "reasons": [
                    "not part of this version: attention gathers pages and calls torch SDPA"
                ],
            },
        },
    }
