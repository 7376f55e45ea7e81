"""kvruntime report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvruntime.cli.common import exit_codes
from kvruntime.sizes import in_units


def report_command(
    run: Annotated[Path, typer.Argument(help="RUN.json of kvruntime demo or sample.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page; by default report.html beside RUN.json."),
    ] = None,
) -> None:
    """Make one page of a run, to open in a browser: pictures, memory, budgets, the frontier."""
    with exit_codes():
        from kvruntime.report.page import render
        from kvruntime.report.record import load_run

        page = run.parent / "report.html" if out is None else out
        html = render(load_run(run))
        page.write_text(html, encoding="utf-8")
        Console().print(f"wrote {page}, {in_units(len(html.encode()))}", soft_wrap=True)
