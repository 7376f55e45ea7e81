"""``python -m benchmarks allocator|attention|generate --json FILE``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks import allocator, attention, generate
from benchmarks.common import environment

BENCHMARKS = {"allocator": allocator.run, "attention": attention.run, "generate": generate.run}


def main(
    name: Annotated[str, typer.Argument(help=", ".join(BENCHMARKS))],
    repeats: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 5,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
) -> None:
    """Time one part of the runtime beside its equal-work baseline."""
    console = Console()
    if name not in BENCHMARKS or repeats < 1:
        Console(stderr=True).print(f"NAME is one of {', '.join(BENCHMARKS)}; repeats at least 1")
        raise typer.Exit(2)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        results = BENCHMARKS[name](repeats, progress)
    report = {
        "version": 1,
        "benchmark": name,
        "repeats": repeats,
        "environment": environment(),
        "results": results,
    }
    console.print_json(data=report)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
