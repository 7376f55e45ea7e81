"""The frontier as a picture: quality against bytes, one line a policy and format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

_BASELINES = ("random", "sliding_window", "streaming_llm")
_STYLES = {None: "-", "int4": "--", "coded3": ":"}
_OURS = {"centroid": "black", "centroid_by_head": "teal"}
_TICKS = (1, 2, 4, 10, 20, 40)


def save_plot(results: dict[str, Any], path: Path) -> None:
    """KL and PSNR over the bytes really held, both with their 95 % intervals."""
    policies = list(dict.fromkeys(point["policy"] for point in results["points"]))
    published = [name for name in policies if name not in (*_BASELINES, *_OURS)]
    colours = {name: plt.get_cmap("tab10")(place) for place, name in enumerate(published)}
    colours |= _OURS
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.2), constrained_layout=True)
    for axis, what in zip(axes, ("kl", "psnr_db"), strict=True):
        for policy in policies:
            for kv_dtype in _STYLES:
                _line(axis, results, policy, kv_dtype, what, colours.get(policy, "0.65"))
        axis.set_xscale("log")
        axis.set_xticks(_TICKS, [f"{tick} %" for tick in _TICKS])
        axis.minorticks_off()
        axis.set_xlabel("bytes held at the peak, of the whole history in bfloat16")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("KL to the model's own cache, nats (lower is better)")
    axes[1].set_ylabel("PSNR to the own cache's pictures, dB (higher is better)")
    handles = [
        Line2D([], [], color=colours.get(name, "0.65"), lw=3 if name in _OURS else 1.5)
        for name in policies
    ]
    styles = [
        Line2D([], [], color="0.3", ls=style, marker="o", ms=4, markerfacecolor=_inside(kv_dtype))
        for kv_dtype, style in _STYLES.items()
    ]
    figure.legend(
        [*handles, *styles],
        [*policies, *(f"{kv_dtype or 'exact'} pages" for kv_dtype in _STYLES)],
        loc="outside right center",
        frameon=False,
    )
    figure.suptitle(
        f"What bytes buy on the bundled model, {results['pictures']} pictures of classes and seeds "
        "that nothing was chosen by"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _inside(kv_dtype: str | None, colour: Any = "0.3") -> Any:
    """What fills a marker: coded points are full like exact ones, on another line."""
    return "white" if kv_dtype == "int4" else colour


def _line(
    axis: Any, results: dict[str, Any], policy: str, kv_dtype: str | None, what: str, colour: Any
) -> None:
    points = sorted(
        (
            (100 * point["bytes_share"], point[what])
            for point in results["points"]
            if (point["policy"], point["kv_dtype"]) == (policy, kv_dtype)
            and point[what]["mean"] is not None
        ),
        key=lambda pair: pair[0],
    )
    if not points:
        return
    shares = [share for share, _ in points]
    ours = policy in _OURS
    axis.plot(
        shares,
        [value["mean"] for _, value in points],
        color=colour,
        ls=_STYLES[kv_dtype],
        lw=2.8 if ours else 1.2,
        marker="o",
        ms=6 if ours else 3.5,
        markerfacecolor=_inside(kv_dtype, colour),
        zorder=3 if ours else 2,
    )
    if all(value["low"] is not None for _, value in points):
        lows, highs = ([value[end] for _, value in points] for end in ("low", "high"))
        axis.fill_between(shares, lows, highs, color=colour, alpha=0.10, lw=0)
