"""``python -m benchmarks NAME``: allocator, attention, capacity, fleet, frontier, generate, gpu,
infinity, memory, process, soak, stress.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks import (
    allocator,
    attention,
    capacity,
    fleet,
    fleet_plot,
    frontier,
    frontier_plot,
    generate,
    gpu,
    infinity,
    memory,
    soak,
    whole_process,
)
from benchmarks.common import environment
from benchmarks.load import beside_load as neighbour
from benchmarks.schemas import REPORTS
from kvruntime import BackendUnavailable
from kvruntime.sizes import parse_bytes

WRONG, BAD_INPUT, NO_GPU = 1, 2, 3

Repeats = Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians are reported.")]
Out = Annotated[Path | None, typer.Option("--json", help="Write the results here too.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _report(
    name: str,
    out: Path | None,
    run: Callable[[Progress], Any],
    repeats: int = 1,
    **options: Any,
) -> Any:
    """Run, check, print and write; the results."""
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        _fail(f"{out} cannot be written", BAD_INPUT)  # before anything is measured
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            results = run(progress)
    except BackendUnavailable as error:
        _fail(str(error), NO_GPU)
    report = {
        "version": 1,
        "benchmark": name,
        "repeats": repeats,
        "options": options,
        "environment": environment(),
        "results": results,
    }
    REPORTS[name].model_validate(report)
    Console().print_json(data=report)
    if out is not None:
        out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return results


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True).print(message, markup=False, soft_wrap=True)
    raise typer.Exit(code) from None


@app.command("allocator")
def _allocator(repeats: Repeats = 5, out: Out = None) -> None:
    """Taking and giving back many pages at once, beside a manager that does one by one."""
    _report("allocator", out, lambda progress: allocator.run(repeats, progress), repeats)


@app.command("attention")
def _attention(
    repeats: Repeats = 5,
    only: Annotated[str | None, typer.Option(help=", ".join(attention.CASES))] = None,
    beside_load: Annotated[
        bool, typer.Option(help="Meanwhile another process keeps two threads busy.")
    ] = False,
    out: Out = None,
) -> None:
    """One layer through one megapixel, beside torch.cat + SDPA."""

    if only is not None and only not in attention.CASES:
        _fail(f"{only!r} is not one of {', '.join(attention.CASES)}", BAD_INPUT)

    def run(progress: Progress) -> Any:
        with neighbour() if beside_load else nullcontext():
            return attention.run(repeats, progress, only)

    _report("attention", out, run, repeats, only=only, beside_load=beside_load)


@app.command("capacity")
def _capacity(out: Out = None) -> None:
    """How many rows fit under a cap on KV bytes, by drawing them."""
    _report("capacity", out, capacity.run)


@app.command("fleet")
def _fleet(
    quick: Annotated[bool, typer.Option(help="One size of pool, one card, shorter hours.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw what a card carries.")] = None,
    out: Out = None,
) -> None:
    """Admission in simulated time: what a card carries, and a day of a fleet."""
    cards, seconds = (1, 60.0) if quick else (fleet.CARDS, fleet.HOUR_SECONDS)
    peaks = fleet.PEAKS[1:2] if quick else fleet.PEAKS
    results = _report(
        "fleet", out, lambda progress: fleet.run(progress, peaks, cards, seconds), quick=quick
    )
    if plot is not None:
        fleet_plot.save_plot(results, plot)


@app.command("frontier")
def _frontier(
    pictures: Annotated[int | None, typer.Option(min=2, help="200; 24 with --quick.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count on.")] = (
        frontier.SEED
    ),
    quick: Annotated[bool, typer.Option(help="Six points in place of all.")] = False,
    policy: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Keep what is done here, and go on from it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw quality against bytes.")] = None,
    dtype: Annotated[
        str, typer.Option(help="What the model computes in; shares stay those of bfloat16.")
    ] = frontier.DTYPES[0],
    out: Out = None,
) -> None:
    """What bytes buy: every policy on the bundled model at 40 % down to 1 % of the bytes."""
    unknown = [name for name in policy or [] if name not in frontier.POLICIES]
    if unknown:
        _fail(f"{unknown[0]!r} is not one of {', '.join(frontier.POLICIES)}", BAD_INPUT)
    if dtype not in frontier.DTYPES:
        _fail(f"{dtype!r} is not one of {', '.join(frontier.DTYPES)}", BAD_INPUT)
    chosen = list(frontier.QUICK) if quick else frontier.points()
    chosen = [point for point in chosen if not policy or point.policy in policy]
    count = pictures or (frontier.QUICK_PICTURES if quick else frontier.PICTURES)

    def run(progress: Progress) -> Any:
        try:
            return frontier.run(progress, chosen, count, seed, work, dtype)
        except ValueError as error:
            _fail(str(error), BAD_INPUT)

    results = _report(
        "frontier",
        out,
        run,
        pictures=count,
        seed=seed,
        quick=quick,
        policies=policy or [],
        dtype=dtype,
    )
    if plot is not None:
        frontier_plot.save_plot(results, plot)


@app.command("generate")
def _generate(
    repeats: Repeats = 5,
    pictures: Annotated[int, typer.Option(min=1)] = generate.PICTURES,
    out: Out = None,
) -> None:
    """The bundled model's whole pictures, beside its own cache."""
    _report(
        "generate",
        out,
        lambda progress: generate.run(repeats, progress, pictures),
        repeats,
        pictures=pictures,
    )


