"""The demo: the bundled model on its own cache and on ours, same seeds, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from kvruntime.adapters import Attachment, attach
from kvruntime.catalogue import VAR_256
from kvruntime.quality import kl_nats, psnr_db
from kvruntime.reference import EmojiVAR, load_classes, load_model
from policies import TORCH_DTYPES

MOST_PICTURES = 10_000
SHOWN = ("full", "centroid", "scalekv", "ams_kv", "streaming_llm", "sliding_window")
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
    budget: float | str,
    count: int,
    seed: int,
    dtype: str,
    progress: Progress | None = None,
    policies: tuple[str, ...] = SHOWN,
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
        with attach(model, budget=_budget_of(options, budget), **options):
            pass
    labels = demo_labels(count)
    total = 1 + len(formats) + len(quantised)
    bar = progress.add_task("drawing", total=total) if progress else None

    def tick(name: str) -> None:
        if progress and bar is not None:
            progress.update(bar, advance=1, description=f"drawn with {name}")

    own = draw_own(model, labels, seed)
    tick("its own cache")
    runs: dict[str, Any] = {}
    pictures = own.pictures
    for options in formats:
        name = options["policy"]
        runs[name], drawn = compare(model, labels, seed, own, budget, options)
        if name == shown:
            pictures = drawn
        tick(name)
    others = []
    for options in quantised:
        run, _ = compare(model, labels, seed, own, budget, options)
        others.append(run)
        tick(f"{options['policy']}, {options['kv_dtype']}")
    report = {
        "version": 1,
        "model": "emoji64",
        "shown": shown,
        "budget": budget,
        "budget_tokens": runs[shown]["budget_tokens"] if shown in runs else None,
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
class Own:
    """What the model's own cache draws and predicts."""

    codes: list[Tensor]
    pictures: Tensor
    logs: list[Tensor]
    seconds: float


def draw_own(model: EmojiVAR, labels: Tensor, seed: int) -> Own:
    """Pictures on the model's own cache, and what it predicts for them."""
    codes, pictures, seconds = _draw(model, labels, seed)
    return Own(codes, pictures, model.teacher_forced(labels, codes), seconds)


def compare(
    model: EmojiVAR,
    labels: Tensor,
    seed: int,
    own: Own,
    budget: float | str,
    options: dict[str, Any],
    watch: Callable[[Attachment], object] = lambda attached: None,
) -> tuple[dict[str, Any], Tensor]:
    """One way to cache against the model's own: the figures, and its pictures. watch: gets the
    attachment before anything is drawn.
    """
    with attach(model, budget=_budget_of(options, budget), **options) as attached:
        watch(attached)
        _, drawn, elapsed = _draw(model, labels, seed)
        stats = attached.stats
        forced = model.teacher_forced(labels, own.codes)
        leaked = attached.stats.live_pages
    psnr = psnr_db(drawn, own.pictures)
    differ = psnr[psnr.isfinite()]  # equal pictures have no finite PSNR
    run: dict[str, Any] = {
        "policy": stats.policy,
        "budget_tokens": stats.budget_tokens,
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
        "plane_bytes": stats.plane_bytes,
        "workspace_bytes": stats.workspace_bytes,
        "baseline_bytes": stats.baseline_bytes,
        "seconds": elapsed,
    }
    if stats.policy == "full" and stats.kv_dtype is None:
        same = all(torch.equal(ours, theirs) for ours, theirs in zip(forced, own.logs, strict=True))
        run["bit_identical"] = same and torch.equal(drawn, own.pictures)
    return run, drawn


def _budget_of(options: dict[str, Any], budget: float | str) -> float | str:
    """full keeps everything, and is what the others are compared with."""
    return 1.0 if options["policy"] == "full" else budget


def _draw(model: EmojiVAR, labels: Tensor, seed: int) -> tuple[list[Tensor], Tensor, float]:
    """Codes per scale, pictures and seconds."""
    began = time.perf_counter()
    codes, pictures = model.generate_codes(labels, seed)
    return codes, pictures, time.perf_counter() - began


def _finite(value: Tensor) -> float | None:
    """JSON has no infinity and no NaN."""
    return float(value) if value.isfinite() else None
