"""What a card carries, as a picture: the pool over time under both rules, and every policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.fleet import CLOCKS, saturated
from benchmarks.fleet_card import Kind, kind_of
from kvruntime.planning import plan

_PEAKS = 8  # of the pool whose pages are drawn over time
_RESERVED, _STAGGERED, _BOUND = "0.6", "teal", "0.85"


def save_plot(results: dict[str, Any], path: Path) -> None:
    """Left: pages granted and generations that draw, over time. Right: generations at a time."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.4), constrained_layout=True)
    kind = kind_of(plan("infinity-2b", 2, "full", 1.0), CLOCKS["device"])
    _over_time(axes[0], kind, False, "each reserves its peak", _RESERVED)
    _over_time(axes[1], kind, True, "admission: staggered", _STAGGERED)
    _every_policy(axes[2], [one for one in results["carried"] if one["peaks"] == _PEAKS])
    figure.suptitle(
        f"Infinity-2B, one picture of 1M a request, a pool of {_PEAKS} peaks: what it carries"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _over_time(axis: Axes, kind: Kind, is_staggered: bool, title: str, colour: str) -> None:
    card = saturated(kind, _PEAKS, is_staggered)
    seconds, held, drawing = (np.array(each) for each in zip(*card.trace, strict=True))
    shown = seconds <= 6 * kind.seconds.sum()
    times = seconds[shown] / kind.seconds.sum()
    share = 100 * held[shown] / card.ledger.num_pages
    axis.fill_between(times, share, step="post", color=colour, alpha=0.5, lw=0)
    axis.set_ylim(0, 105)
    axis.set_xlim(0, 6)
    axis.set_xlabel("time, in generations drawn alone")
    axis.set_ylabel("pages granted, % of the pool")
    axis.set_title(title)
    count = axis.twinx()
    count.step(times, drawing[shown], where="post", color="black", lw=1)
    count.set_ylim(0, 2.2 * _PEAKS)
    count.set_ylabel("generations that draw (line)")


def _every_policy(axis: Axes, carried: list[dict[str, Any]]) -> None:
    places = -np.arange(len(carried))

    def bars(what: str, at: float, width: float, colour: str, label: str) -> None:
        lengths = [one[what] for one in carried]
        axis.barh(places + at, lengths, width, color=colour, label=label)

    bars("bound", 0, 0.8, _BOUND, "bound: peak / mean")
    bars("reserved", 0.2, 0.35, _RESERVED, "each reserves its peak")
    bars("staggered", -0.2, 0.35, _STAGGERED, "staggered")
    labels = [
        one["policy"] + ("" if one["clock"] == "device" else "\nsteps of 1.5 ms at least")
        for one in carried
    ]
    axis.set_yticks(places, labels, fontsize=8)
    axis.set_xlabel("generations that draw at a time")
    axis.legend(frameon=False, loc="lower right")
