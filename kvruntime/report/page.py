"""RUN.json as one page of HTML that needs nothing else."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from kvruntime.extras import extra
from kvruntime.report.charts import Curve, frontier_chart, memory_chart, origin_chart
from kvruntime.report.record import Run
from kvruntime.sizes import in_units

with extra("cli"):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER = Path(__file__).parent


@cache
def frontier() -> dict[str, Any]:
    """What other policies and shares give on the bundled model: docs/policies.md, the frontier."""
    return json.loads((FOLDER / "frontier.json").read_text())  # type: ignore[no-any-return]


def render(run: Run) -> str:
    """The page. About 50 kB beside the pictures; nothing in it asks for anything elsewhere."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["units"] = in_units
    pages = [Curve("planned", run.curves.planned), Curve("used", run.curves.used)]
    most = max(max(line) for line in run.tokens) or 1
    return environment.get_template("page.html.j2").render(
        run=run,
        headline=headline(run),
        own_chart=memory_chart(run, [Curve("own", run.curves.own), pages[1]]),
        pages_chart=memory_chart(run, pages),
        events_equal=sum(a == b for a, b in zip(run.curves.planned, run.curves.used, strict=True)),
        events=len(run.curves.used),
        most_tokens=most,
        lines=_lines(run),
        origins=[(layer, origin_chart(layer, run.sizes)) for layer in run.origin],
        frontier=frontier_chart(frontier()["points"], run) if run.model == "emoji64" else None,
        frontier_pictures=frontier()["pictures"],
        bars=_bars(run),
    )


def headline(run: Run) -> str:
    """The run in one sentence."""
    pages = run.kv_dtype or "exact"
    return (
        f"{run.pictures_drawn} pictures with {run.policy} in {pages} pages: "
        f"{in_units(run.bytes.pages)} of pages, and {in_units(run.bytes.workspace)} to work in, "
        f"where the model's own cache takes {in_units(run.bytes.own)}."
    )


def _lines(run: Run) -> list[dict[str, Any]]:
    """Of the heat map: a scale, its size, and of each layer the kept tokens and the role."""
    lines = []
    for scale, (size, tokens) in enumerate(zip(run.sizes, run.tokens, strict=True)):
        roles = run.roles[scale] if run.roles else [""] * run.layers
        cells = list(zip(tokens, roles, strict=True))
        lines.append({"scale": scale, "size": " x ".join(map(str, size)), "cells": cells})
    return lines


def _bars(run: Run) -> list[tuple[str, int, str]]:
    """Bytes by kind: what, how many, and its class in the style sheet."""
    sizes = run.bytes
    return [
        ("own cache, while torch.cat copies", sizes.own_copying, "own"),
        ("own cache", sizes.own, "own"),
        ("workspace", sizes.workspace, "planned"),
        ("pages at the peak", sizes.pages, "used"),
        ("of which planes (log weights and others)", sizes.planes, "used"),
        ("tokens that the policy keeps", sizes.kept, "used"),
    ]
