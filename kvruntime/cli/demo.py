"""kvruntime demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

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
    with exit_codes():
        from kvruntime.demo import SHOWN, print_report, run_demo, save_formats, save_picture

        if policy not in POLICY_NAMES:
            raise ValueError(f"unknown policy {policy!r}; there are {', '.join(POLICY_NAMES)}")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}")
        out.mkdir(parents=True, exist_ok=True)
        names = ["demo.png", "formats.png", "demo.json"] if formats else ["demo.png", "demo.json"]
        for name in names:
            if (out / name).is_dir():  # said before anything is drawn
                raise ValueError(f"{out / name} is a folder")
        with Progress(console=Console(stderr=True), transient=True) as progress:
            report, own, ours = run_demo(
                policy,
                parse_budget(budget),
                count,
                seed,
                dtype,
                progress,
                pages={"kv_dtype": kv_dtype, "kv_groups": kv_groups, "kv_start": kv_start},
                policies=SHOWN if policy in SHOWN else (*SHOWN, policy),
                compare_formats=formats,
            )
        save_picture(report, own, ours, out / "demo.png")
        if formats:
            save_formats(report, out / "formats.png")
        (out / "demo.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        if as_json:
            print_json(report)
        else:
            console = Console()
            print_report(report, console)
            console.print(f"wrote {', '.join(str(out / name) for name in names)}", soft_wrap=True)
