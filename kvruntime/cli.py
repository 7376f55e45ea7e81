"""The command line: kvruntime demo, plan, doctor."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvruntime.catalogue import ASPECT_RATIOS, MODEL_NAMES, RESOLUTIONS, find_model
from kvruntime.errors import KVRuntimeError, OutOfPages, WillNeverFit
from kvruntime.formats import KV_DTYPES
from kvruntime.plan import Plan, plan
from policies import AMSKV, DTYPE_BYTES, POLICY_NAMES, Policy, ScaleKV

BAD_INPUT, NOT_ENOUGH_MEMORY = 2, 3
_UNITS = {
    "": 1,
    "B": 1,
    **{unit: 1024 ** (i + 1) for i, unit in enumerate(("KIB", "MIB", "GIB", "TIB"))},
}
_UNITS |= {unit: 1000 ** (i + 1) for i, unit in enumerate(("KB", "MB", "GB", "TB"))}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="A memory-managed, paged KV cache for next-scale (VAR) image models.",
)
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
BudgetText = Annotated[
    str,
    typer.Option(
        help="0.10: a fraction of the history (tokens before the last scale); 650: tokens."
    ),
]
KVDtype = Annotated[
    str | None, typer.Option(help=f"Quantised pages: one of {', '.join(KV_DTYPES)}.")
]
KVGroups = Annotated[int, typer.Option(help="Groups of a quantised row: 1, 2, 4 or 8.")]
KVStart = Annotated[
    int | None, typer.Option(help="Scale from which pages are quantised; by default planned.")
]
PolicyName = Annotated[str, typer.Option(help=f"One of {', '.join(POLICY_NAMES)}.")]


def parse_budget(text: str) -> float:
    """A float where the text has a point or an exponent, else an int. Raises ValueError."""
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        raise ValueError(f"budget must be a number such as 0.10 or 650, got {text!r}") from None


def parse_bytes(text: str) -> int:
    """Bytes of 80GiB, 512 MiB, 2GB or a plain number. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"memory must be a size such as 80GiB or 512MiB, got {text!r}")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ValueError(f"memory must be positive, got {text!r}")
    return size


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Errors as one line on stderr: exit code 3 for too little memory, 2 for bad input."""
    try:
        yield
    except (WillNeverFit, OutOfPages, MemoryError) as error:
        Console(stderr=True).print(
            f"not enough memory: {error}", style="red", markup=False, soft_wrap=True
        )
        raise typer.Exit(NOT_ENOUGH_MEMORY) from None
    except (ValueError, OverflowError, KVRuntimeError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


@app.command()
def demo(
    policy: Annotated[
        str, typer.Option(help="The policy in the picture; the table has all.")
    ] = "scalekv",
    budget: BudgetText = "0.10",
    count: Annotated[int, typer.Option(help="Pictures to draw.")] = 8,
    seed: int = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    kv_dtype: KVDtype = None,
    kv_groups: KVGroups = 1,
    kv_start: KVStart = None,
    formats: Annotated[
        bool, typer.Option(help="Compare all int4 and int2 pages as well, which takes a minute.")
    ] = True,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and demo.json.")] = Path(
        "demo"
    ),
    as_json: JSON = False,
) -> None:
    """Draw emoji with the bundled model: on its own cache, and on ours at a budget."""
    with _exit_codes():
        from kvruntime.demo import print_report, run_demo, save_formats, save_picture

        if policy not in POLICY_NAMES:
            raise ValueError(f"unknown policy {policy!r}; there are {', '.join(POLICY_NAMES)}")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}")
        out.mkdir(parents=True, exist_ok=True)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            report, own, ours = run_demo(
                policy,
                parse_budget(budget),
                count,
                seed,
                dtype,
                progress,
                pages={"kv_dtype": kv_dtype, "kv_groups": kv_groups, "kv_start": kv_start},
                compare_formats=formats,
            )
        save_picture(report, own, ours, out / "demo.png")
        if formats:
            save_formats(report, out / "formats.png")
        (out / "demo.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        if as_json:
            _print_json(report)
        else:
            console = Console()
            print_report(report, console)
            names = (
                ["demo.png", "formats.png", "demo.json"] if formats else ["demo.png", "demo.json"]
            )
            console.print(f"wrote {', '.join(str(out / name) for name in names)}", soft_wrap=True)


@app.command("plan")
def plan_command(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(MODEL_NAMES)}.")],
    batch: Annotated[
        int, typer.Option(help="Pictures at once; guidance makes two rows of each.")
    ] = 1,
    policy: PolicyName = "scalekv",
    budget: BudgetText = "0.10",
    memory: Annotated[
        str | None, typer.Option(help="What the cache may take, such as 80GiB.")
    ] = None,
    reserved: Annotated[
        str | None, typer.Option(help="Of that, taken by weights and others.")
    ] = None,
    key_dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPE_BYTES)}.")] = None,
    value_dtype: Annotated[str | None, typer.Option(help="The same for V.")] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens in a page.")] = None,
    kv_dtype: KVDtype = None,
    kv_groups: KVGroups = 1,
    kv_start: KVStart = None,
    resolution: Annotated[
        str | None, typer.Option(help=f"Infinity: {', '.join(RESOLUTIONS)}.")
    ] = None,
    aspect: Annotated[
        str | None, typer.Option(help=f"Infinity: {', '.join(ASPECT_RATIOS)}.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Calibrated profile of the model.")] = None,
    as_json: JSON = False,
) -> None:
    """Say how much memory a generation needs and how many rows fit, without running it."""
    with _exit_codes():
        known = find_model(model, resolution, aspect).with_dtypes(key_dtype, value_dtype)
        made = plan(
            known,
            batch,
            policy,
            parse_budget(budget),
            profile=profile,
            page_size=page_size,
            kv_dtype=kv_dtype,
            kv_groups=kv_groups,
            kv_start=kv_start,
        )
        room = None
        if memory is not None:
            room = parse_bytes(memory) - (parse_bytes(reserved) if reserved else 0)
        elif reserved is not None:
            raise ValueError("--reserved goes with --memory")
        result = plan_report(known.name, made, room)
        if as_json:
            _print_json(result)
        else:
            _print_plan(result, known.rows_per_picture)
        if room is not None:
            made.require(room)


def _roles(policy: Policy) -> str:
    """Where the roles of layers come from: a published preset, a profile, or nowhere."""
    if isinstance(policy, ScaleKV):
        return "preset" if policy.published else "profile" if policy.drafters else "none"
    return "profile" if isinstance(policy, AMSKV) and policy.demanding else "none"


def plan_report(model: str, made: Plan, room: int | None) -> dict[str, Any]:
    """The JSON of ``kvruntime plan``."""
    report: dict[str, Any] = {
        "version": 1,
        "model": model,
        "policy": made.policy.name,
        "roles": _roles(made.policy),
        "budget_tokens": made.budget_tokens,
        "history_tokens": made.schedule.history,
        "key_dtype": made.geometry.key_dtype,
        "value_dtype": made.geometry.value_dtype,
        "page_size": made.page_size,
        **made.page_format,
        "rows": made.rows,
        "token_bytes": made.token_bytes,
        "peak_token_bytes": made.peak_token_bytes,
        "page_bytes": made.page_bytes,
        "workspace_bytes": made.workspace_bytes,
        "peak_pages": made.peak_pages,
        "baseline": made.baseline_bytes(),
    }
    if room is not None:
        report["memory_bytes"] = room
        report["max_rows"] = made.max_rows(room)
    return report


def _print_plan(result: dict[str, Any], rows_per_picture: int) -> None:
    title = (
        f"{result['model']}, {result['policy']}, {result['budget_tokens']} of "
        f"{result['history_tokens']} tokens, {result['rows']} rows"
    )
    if result["kv_dtype"]:
        title += (
            f", {result['kv_dtype']} with {result['kv_groups']} groups from scale "
            f"{result['kv_start']} on"
        )
    table = Table(title=title)
    table.add_column("what")
    table.add_column("MiB", justify="right")
    lines = {
        "tokens kept after a scale": result["token_bytes"],
        "tokens kept at the worst layer": result["peak_token_bytes"],
        f"pool: {result['peak_pages']} pages of {result['page_size']} tokens": result["page_bytes"],
        "workspace": result["workspace_bytes"],
        "own cache, before the last scale": result["baseline"]["history_bytes"],
        "own cache, all scales": result["baseline"]["all_scales_bytes"],
        "own cache, while torch.cat copies": result["baseline"]["with_cat_copy_bytes"],
    }
    for name, size in lines.items():
        table.add_row(name, f"{size / 2**20:,.1f}")
    Console().print(table)
    if "max_rows" in result:
        rows = result["max_rows"]
        Console().print(f"{rows} rows fit: {rows // rows_per_picture} pictures at once")


@app.command()
def doctor(as_json: JSON = False) -> None:
    """Versions, devices, and which attention back ends can run here."""
    from kvruntime import device

    with _exit_codes():
        with Console(stderr=True).status("compiling a kernel"):
            report = device.doctor()
        if as_json:
            _print_json(report)
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


def main() -> None:
    app()


if __name__ == "__main__":
    main()
