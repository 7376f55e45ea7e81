"""The demo: the bundled model on its own cache and on ours, same seeds, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from kvruntime.adapters import attach
from kvruntime.catalogue import VAR_256
from kvruntime.pool import TORCH_DTYPES
from kvruntime.quality import kl_nats, psnr_db
from kvruntime.reference import EmojiVAR, load_classes, load_model
from policies import POLICY_NAMES

PICTURES_SHOWN, MOST_PICTURES = 8, 10_000
FORMATS: list[dict[str, Any]] = [
    {"policy": policy, "kv_dtype": kv_dtype, "kv_groups": groups, "kv_start": start}
    for policy in ("full", "scalekv")
    for kv_dtype, groups in (("int4", 1), ("int4", 2), ("int4", 4), ("int2", 1), ("int2", 2))
    for start in (None, 0)
]


def demo_labels(count: int) -> Tensor:
    """Labels [count]: the classes in turn."""
    return torch.arange(count) % len(load_classes())


def run_demo(
    shown: str,
    budget: float,
    count: int,
    seed: int,
    dtype: str,
    progress: Progress | None = None,
    policies: tuple[str, ...] = POLICY_NAMES,
    pages: dict[str, Any] | None = None,
    compare_formats: bool = True,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Draw ``count`` pictures on the model's own cache and with each policy.

    pages: kv_dtype, kv_groups and kv_start of these. compare_formats: full and scalekv once more
    with every int4 and int2 format, from the planned start scale and from the first.

    Returns the report (docs/policies.md names its fields), the own cache's pictures and those of
    policy ``shown``, [count, 3, 64, 64].
    """
    if not 0 < count <= MOST_PICTURES:
        raise ValueError(f"count must be in 1..{MOST_PICTURES}, got {count}")
    model = load_model(TORCH_DTYPES[dtype])
    formats = [{"policy": name, **(pages or {})} for name in policies]
    quantised = FORMATS if compare_formats else []
    for options in formats:  # what one of them cannot do is refused before the first draw
        with attach(model, budget=budget, **options):
            pass
    labels = demo_labels(count)
    total = 1 + len(formats) + len(quantised)
    bar = progress.add_task("drawing", total=total) if progress else None

    def tick(name: str) -> None:
        if progress and bar is not None:
            progress.update(bar, advance=1, description=f"drawn with {name}")

    own = _own(model, labels, seed)
    tick("its own cache")
    runs: dict[str, Any] = {}
    pictures = own.pictures
    for options in formats:
        name = options["policy"]
        runs[name], drawn = _compare(model, labels, seed, own, budget, options)
        if name == shown:
            pictures = drawn
        tick(name)
    others = []
    for options in quantised:
        run, _ = _compare(model, labels, seed, own, budget, options)
        others.append(run)
        tick(f"{options['policy']}, {options['kv_dtype']}")
    report = {
        "version": 1,
        "model": "emoji64",
        "shown": shown,
        "budget": budget,
        "budget_tokens": VAR_256.resolve(budget),
        "history_tokens": VAR_256.history,
        "count": count,
        "seed": seed,
        "dtype": dtype,
        "own_seconds": own.seconds,
        "runs": runs,
        "quantised": others,
    }
    return report, own.pictures, pictures


@dataclass(frozen=True, slots=True)
class _Own:
    """What the model's own cache draws and predicts."""

    codes: list[Tensor]
    pictures: Tensor
    logs: list[Tensor]
    seconds: float


def _own(model: EmojiVAR, labels: Tensor, seed: int) -> _Own:
    codes, pictures, seconds = _draw(model, labels, seed)
    return _Own(codes, pictures, model.teacher_forced(labels, codes), seconds)


