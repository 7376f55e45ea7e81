"""kvruntime plan."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvruntime.catalogue import ASPECT_RATIOS, MODEL_NAMES, RESOLUTIONS, Model, find_model
from kvruntime.cli.common import (
    JSON,
    BudgetText,
    KVDtype,
    KVGroups,
    KVStart,
    PolicyName,
    exit_codes,
    parse_budget,
    print_json,
)
from kvruntime.cli.room import Room, print_bar, print_ways, room_of, save_ways
from kvruntime.errors import WillNeverFit
from kvruntime.options import CacheOptions
from kvruntime.planning import Plan, max_rows, planner
from kvruntime.planning.compare import compare_ways, most_pictures
from kvruntime.sizes import check_positive, parse_bytes
from policies import AMSKV, DTYPE_BYTES, CentroidByHead, HackPP, HeatKV, Policy, ScaleKV


def plan_command(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(MODEL_NAMES)}.")],
    batch: Annotated[
        int, typer.Option(help="Pictures at once; guidance makes two rows of each.")
    ] = 1,
    policy: PolicyName = "scalekv",
    budget: BudgetText = "0.10",
    card: Annotated[
        str | None,
        typer.Option(help="A GPU, such as 4090 or 'H100 80GB': what fits beside it all."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="In place of a card: what there is, such as 80GiB.")
    ] = None,
    reserved: Annotated[
        str | None, typer.Option(help="Of that, taken by weights and others; known for a card.")
    ] = None,
    running: Annotated[
        str | None, typer.Option(help="Of each picture, what its layers compute: 800MB.")
    ] = None,
    text_encoder: Annotated[
        bool, typer.Option(help="Whether Infinity's text encoder stays on the card.")
    ] = True,
    rows_per_picture: Annotated[
        int | None, typer.Option(help="2 with guidance, 1 without.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Policies at 10 %, and some formats, side by side.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="The comparison as a picture.")] = None,
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
    """Say how much memory a generation needs and how many fit, without running it."""
    with exit_codes():
        known = find_model(model, resolution, aspect).with_dtypes(key_dtype, value_dtype)
        if rows_per_picture is not None:
            check_positive("rows-per-picture", rows_per_picture)
            known = replace(known, rows_per_picture=rows_per_picture)
        room = room_of(known, card, memory, _reserved_bytes(reserved), running, text_encoder)
        if compare or plot is not None:
            if (policy, budget, kv_dtype, batch) != ("scalekv", "0.10", None, 1):
                raise ValueError(
                    "--compare and --plot have policies, budgets and formats of their own: leave "
                    "out --policy, --budget, --kv-dtype and --batch"
                )
            _compare(known, room, plot, as_json)
            return
        options = CacheOptions(
            policy,
            parse_budget(budget),
            profile,
            page_size=page_size,
            kv_dtype=kv_dtype,
            kv_groups=kv_groups,
            kv_start=kv_start,
        )
        _plan(known, options, batch, room, as_json)


def _plan(
    known: Model, options: CacheOptions, batch: int, room: Room | None, as_json: bool
) -> None:
    """Of so many pictures."""
    check_positive("batch", batch)
    plan_for = planner(known, options)
    made = plan_for(batch * known.rows_per_picture)
    by_rows = plan_for if options.is_shared_by_rows else None
    fit = None if room is None else _rows_that_fit(made, room, known, by_rows)
    result = plan_report(known.name, made, room, fit)
    if as_json:
        print_json(result)
    else:
        _print_plan(result, known.rows_per_picture)
        if room is not None:
            print_bar(room, made, batch, Console())
    if room is not None and fit is not None:
        _require(made, room, known, fit)


def _rows_that_fit(
    made: Plan, room: Room, known: Model, plan_for: Callable[[int], Plan] | None
) -> int:
    """The most rows whose pages, workspace and layers find room."""
    running, each = room.reserve.running, known.rows_per_picture
    if not running:
        return max_rows(made, room.left, plan_for=plan_for)
    of_rows = plan_for or made.for_rows
    return each * most_pictures(
        lambda pictures: of_rows(each * pictures).total_bytes + running * pictures, room.left
    )


def _require(made: Plan, room: Room, known: Model, fit: int) -> None:
    """Raise WillNeverFit, with what would fit, unless this plan does."""
    pictures = made.rows // known.rows_per_picture
    needed = made.total_bytes + pictures * room.reserve.running
    if needed <= room.left:
        return
    advice = "not one row fits: lower the budget, the resolution or the workspace"
    if fit:
        advice = f"{min(fit, made.rows - 1)} of {made.rows} rows would fit"
    ways = compare_ways(known, room.left, room.reserve.running)
    others = [way.name for way in ways if way.policy and way.pictures >= pictures]
    if others:
        advice += f"; all {pictures} pictures would with {'; '.join(others)}"
    raise WillNeverFit(needed, room.left, advice)


def _compare(known: Model, room: Room | None, plot: Path | None, as_json: bool) -> None:
    if room is None:
        raise ValueError("--compare and --plot go with --card or --memory")
    ways = compare_ways(known, room.left, room.reserve.running)
    if plot is not None:
        save_ways(ways, known, room, plot)
    if as_json:
        print_json(
            {
                "version": 1,
                "model": known.name,
                "room": room.name,
                "total_bytes": room.total,
                "reserve": asdict(room.reserve),
                "ways": [asdict(way) for way in ways],
            }
        )
    else:
        print_ways(ways, known, room, Console())


def _reserved_bytes(text: str | None) -> int | None:
    """What others take; nothing at all is allowed here."""
    if text is None:
        return None
    return 0 if re.fullmatch(r"\s*0+\s*[a-zA-Z]*\s*", text) else parse_bytes(text)


def _roles(policy: Policy) -> str:
    """Where the roles of layers or heads come from: a published preset, a profile, or nowhere."""
    if isinstance(policy, HackPP | HeatKV | CentroidByHead):
        return "profile"
    if isinstance(policy, ScaleKV):
        return "preset" if policy.published else "profile" if policy.drafters else "none"
    return "profile" if isinstance(policy, AMSKV) and policy.demanding else "none"


def plan_report(
    model: str, made: Plan, room: Room | None = None, fit: int | None = None
) -> dict[str, Any]:
    """The JSON of ``kvruntime plan``. fit: rows that find room."""
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
        "plane_bytes": made.plane_bytes,
        "workspace_bytes": made.workspace_bytes,
        "peak_pages": made.peak_pages,
        "baseline": made.baseline_bytes(),
    }
    if room is not None:
        report["memory_bytes"] = room.left
        report["running_bytes"] = room.reserve.running
        report["max_rows"] = fit
    return report


def _print_plan(result: dict[str, Any], rows_per_picture: int) -> None:
    title = (
        f"{result['model']}, {result['policy']}, {result['budget_tokens']} of "
        f"{result['history_tokens']} tokens, {result['rows']} rows"
    )
    if result["kv_dtype"]:
        groups = f" with {result['kv_groups']} groups" if result["kv_groups"] else ""
        title += f", {result['kv_dtype']}{groups} from scale {result['kv_start']} on"
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
