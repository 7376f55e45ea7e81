"""What runs here: versions, devices, back ends and the reasons against those that cannot.

Numbers of torch and of the driver (NVML) stand side by side and are never mixed: NVML counts what
all processes took, torch what its own allocator holds.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from typing import Any

import psutil
import torch

from kvruntime.attention import import_xformers, reasons_against_xformers
from kvruntime.attention.cubin import compile_in_a_process
from kvruntime.attention.sdpa import SDPA
from kvruntime.planning import plan
from kvruntime.storage.memory import start_nvml

_PACKAGES = ("kvruntime", "torch", "numpy", "xformers", "triton", "nvidia-ml-py")
_NO_GPU_CAPABILITY = 90


def versions() -> dict[str, str | None]:
    """Installed version of each package that matters, None where it is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def nvml_devices() -> tuple[list[dict[str, Any]], str | None, str | None]:
    """GPUs as the driver sees them; its version; or why it sees none. Bytes, watts, MHz; None for
    what a GPU does not tell.
    """
    pynvml, why_not = start_nvml()
    if pynvml is None:
        return [], None, why_not

    def told(function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except pynvml.NVMLError:
            return None

    try:
        devices = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            limit = told(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
            device = {
                "name": str(pynvml.nvmlDeviceGetName(handle)),
                "uuid": str(pynvml.nvmlDeviceGetUUID(handle)).removeprefix("GPU-"),
                "total_bytes": memory.total,
                "used_bytes": memory.used,
                "power_limit_watts": None if limit is None else limit / 1000,
                "sm_clock_mhz": told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            }
            devices.append(device)
        return devices, str(pynvml.nvmlSystemGetDriverVersion()), None
    except pynvml.NVMLError as error:
        return [], None, f"the NVIDIA driver refused a question: {error}"
    finally:
        pynvml.nvmlShutdown()


def torch_devices() -> list[dict[str, Any]]:
    """The CUDA devices of this process as torch sees them."""
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        device = {
            "name": properties.name,
            "uuid": str(getattr(properties, "uuid", "")).removeprefix("GPU-"),
            "capability": 10 * properties.major + properties.minor,
            "total_bytes": total,
            "used_bytes": total - free,
            "reserved_bytes": torch.cuda.memory_reserved(index),
            "allocated_bytes": torch.cuda.memory_allocated(index),
        }
        devices.append(device)
    return devices


def triton_probe(capability: int) -> dict[str, Any]:
    """Whether the paged kernel compiles for a GPU of this capability, which need not be here."""
    began = time.perf_counter()
    kernels, error = compile_in_a_process([capability], first_only=True)
    return {
        "capability": capability,
        "compiles": not error,
        "error": error or None,
        "kernels": len(kernels),
        "seconds": time.perf_counter() - began,
    }


def doctor() -> dict[str, Any]:
    """Everything ``kvruntime doctor`` prints. Takes some 10 s: it compiles a kernel."""
    memory = psutil.virtual_memory()
    by_driver, driver, no_nvml = nvml_devices()
    by_torch = torch_devices()
    device = torch.device("cuda" if by_torch else "cpu")
    xformers, _ = import_xformers()
    reasons = reasons_against_xformers(device, plan("infinity-2b"))
    return {
        "versions": versions(),
        "host": {
            "cores": psutil.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "total_bytes": memory.total,
            "available_bytes": memory.available,
        },
        "cuda": {
            "available": bool(by_torch),
            "driver": driver,
            "torch": by_torch,
            "nvml": by_driver,
            "why_no_nvml": no_nvml,
        },
        "triton": triton_probe(by_torch[0]["capability"] if by_torch else _NO_GPU_CAPABILITY),
        "operators": xformers.operators(device) if xformers else {},
        "backends": {
            SDPA.name: {"available": True, "reasons": []},
            "xformers": {"available": not reasons, "reasons": reasons},
        },
    }
