"""The page's charts: SVG that scales with the page and takes its colours from the style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from kvruntime.report.record import Layer, Run
from kvruntime.sizes import in_units

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 74, 12, 10, 34
SCALE_COLOURS = 7  # in the style sheet: .scale-0 to .scale-6
_KL_TICKS = (1e-4, 1e-3, 1e-2, 1e-1, 1)
_SHARE_TICKS = (0.01, 0.02, 0.04, 0.1, 0.2, 0.4)
_OURS = ("centroid", "centroid_by_head")
_NAMED = ("centroid", "h2o", "scalekv", "hackpp")  # the lines that have room for their names


class Curve(NamedTuple):
    """kind: its class in the style sheet. values: at each step."""

    kind: str
    values: Sequence[float]


def memory_chart(run: Run, curves: Sequence[Curve], height: int = 220) -> Markup:
    """Bytes over the steps of a generation, as stairs; scales are marked below."""
    steps, most = len(run.sizes) * run.layers, max(1.0, *(max(one.values) for one in curves))
    parts = [_y_axis([most * part / 4 for part in range(5)], most, height)]
    for scale, size in enumerate(run.sizes):
        x = _x(scale * run.layers / steps)
        parts.append(_line("grid", x, TOP, x, height - BOTTOM))
        if steps / run.layers <= 16 or scale % 2 == 0:
            centre = _x((scale + 0.5) * run.layers / steps)
            parts.append(_text(centre, height - BOTTOM + 14, _size(size), "middle"))
    parts.append(_text(_x(0.5), height - 4, "scales in the order they are drawn", "middle"))
    for curve in curves:
        path = ["M"]
        for step, value in enumerate(curve.values):
            y = _y(value / most, height)
            path += [f"{_x(step / steps):.1f} {y:.1f}", f"{_x((step + 1) / steps):.1f} {y:.1f}"]
        parts.append(Markup(f'<path class="curve {curve.kind}" d="{" ".join(path)}"/>'))
    return Markup("").join(parts)


def frontier_chart(points: Sequence[dict[str, Any]], run: Run, height: int = 380) -> Markup:
    """KL over the share of bytes, both logarithmic: a line for each policy and format, and this
    run.
    """

    def x_of(share: float) -> float:
        return _x(math.log(share / 0.008) / math.log(0.6 / 0.008))

    def y_of(kl: float) -> float:
        return _y(math.log(max(kl, 1e-4) / 1e-4) / math.log(2 / 1e-4), height)

    parts: list[Markup] = []
    for tick in _KL_TICKS:
        parts.append(_line("grid", LEFT, y_of(tick), WIDTH - RIGHT, y_of(tick)))
        parts.append(_text(LEFT - 6, y_of(tick) + 4, f"{tick:g}", "end"))
    for tick in _SHARE_TICKS:
        parts.append(_line("grid", x_of(tick), TOP, x_of(tick), height - BOTTOM))
        parts.append(_text(x_of(tick), height - BOTTOM + 14, f"{100 * tick:g} %", "middle"))
    parts.append(
        _text(_x(0.5), height - 4, "bytes held, of the whole history in bfloat16", "middle")
    )
    lines: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for point in points:
        lines.setdefault((point["policy"], point["kv_dtype"]), []).append(point)
    for (policy, kv_dtype), some in lines.items():
        places = [f"{x_of(one['bytes_share']):.1f} {y_of(one['kl']):.1f}" for one in some]
        kind = f"{'ours' if policy in _OURS else 'others'} {kv_dtype or 'exact'}"
        title = escape(f"{policy}, {kv_dtype or 'exact'} pages")
        parts.append(
            Markup(
                f'<path class="curve {kind}" d="M{" ".join(places)}"><title>{title}</title></path>'
            )
        )
        if kv_dtype is None and policy in _NAMED:
            first = min(some, key=lambda one: float(one["bytes_share"]))
            at = x_of(first["bytes_share"]), y_of(first["kl"])
            parts.append(_text(at[0] + 4, at[1] - 6, policy, "start"))
    if run.quality is not None and run.quality.kl:
        x, y = x_of(min(0.5, max(0.009, run.history_share))), y_of(run.quality.kl)
        parts.append(Markup(f'<circle class="here" cx="{x:.1f}" cy="{y:.1f}" r="7"/>'))
        parts.append(_text(x + 10, y - 10, f"this run: {run.policy}", "start", "strong"))
    return Markup("").join(parts)


def origin_chart(layer: Layer, sizes: Sequence[Sequence[int]]) -> Markup:
    """Where kept tokens lie in the picture, 100 x 100: a circle each, as large as a token of its
    scale; those that stand for several have a rim as thick as the log of how many.
    """
    parts = []
    held = zip(layer.scale, layer.column, layer.line, layer.weight, strict=True)
    for scale, column, line, weight in sorted(held):
        size = sizes[min(len(sizes) - 1, max(0, round(scale)))]
        radius = min(45.0, 45 / max(size))
        rim = min(radius, 0.25 + 0.3 * math.log(max(1.0, weight)))
        kind = min(SCALE_COLOURS - 1, round(scale * (SCALE_COLOURS - 1) / max(1, len(sizes) - 2)))
        parts.append(
            Markup(
                f'<circle class="scale-{kind}" cx="{100 * column:.1f}" cy="{100 * line:.1f}" '
                f'r="{radius:.2f}" stroke-width="{rim:.2f}"/>'
            )
        )
    return Markup("").join(parts)


def _y_axis(ticks: Sequence[float], most: float, height: int) -> Markup:
    parts = []
    for tick in ticks:
        y = _y(tick / most, height)
        parts.append(_line("grid", LEFT, y, WIDTH - RIGHT, y))
        parts.append(_text(LEFT - 6, y + 4, in_units(tick), "end"))
    return Markup("").join(parts)


def _x(part: float) -> float:
    return LEFT + part * (WIDTH - LEFT - RIGHT)


def _y(part: float, height: int) -> float:
    return height - BOTTOM - part * (height - TOP - BOTTOM)


def _size(size: Sequence[int]) -> str:
    return " x ".join(map(str, size if len(size) == 2 else size[1:]))


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> Markup:
    said = escape(text)
    return Markup(
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{said}</text>'
    )
