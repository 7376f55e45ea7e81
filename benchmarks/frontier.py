"""What bytes buy: how far the bundled model's pictures are from those of its own cache, at budgets
from a tenth to a fiftieth of the bytes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

import kvruntime
from benchmarks.common import mean_and_error
from kvruntime.demo import demo_labels
from kvruntime.quality import kl_nats, psnr_db
from kvruntime.reference import load_model

BATCH = 16  # pictures at a time
SEED = 20_000  # not one of the demo's or of calibration's
POINTS: tuple[tuple[str, str | None, float | str], ...] = (  # policy, kv_dtype, budget
    ("scalekv", None, 0.10),  # the others are paired with this one
    ("centroid", "int4", "10%"),
    ("centroid", "int4", "4%"),
    ("centroid", "int4", "2%"),
    ("centroid", None, 0.10),
    ("scalekv", "int4", "10%"),
    ("full", "int4", 1.0),
    ("streaming_llm", None, 0.10),
)


@dataclass(slots=True)
class _Point:
    """What is known of one way to cache, batch by batch."""

    psnr: list[Tensor] = field(default_factory=list)
    kl: float = 0.0  # summed over pictures
    seconds: float = 0.0
    stats: kvruntime.Stats | None = None


def run(
    progress: Progress | None,
    pictures: int = 64,
    points: int = 4,
    seed: int = SEED,
) -> list[dict[str, Any]]:
    """The first ``points`` of POINTS over the same pictures, in bfloat16."""
    model = load_model(torch.bfloat16)
    chosen, labels = POINTS[:points], demo_labels(pictures)
    found = [_Point() for _ in chosen]
    starts = range(0, pictures, BATCH)
    bar = progress.add_task("drawing", total=len(starts) * (1 + points)) if progress else None
    for start in starts:
        batch, first = labels[start : start + BATCH], seed + start
        codes, own = model.generate_codes(batch, first)
        logs = model.teacher_forced(batch, codes)
        if progress and bar is not None:
            progress.advance(bar)
        for point, (policy, kv_dtype, budget) in zip(found, chosen, strict=True):
            with kvruntime.attach(model, policy, budget, kv_dtype=kv_dtype) as attached:
                began = time.perf_counter()
                drawn = model.generate_codes(batch, first)[1]
                point.seconds += time.perf_counter() - began
                if start == 0:
                    point.stats = attached.stats
                forced = model.teacher_forced(batch, codes)
            point.psnr.append(psnr_db(drawn.float(), own.float()))
            point.kl += len(batch) * kl_nats(forced, logs)
            if progress and bar is not None:
                progress.advance(bar)
    base = torch.cat(found[0].psnr)
    return [
        _result(point, *options, base, pictures)
        for point, options in zip(found, chosen, strict=True)
    ]


def _result(
    point: _Point,
    policy: str,
    kv_dtype: str | None,
    budget: float | str,
    base: Tensor,
    pictures: int,
) -> dict[str, Any]:
    stats = point.stats
    assert stats is not None
    psnr = torch.cat(point.psnr)
    differs = psnr.isfinite()
    both = differs & base.isfinite()
    held = stats.page_bytes * stats.peak_pages / stats.planned_pages
    return {
        "policy": policy,
        "kv_dtype": kv_dtype,
        "budget": budget,
        "bytes_share": held / stats.history_bytes,
        "tokens": stats.budget_tokens,
        "page_size": stats.page_size,
        "kv_start": stats.kv_start,
        "pictures": pictures,
        "identical_pictures": int((~differs).sum()),
        "kl": point.kl / pictures,
        "psnr_db": float(psnr[differs].mean()) if bool(differs.any()) else None,
        "paired_db": mean_and_error((psnr - base)[both].tolist()),
        "seconds": point.seconds,
    }