@app.command("gpu")
def _gpu(repeats: Repeats = 5, out: Out = None) -> None:
    """Everything about a CUDA device at once."""
    if not torch.cuda.is_available():
        _fail("torch sees no CUDA device: nothing was measured", NO_GPU)
    results = _report("gpu", out, lambda progress: gpu.run(repeats, progress), repeats)
    if not results["all_correct"]:
        _fail("a path is wrong: see correctness, error above bound", WRONG)


@app.command("infinity")
def _infinity(
    repo: Annotated[Path, typer.Option(help="A checkout of FoundationVision/Infinity.")],
    released: Annotated[
        Path | None, typer.Option(help="A checkout of StargazerX0/ScaleKV, timed as well.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    resolution: Annotated[str, typer.Option(help="0.06M, 0.25M or 1M.")] = "1M",
    model: Annotated[str, typer.Option(help="infinity-125m, -2b or -8b.")] = "infinity-125m",
    depth: Annotated[int | None, typer.Option(min=1, help="Fewer layers than it has.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Drawn at once.")] = 1,
    device: Annotated[str, typer.Option(help="Where torch computes: cpu, cuda.")] = "cpu",
    repeats: Repeats = 3,
    out: Out = None,
) -> None:
    """Whole pictures on Infinity's own code, beside its own cache."""
    options: dict[str, Any] = {
        "dtype": dtype,
        "resolution": resolution,
        "model": model,
        "depth": depth,
        "pictures": pictures,
        "device": device,
    }

    def run(progress: Progress) -> Any:
        try:
            return infinity.run(repeats, progress, repo, released, **options)
        except ValueError as error:
            _fail(str(error), BAD_INPUT)

    _report("infinity", out, run, repeats, **options)


@app.command("memory")
def _memory(
    policy: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated.")] = None,
    out: Out = None,
) -> None:
    """What the runtime allocates, beside what it planned."""
    chosen = policy or []
    for name in chosen:
        if name not in memory.POLICIES:
            _fail(f"{name!r} is not one of {', '.join(memory.POLICIES)}", BAD_INPUT)
    results = _report(
        "memory",
        out,
        lambda progress: memory.run(progress, tuple(chosen)),
        policies=chosen,
    )
    if not all(memory.LEAST <= result["ratio"] <= 1 for result in results):
        _fail(f"a ratio is not in {memory.LEAST} to 1", WRONG)


@app.command("process")
def _process(
    growth: Annotated[str, typer.Option(help="That the process may grow by.")] = "256MiB",
    out: Out = None,
) -> None:
    """How many pictures a process draws that the operating system keeps from growing."""
    try:
        limit = parse_bytes(growth, "growth")
    except ValueError as error:
        _fail(str(error), BAD_INPUT)
    _report("process", out, lambda progress: whole_process.run(progress, limit), growth=limit)


@app.command("soak")
def _soak(
    generations: Annotated[int, typer.Option(min=1, help="In four threads.")] = 10_000,
    seed: int = 0,
    out: Out = None,
) -> None:
    """Generations in threads that wait, fork and fail on one pool: each draws as it does alone."""
    _report("soak", out, lambda progress: soak.run(generations, progress, seed), seed=seed)


@app.command("stress")
def _stress(
    generations: Annotated[int, typer.Option(min=1, help="Of the soak.")] = 10_000,
    out: Out = None,
) -> None:
    """capacity, process, soak and fleet, one after the other: about twenty minutes."""

    def run(progress: Progress) -> Any:
        return {
            "capacity": capacity.run(progress),
            "process": whole_process.run(progress),
            "soak": soak.run(generations, progress),
            "fleet": fleet.run(progress, fleet.PEAKS, fleet.CARDS, fleet.HOUR_SECONDS),
        }

    _report("stress", out, run, generations=generations)


if __name__ == "__main__":
    app()
