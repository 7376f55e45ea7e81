"""The demo: the bundled model on its own cache and on ours, same seeds, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
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
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Draw ``count`` pictures on the model's own cache and with each policy.

    Returns the report (docs/policies.md names its fields), the own cache's pictures and those of
    policy ``shown``, [count, 3, 64, 64].
    """
    if not 0 < count <= MOST_PICTURES:
        raise ValueError(f"count must be in 1..{MOST_PICTURES}, got {count}")
    model = load_model(TORCH_DTYPES[dtype])
    for name in policies:  # a budget that one of them cannot meet is refused before the first draw
        with attach(model, name, budget):
            pass
    labels = demo_labels(count)
    bar = progress.add_task("drawing", total=len(policies) + 1) if progress else None

    def tick(name: str) -> None:
        if progress and bar is not None:
            progress.update(bar, advance=1, description=f"drawn with {name}")

    codes, own, seconds = _draw(model, labels, seed)
    logs = model.teacher_forced(labels, codes)
    tick("its own cache")
    runs: dict[str, Any] = {}
    pictures = own
    for name in policies:
        with attach(model, name, budget) as attached:
            _, drawn, elapsed = _draw(model, labels, seed)
            stats = attached.stats
            forced = model.teacher_forced(labels, codes)
            leaked = attached.stats.live_pages
        psnr = psnr_db(drawn, own)
        differ = psnr[psnr.isfinite()]  # equal pictures have no finite PSNR
        run: dict[str, Any] = {
            "psnr_db": {"mean": _finite(differ.mean()), "min": _finite(psnr.min())},
            "identical_pictures": count - differ.numel(),
            "kl": kl_nats(forced, logs),
            "planned_pages": stats.planned_pages,
            "peak_pages": stats.peak_pages,
            "leaked_pages": leaked,
            "token_bytes": stats.token_bytes,
            "page_bytes": stats.page_bytes,
            "workspace_bytes": stats.workspace_bytes,
            "baseline_bytes": stats.baseline_bytes,
            "seconds": elapsed,
        }
        if name == "full":
            same = all(torch.equal(ours, theirs) for ours, theirs in zip(forced, logs, strict=True))
            run["bit_identical"] = same and torch.equal(drawn, own)
        if name == shown:
            pictures = drawn
        runs[name] = run
        tick(name)
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
        "own_seconds": seconds,
        "runs": runs,
    }
    return report, own, pictures


def _draw(model: EmojiVAR, labels: Tensor, seed: int) -> tuple[list[Tensor], Tensor, float]:
    """Codes per scale, pictures and seconds."""
    began = time.perf_counter()
    codes, pictures = model.generate_codes(labels, seed)
    return codes, pictures, time.perf_counter() - began


def _finite(value: Tensor) -> float | None:
    """JSON has no infinity and no NaN."""
    return float(value) if value.isfinite() else None


def print_report(report: dict[str, Any], console: Console) -> None:
    title = f"{report['count']} pictures, {report['dtype']}, budget {report['budget']}"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("PSNR", lambda run: _number(run["psnr_db"]["mean"], "inf")),
        ("KL", lambda run: f"{run['kl']:.4f}"),
        ("pages", _pages),
        ("kept MiB", lambda run: f"{run['token_bytes'] / 2**20:.1f}"),
        ("pool MiB", lambda run: f"{run['page_bytes'] / 2**20:.1f}"),
        ("own MiB", lambda run: f"{run['baseline_bytes'] / 2**20:.1f}"),
        ("s", lambda run: f"{run['seconds']:.2f}"),
    ]
    table.add_column("policy", no_wrap=True)
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for name, run in report["runs"].items():
        table.add_row(name, *(show(run) for _, show in columns))
    console.print(table)
    console.print(
        "PSNR in dB and KL in nats are against the model's own cache; pages are planned/used; "
        f"{sum(run['leaked_pages'] for run in report['runs'].values())} pages leaked"
    )
    identical = report["runs"].get("full", {}).get("bit_identical")
    if identical is not None:
        console.print(f"full cache bit-identical with the model's own: {identical}")


def _pages(run: dict[str, Any]) -> str:
    return f"{run['planned_pages']}/{run['peak_pages']}"


def _number(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.2f}"


def save_picture(report: dict[str, Any], own: Tensor, ours: Tensor, path: Path) -> None:
    """Three rows: the model's own cache, the runtime, four times their difference on grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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
