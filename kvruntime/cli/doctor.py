"""kvruntime doctor."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from kvruntime.cli.common import JSON, exit_codes, print_json


def doctor(as_json: JSON = False) -> None:
    """Versions, devices, and which attention back ends can run here."""
    from kvruntime import device

    with exit_codes():
        with Console(stderr=True).status("compiling a kernel"):
            report = device.doctor()
        if as_json:
            print_json(report)
            return
        table = Table("what", "value")
        for name, version in report["versions"].items():
            table.add_row(name, version or "not installed")
        host = report["host"]
        table.add_row("cores, torch threads", f"{host['cores']}, {host['torch_threads']}")
        table.add_row("host memory available", f"{host['available_bytes'] / 2**30:.1f} GiB")
        cuda, triton = report["cuda"], report["triton"]
        table.add_row("CUDA", "yes" if cuda["available"] else "no")
        table.add_row("NVML", cuda["why_no_nvml"] or f"driver {cuda['driver']}")
        done = f"compiled in {triton['seconds']:.1f} s" if triton["compiles"] else triton["error"]
        table.add_row(f"paged kernel for sm_{triton['capability']}", done)
        for name, reasons in report["operators"].items():
            table.add_row(f"xformers {name}", "can run" if not reasons else "; ".join(reasons))
        for name, backend in report["backends"].items():
            state = "available" if backend["available"] else "; ".join(backend["reasons"])
            table.add_row(f"back end {name}", state)
        Console().print(table)
        if cuda["torch"] or cuda["nvml"]:
            Console().print(_memory_table(cuda))


def _memory_table(cuda: dict[str, Any]) -> Table:
    """torch's and NVML's numbers of each GPU side by side, MiB."""
    table = Table("GPU", "total", "used, NVML", "used, CUDA", "reserved, torch", "allocated, torch")
    by_uuid = {gpu["uuid"]: gpu for gpu in cuda["torch"]}
    seen = cuda["nvml"] or cuda["torch"]
    for gpu in seen:
        ours = by_uuid.get(gpu["uuid"], {})
        sizes = [
            gpu["total_bytes"],
            gpu["used_bytes"] if cuda["nvml"] else None,
            *(ours.get(name) for name in ("used_bytes", "reserved_bytes", "allocated_bytes")),
        ]
        table.add_row(gpu["name"], *("" if n is None else f"{n / 2**20:,.0f}" for n in sizes))
    return table
