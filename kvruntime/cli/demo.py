"""kvruntime demo."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from kvruntime.cli.common import (
    JSON,
    BudgetText,
    KVDtype,
    KVGroups,
    KVStart,
    exit_codes,
    parse_budget,
    print_json,
)
from policies import POLICY_NAMES


def demo(
    policy: Annotated[str, typer.Option(help="The policy beside ours.")] = "scalekv",
    budget: BudgetText = "0.10",
    count: Annotated[int, typer.Option(help="Pictures to draw.")] = 8,
    seed: int = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    kv_dtype: KVDtype = None,
    kv_groups: KVGroups = 1,
    kv_start: KVStart = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Compare all policies and formats, for over a minute.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and RUN.json.")] = Path("demo"),
    as_json: JSON = False,
) -> None:
    """Draw emoji with the bundled model: on its own cache, with a published policy at a tenth of
    it, and with ours at 2 % of the bytes.
    """
    with exit_codes():
        if policy not in POLICY_NAMES:
            raise ValueError(f"unknown policy {policy!r}; there are {', '.join(POLICY_NAMES)}")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}")
        pages = {"kv_dtype": kv_dtype, "kv_groups": kv_groups, "kv_start": kv_start}
        draw = _everything if everything else _trio
        draw({"policy": policy, **pages}, parse_budget(budget), count, seed, dtype, out, as_json)


def _trio(
    published: dict[str, Any],
    budget: int | float | str,
    count: int,
    seed: int,
    dtype: str,
    out: Path,
    as_json: bool,
) -> None:
    from kvruntime.demo import print_trio, run_trio, save_memory, save_trio
    from kvruntime.report.record import save_run

    names = _prepare(out, ["demo.png", "memory.png", "RUN.json"])
    with Progress(console=Console(stderr=True), transient=True) as progress:
        own, seconds, drawn = run_trio(published, budget, count, seed, dtype, progress)
        ours = drawn[-1].run
        save_trio(own, ours.bytes.own, drawn, out / "demo.png")
        save_memory(drawn, out / "memory.png")
    save_run(ours, out / "RUN.json")
    if as_json:
        runs = {one.run.policy: one.figures for one in drawn}
        print_json({"count": count, "seed": seed, "own_seconds": seconds, "runs": runs})
        return
    console = Console()
    print_trio(ours.bytes.own, seconds, drawn, console)
    _tell(names, console)
    command = sys.argv[0] if Path(sys.argv[0]).name == "kvruntime" else "kvruntime"
    console.print(f"{command} report {out / 'RUN.json'} makes a page of it", soft_wrap=True)


def _everything(
    published: dict[str, Any],
    budget: int | float | str,
    count: int,
    seed: int,
    dtype: str,
    out: Path,
    as_json: bool,
) -> None:
    from kvruntime.demo import SHOWN, print_report, run_demo, save_formats, save_picture

    names = _prepare(out, ["demo.png", "formats.png", "demo.json"])
    policy = published.pop("policy")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        report, own, ours = run_demo(
            policy,
            budget,
            count,
            seed,
            dtype,
            progress,
            pages=published,
            policies=SHOWN if policy in SHOWN else (*SHOWN, policy),
        )
    save_picture(report, own, ours, out / "demo.png")
    save_formats(report, out / "formats.png")
    (out / "demo.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    if as_json:
        print_json(report)
        return
    console = Console()
    print_report(report, console)
    _tell(names, console)


def _prepare(out: Path, names: list[str]) -> list[str]:
    """The folder, and paths of what will be written. Raises ValueError, before anything is drawn,
    where one of them is a folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (out / name).is_dir():
            raise ValueError(f"{out / name} is a folder")
    return [str(out / name) for name in names]


def _tell(names: list[str], console: Console) -> None:
    console.print(f"wrote {', '.join(names)}", soft_wrap=True)
