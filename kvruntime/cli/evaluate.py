"""kvruntime eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvruntime.cli.common import JSON, exit_codes, print_json
from kvruntime.evaluation import evaluate


def evaluate_command(
    reference: Annotated[Path, typer.Argument(help="A folder of PNGs.")],
    others: Annotated[list[Path], typer.Argument(help="Folders of PNGs of the same names.")],
    as_json: JSON = False,
) -> None:
    """Compare folders of pictures with a reference, picture by picture."""
    with exit_codes():
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("pictures", total=None)
            report = evaluate(reference, others, lambda: progress.advance(bar))
        if as_json:
            print_json(report)
        else:
            Console().print(_table(report))
            for missing in report["folders"][0]["missing"].values():
                Console(stderr=True).print(missing, markup=False, soft_wrap=True)


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{len(report['pictures'])} pictures beside {report['reference']}")
    for name in ("folder", "PSNR, dB", "SSIM", "LPIPS", "FID", "identical"):
        table.add_column(name, justify="left" if name == "folder" else "right")
    if len(report["folders"]) > 1:
        table.add_column("PSNR beside the first, paired", justify="right")
    for number, each in enumerate(report["folders"]):
        table.add_row(
            each["folder"],
            _interval(each["psnr_db"], ".2f"),
            _interval(each["ssim"], ".3f"),
            *(f"{each[name]:.3f}" if name in each else "-" for name in ("lpips", "fid")),
            str(each["identical"]),
            *([_interval(each["paired_with_first"]["psnr_db"], "+.2f")] if number else []),
        )
    return table


def _interval(value: dict[str, Any], form: str) -> str:
    if value["mean"] is None:
        return "-"
    if value["low"] is None:
        return f"{value['mean']:{form}}"
    return f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"
