"""``python -m benchmarks allocator|attention|generate|gpu --json FILE``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks import allocator, attention, generate, gpu
from benchmarks.common import environment
from kvruntime import BackendUnavailable

BENCHMARKS: dict[str, Callable[[int, Progress | None], Any]] = {
    "allocator": allocator.run,
    "attention": attention.run,
    "generate": generate.run,
    "gpu": gpu.run,
}
WRONG, BAD_INPUT, NO_GPU = 1, 2, 3


def main(
    name: Annotated[str, typer.Argument(help=", ".join(BENCHMARKS))],
    repeats: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 5,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here too.")] = None,
) -> None:
    """Time one part of the runtime beside its equal-work baseline."""
    console = Console()
    if name not in BENCHMARKS or repeats < 1:
        Console(stderr=True).print(f"NAME is one of {', '.join(BENCHMARKS)}; repeats at least 1")
        raise typer.Exit(BAD_INPUT)
    if name == "gpu" and not torch.cuda.is_available():
        Console(stderr=True).print("torch sees no CUDA device: nothing was measured")
        raise typer.Exit(NO_GPU)
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            results = BENCHMARKS[name](repeats, progress)
    except BackendUnavailable as error:
        Console(stderr=True).print(str(error), markup=False)
        raise typer.Exit(NO_GPU) from None
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
    if name == "gpu" and not results["all_correct"]:
        Console(stderr=True).print("a path is wrong: see correctness, error above bound")
        raise typer.Exit(WRONG)


if __name__ == "__main__":
    typer.run(main)