def _compare(
    model: EmojiVAR,
    labels: Tensor,
    seed: int,
    own: _Own,
    budget: float,
    options: dict[str, Any],
) -> tuple[dict[str, Any], Tensor]:
    """One way to cache against the model's own: the figures, and its pictures."""
    with attach(model, budget=budget, **options) as attached:
        _, drawn, elapsed = _draw(model, labels, seed)
        stats = attached.stats
        forced = model.teacher_forced(labels, own.codes)
        leaked = attached.stats.live_pages
    psnr = psnr_db(drawn, own.pictures)
    differ = psnr[psnr.isfinite()]  # equal pictures have no finite PSNR
    run: dict[str, Any] = {
        "policy": stats.policy,
        "kv_dtype": stats.kv_dtype,
        "kv_groups": stats.kv_groups,
        "kv_start": stats.kv_start,
        "psnr_db": {"mean": _finite(differ.mean()), "min": _finite(psnr.min())},
        "identical_pictures": labels.shape[0] - differ.numel(),
        "kl": kl_nats(forced, own.logs),
        "planned_pages": stats.planned_pages,
        "peak_pages": stats.peak_pages,
        "leaked_pages": leaked,
        "token_bytes": stats.token_bytes,
        "page_bytes": stats.page_bytes,
        "workspace_bytes": stats.workspace_bytes,
        "baseline_bytes": stats.baseline_bytes,
        "seconds": elapsed,
    }
    if stats.policy == "full" and stats.kv_dtype is None:
        same = all(torch.equal(ours, theirs) for ours, theirs in zip(forced, own.logs, strict=True))
        run["bit_identical"] = same and torch.equal(drawn, own.pictures)
    return run, drawn


def _draw(model: EmojiVAR, labels: Tensor, seed: int) -> tuple[list[Tensor], Tensor, float]:
    """Codes per scale, pictures and seconds."""
    began = time.perf_counter()
    codes, pictures = model.generate_codes(labels, seed)
    return codes, pictures, time.perf_counter() - began


def _finite(value: Tensor) -> float | None:
    """JSON has no infinity and no NaN."""
    return float(value) if value.isfinite() else None


def print_report(report: dict[str, Any], console: Console) -> None:
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("PSNR", lambda run: _number(run["psnr_db"]["mean"], "inf")),
        ("KL", lambda run: f"{run['kl']:.2g}"),
        ("pages", _pages),
        ("kept MiB", lambda run: f"{run['token_bytes'] / 2**20:.1f}"),
        ("pool MiB", lambda run: f"{run['page_bytes'] / 2**20:.1f}"),
        ("s", lambda run: f"{run['seconds']:.1f}"),
    ]
    title = f"{report['count']} pictures, {report['dtype']}, budget {report['budget']}"
    runs = [*report["runs"].values(), *report["quantised"]]
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(_label(run), *(show(run) for _, show in columns))
    console.print(table)
    console.print(
        "PSNR in dB and KL in nats are against the model's own cache; pages are planned/used; "
        f"{sum(run['leaked_pages'] for run in runs)} pages leaked; its own cache takes "
        f"{runs[0]['baseline_bytes'] / 2**20:.1f} MiB"
    )
    if report["quantised"]:
        console.print("int4/2 @5: 4 bits in 2 groups of scale and shift, from scale 5 on")
    identical = report["runs"].get("full", {}).get("bit_identical")
    if identical is not None:
        console.print(f"full cache bit-identical with the model's own: {identical}")


def _label(run: dict[str, Any]) -> str:
    if run["kv_dtype"] is None:
        return str(run["policy"])
    return f"{run['policy']} {run['kv_dtype']}/{run['kv_groups']} @{run['kv_start']}"


def _pages(run: dict[str, Any]) -> str:
    return f"{run['planned_pages']}/{run['peak_pages']}"


def _number(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.2f}"


def _pyplot() -> Any:
    """matplotlib without a window, imported when there is something to draw."""
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


def save_formats(report: dict[str, Any], path: Path) -> None:
    """PSNR and KL of every format against the bytes it keeps, with and without the start scale."""
    plt = _pyplot()
    exact = report["runs"]["full"]["token_bytes"]
    runs = [run for run in report["runs"].values() if run["policy"] == "scalekv"]
    runs += report["quantised"]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.9))
    colours = {None: "black", "int4": "tab:blue", "int2": "tab:orange"}
    for axis, name in zip(axes, ("PSNR, dB", "KL, nats"), strict=True):
        for run in runs:
            value = run["kl"] if name == "KL, nats" else run["psnr_db"]["mean"]
            late = run["kv_start"] != 0
            axis.scatter(
                100 * run["token_bytes"] / exact,
                value,
                marker="o" if run["policy"] == "full" else "^",
                facecolors=colours[run["kv_dtype"]] if late else "none",
                edgecolors=colours[run["kv_dtype"]],
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
        ("exact", "s", "black", True),
        ("int4", "s", "tab:blue", True),
        ("int2", "s", "tab:orange", True),
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
