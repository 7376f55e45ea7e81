"""The demo's figures as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvruntime.demo.trio import Drawn
from kvruntime.sizes import in_units


def print_trio(
    own_bytes: int, own_seconds: float, drawn: Sequence[Drawn], console: Console
) -> None:
    """Six lines: bytes, how many times less, planned and used pages, PSNR, KL, seconds."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "its own cache", *(one.name.replace(", ", "\n") for one in drawn)):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    runs = [one.figures for one in drawn]

    def line(name: str, own: str, show: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, own, *map(show, runs))

    line("memory of the cache", in_units(own_bytes), lambda run: in_units(run["page_bytes"]))
    line("times less", "1", lambda run: f"{own_bytes / run['page_bytes']:.0f}")
    line("pages planned / used", "", _pages)
    line("PSNR, dB", "", lambda run: _number(run["psnr_db"]["mean"], "inf"))
    line("KL, nats", "", lambda run: f"{run['kl']:.2g}")
    line("seconds", f"{own_seconds:.1f}", lambda run: f"{run['seconds']:.1f}")
    console.print(table)


def print_report(report: dict[str, Any], console: Console) -> None:
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("PSNR", lambda run: _number(run["psnr_db"]["mean"], "inf")),
        ("KL", lambda run: f"{run['kl']:.2g}"),
        ("pages", _pages),
        ("kept MiB", lambda run: f"{run['token_bytes'] / 2**20:.1f}"),
        ("pool MiB", lambda run: f"{run['page_bytes'] / 2**20:.1f}"),
        ("s", lambda run: f"{run['seconds']:.1f}"),
    ]
    title = f"{report['count']} pictures, {report['dtype']}, budget {report['budget']}"
    runs = [*report["runs"].values(), *report["quantised"]]
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(_label(run), *(show(run) for _, show in columns))
    console.print(table)
    console.print(
        "PSNR in dB and KL in nats are against the model's own cache; pages are planned/used; "
        f"{sum(run['leaked_pages'] for run in runs)} pages leaked; its own cache takes "
        f"{runs[0]['baseline_bytes'] / 2**20:.1f} MiB"
    )
    if report["quantised"]:
        console.print("int4/2 @5: 4 bits in 2 groups of scale and shift, from scale 5 on")
    identical = report["runs"].get("full", {}).get("bit_identical")
    if identical is not None:
        console.print(f"full cache bit-identical with the model's own: {identical}")


def _label(run: dict[str, Any]) -> str:
    if run["kv_dtype"] is None:
        return str(run["policy"])
    groups = f"/{run['kv_groups']}" if run["kv_groups"] else ""  # transform-coded pages have none
    return f"{run['policy']} {run['kv_dtype']}{groups} @{run['kv_start']}"


def _pages(run: dict[str, Any]) -> str:
    return f"{run['planned_pages']}/{run['peak_pages']}"


def _number(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.2f}"
