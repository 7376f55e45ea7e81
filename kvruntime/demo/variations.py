"""Pictures that share their coarse scales: drawn once up to a scale, then several ways."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvruntime.adapters import attach
from kvruntime.catalogue import VAR_256
from kvruntime.demo.compare import demo_labels
from kvruntime.extras import extra
from kvruntime.reference import load_model
from kvruntime.report.capture import image_of
from kvruntime.sizes import check_positive

with extra("cli"):
    from PIL import Image

_ENLARGED = 2  # 64 pixels are few


def draw_variations(
    from_scale: int,
    count: int,
    pictures: int,
    seed: int,
    policy: str,
    budget: int | float | str,
    **options: Any,
) -> tuple[dict[str, Any], Tensor]:
    """``count`` variations of each of so many pictures of the bundled model, alike up to
    ``from_scale``. options: as ``attach`` takes them.

    Returns the figures, and pictures [pictures, count, 3, 64, 64], of which the first of each row
    is the one that would be drawn without variations. apart_pages: what as many pictures need that
    share nothing. Raises ValueError for numbers that cannot be.
    """
    check_positive("count", count)
    check_positive("pictures", pictures)
    scales = len(VAR_256)
    if not 0 < from_scale < scales:
        raise ValueError(f"from-scale must be in 1..{scales - 1}, got {from_scale}")
    model = load_model(torch.float32)
    branch = from_scale, count
    with attach(model, policy, budget, **options) as attached:
        plan = attached.plan(pictures, branch=branch)
        apart = attached.plan(pictures * count)
        began = time.perf_counter()
        _, drawn = model.generate_codes(demo_labels(pictures), seed, branch=branch)
        seconds = time.perf_counter() - began
        stats = attached.stats
    figures = {
        "from_scale": from_scale,
        "count": count,
        "pictures": pictures,
        "seed": seed,
        "policy": stats.policy,
        "budget_tokens": stats.budget_tokens,
        "kv_dtype": stats.kv_dtype,
        "page_size": stats.page_size,
        "shared_pages": int(plan.occupancy.at_start[from_scale]),
        "planned_pages": plan.peak_pages,
        "peak_pages": stats.peak_pages,
        "apart_pages": apart.peak_pages,
        "page_bytes": stats.page_bytes,
        "apart_page_bytes": apart.page_bytes,
        "seconds": seconds,
    }
    return figures, drawn.view(pictures, count, *drawn.shape[1:])


def check_out(path: Path) -> None:
    """Raise ValueError where no picture can be written, before anything is drawn."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{path} cannot be written: it is a folder, or its folder is missing")
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path}: no kind of picture is called {path.suffix or 'so'}, give a .png")


def save_grid(pictures: Tensor, path: Path) -> None:
    """A PNG of pictures [rows, columns, 3, height, width] in [0, 1]."""
    rows, columns, _, height, width = pictures.shape
    image = image_of(pictures.permute(2, 0, 3, 1, 4).reshape(3, rows * height, columns * width))
    image.resize((_ENLARGED * image.width, _ENLARGED * image.height), 0).save(path)
