"""The demo's pictures: side by side with the difference, and what formats cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kvruntime.catalogue import VAR_256
from kvruntime.demo.trio import Drawn
from kvruntime.extras import extra
from kvruntime.report.record import Picture
from kvruntime.sizes import in_units

PICTURES_SHOWN = 8


def _pyplot() -> Any:
    """matplotlib without a window, imported when there is something to draw."""
    with extra("cli"):
        import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(report: dict[str, Any], own: Tensor, ours: Tensor, path: Path) -> None:
    """Three rows: the model's own cache, the runtime, four times their difference on grey."""
    plt = _pyplot()
    shown = min(PICTURES_SHOWN, own.shape[0])
    difference = (0.5 + 4 * (ours - own)).clamp(0, 1)
    run = report["runs"][report["shown"]]
    history_bytes = run["baseline_bytes"] * VAR_256.history / VAR_256.total
    share = 100 * run["token_bytes"] / history_bytes
    titles = (
        "own cache",
        f"{report['shown']}\n{share:.1f} % of history",
        "difference\n(4 x)",
    )
    figure, axes = plt.subplots(3, shown, figsize=(1.25 * shown + 1.2, 4.2), squeeze=False)
    for row, (title, pictures) in enumerate(zip(titles, (own, ours, difference), strict=True)):
        for column in range(shown):
            axis = axes[row][column]
            axis.imshow(pictures[column].permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
        axes[row][0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
    figure.subplots_adjust(left=1.35 / (1.25 * shown + 1.2), right=0.995, top=0.99, bottom=0.01)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_trio(own: Tensor, own_bytes: int, drawn: Sequence[Drawn], path: Path) -> None:
    """A row for the model's own cache and each other one: bytes in front, PSNR under each."""
    plt = _pyplot()
    shown = min(PICTURES_SHOWN, own.shape[0])
    rows = [("its own cache", own_bytes, own, [""] * shown)]
    for one in drawn:
        under = [_decibels(picture) for picture in one.run.pictures[:shown]]
        rows.append((one.name.replace(", ", "\n"), one.run.bytes.pages, one.pictures, under))
    figure, axes = plt.subplots(len(rows), shown, figsize=(1.3 * shown + 1.9, 4.7), squeeze=False)
    for line, (name, size, pictures, under) in zip(axes, rows, strict=True):
        for axis, picture, text in zip(line, pictures, under, strict=False):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(text, fontsize=8, labelpad=2)
            axis.spines[:].set_visible(False)
        label = f"{name}\n{in_units(size)}"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
    left = 1.85 / (1.3 * shown + 1.9)
    figure.subplots_adjust(left=left, right=0.995, top=0.99, bottom=0.05, hspace=0.12, wspace=0.04)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _decibels(picture: Picture) -> str:
    return "equal" if picture.psnr_db is None else f"{picture.psnr_db:.1f} dB"


def save_memory(drawn: Sequence[Drawn], path: Path) -> None:
    """Bytes over the generation: the own cache, and of each other the plan and what it used."""
    plt = _pyplot()
    first = drawn[0].run
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), constrained_layout=True)
    steps = range(len(first.curves.own) + 1)
    for axis, with_own in zip(axes, (True, False), strict=True):
        if with_own:
            axis.stairs([n / 2**20 for n in first.curves.own], steps, color="0.45", lw=1.5)
            axis.plot([], [], color="0.45", label="own cache, with torch.cat's copies")
        for one, colour in zip(drawn, ("tab:orange", "tab:blue"), strict=True):
            planned, used = (
                [n / 2**20 for n in curve]
                for curve in (one.run.curves.planned, one.run.curves.used)
            )
            axis.stairs(planned, steps, color=colour, lw=4, alpha=0.35)
            axis.stairs(used, steps, color=colour, lw=1.2)
            axis.plot([], [], color=colour, label=one.name)
        marks = [first.layers * scale for scale in range(len(first.sizes))]
        axis.set_xticks(marks, ["x".join(map(str, size)) for size in first.sizes], fontsize=7)
        axis.set_xlabel("scale")
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("MiB")
    axes[0].legend(fontsize=8, frameon=False)
    axes[1].set_title("the same, closer: thick as planned, thin as used", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


_COLOURS = {
    None: "black",
    "int4": "tab:blue",
    "int2": "tab:orange",
    "int8": "tab:green",
    "coded2": "tab:red",
    "coded3": "tab:purple",
    "coded4": "tab:brown",
}


def save_formats(report: dict[str, Any], path: Path) -> None:
    """PSNR and KL of every format against the bytes it keeps, with and without the start scale."""
    plt = _pyplot()
    exact = report["runs"]["full"]["token_bytes"]
    runs = [run for run in report["runs"].values() if run["policy"] == "scalekv"]
    runs += report["quantised"]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.9))
    shown = {run["kv_dtype"] for run in runs}
    for axis, name in zip(axes, ("PSNR, dB", "KL, nats"), strict=True):
        for run in runs:
            value = run["kl"] if name == "KL, nats" else run["psnr_db"]["mean"]
            late = run["kv_start"] != 0
            axis.scatter(
                100 * run["token_bytes"] / exact,
                value,
                marker="o" if run["policy"] == "full" else "^",
                facecolors=_COLOURS[run["kv_dtype"]] if late else "none",
                edgecolors=_COLOURS[run["kv_dtype"]],
            )
        axis.set_xscale("log")
        axis.set_xticks([1, 2, 5, 10, 20], labels=["1", "2", "5", "10", "20"])
        axis.set_xlabel("bytes kept, % of the exact cache")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    for label, marker, colour, filled in (
        ("full", "o", "grey", True),
        ("scalekv", "^", "grey", True),
        *(
            (name or "exact", "s", colour, True)
            for name, colour in _COLOURS.items()
            if name in shown
        ),
        ("from scale 0 on", "s", "grey", False),
    ):
        face = colour if filled else "none"
        axes[0].scatter([], [], marker=marker, facecolors=face, edgecolors=colour, label=label)
    axes[0].legend(fontsize=8, ncols=2, loc="upper left")
    figure.suptitle(
        f"{report['count']} emoji, {report['dtype']}, scalekv at {report['budget']}", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
