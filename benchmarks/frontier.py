"""What bytes buy: how far the bundled model's pictures are from those of its own cache, for every
policy at shares of the bytes from 40 % down to 1 %.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.frontier_point import REFERENCE, Point, draw, make_reference
from kvruntime.quality import mean_interval
from policies import POLICY_NAMES

SEED = 30_000  # not one of the demo's, of calibration's or of those that anything was chosen by
PICTURES, QUICK_PICTURES = 200, 24
SHARES = ("10%", "2%", "4%", "1%", "20%", "40%")
FORMATS = (None, "int4", "coded3")
CODED_TOO = ("scalekv", "centroid", "centroid_by_head")  # the others in the first two formats
DTYPES = ("bfloat16", "float32")
OURS = ("centroid", "centroid_by_head", "full")
POLICIES = tuple(name for name in POLICY_NAMES if name != "full")
QUICK = tuple(
    Point(policy, kv_dtype, share)
    for policy, kv_dtype, share in (
        ("random", None, "10%"),
        ("scalekv", None, "10%"),
        ("h2o", None, "10%"),
        ("centroid", None, "10%"),
        ("centroid", "int4", "10%"),
        ("centroid", "coded3", "10%"),
        ("centroid", "coded3", "2%"),
    )
)


def points(policies: tuple[str, ...] = POLICIES) -> list[Point]:
    """Every policy at every share and format."""
    return [
        Point(policy, kv_dtype, share)
        for share in SHARES
        for policy in policies
        for kv_dtype in FORMATS
        if kv_dtype != "coded3" or policy in CODED_TOO
    ]


def run(
    progress: Progress | None,
    chosen: list[Point],
    pictures: int = PICTURES,
    seed: int = SEED,
    work: Path | None = None,
    dtype: str = DTYPES[0],
) -> dict[str, Any]:
    """All of ``chosen`` over the same pictures, in as many processes as there are cores.

    dtype: what the model computes in; shares stay those of bfloat16.
    work: a folder that keeps what is done, so that the next call goes on from there.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        settings = {"pictures": pictures, "seed": seed, "dtype": dtype}
        _prepare(folder, settings)
        done = {point: _load(folder, point) for point in chosen}
        left = [point for point, result in done.items() if result is None]
        bar = progress.add_task("drawing", total=len(chosen)) if progress else None
        if progress and bar is not None:
            progress.advance(bar, len(chosen) - len(left))
        context = multiprocessing.get_context("spawn")  # a fork of torch's threads would hang
        workers = max(1, min(os.cpu_count() or 1, len(left)))
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            jobs = {pool.submit(draw, point, folder, **settings): point for point in left}
            for job in as_completed(jobs):
                point = jobs[job]
                done[point] = job.result()
                _path(folder, point).write_text(json.dumps(done[point]))
                if progress and bar is not None:
                    progress.update(bar, advance=1, description=point.name)
    return results([result for result in done.values() if result is not None], pictures)


def _prepare(folder: Path, settings: dict[str, Any]) -> None:
    """The reference, unless the folder has it. Raises ValueError for one of other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "settings.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        raise ValueError(f"{folder} holds points of {note.read_text()}: take another folder")
    if not (note.exists() and (folder / REFERENCE).exists()):
        make_reference(folder, **settings)
        note.write_text(json.dumps(settings))


def _path(folder: Path, point: Point) -> Path:
    return folder / f"{point.name}.json"


def _load(folder: Path, point: Point) -> dict[str, Any] | None:
    path = _path(folder, point)
    return json.loads(path.read_text()) if path.exists() else None


def results(drawn: list[dict[str, Any]], pictures: int) -> dict[str, Any]:
    """Figures over all pictures; each point paired with the best published one, exact at 10 %."""
    refused = [result for result in drawn if "refused" in result]
    there = [result for result in drawn if "refused" not in result]
    published = [
        result
        for result in there
        if result["policy"] not in (*OURS, "random")
        and result["share"] == "10%"
        and result["kv_dtype"] is None
    ]
    base = min(published, key=lambda result: statistics.fmean(result["kl"]), default=None)
    return {
        "pictures": pictures,
        "base": base and base["policy"],
        "points": [_summary(result, base) for result in there],
        "refused": refused,
    }


def _summary(result: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    per_picture = ("psnr", "ssim", "kl")
    plain = {name: value for name, value in result.items() if name not in per_picture}
    differs = [value for value in result["psnr"] if math.isfinite(value)]
    paired, ratio = None, None
    if base is not None:
        both = zip(result["psnr"], base["psnr"], strict=True)
        paired = mean_interval([a - b for a, b in both if math.isfinite(a) and math.isfinite(b)])
        ratio = statistics.fmean(result["kl"]) / statistics.fmean(base["kl"])
    return plain | {
        "identical_pictures": len(result["psnr"]) - len(differs),
        "psnr_db": mean_interval(differs),
        "ssim": mean_interval(result["ssim"]),
        "kl": mean_interval(result["kl"]),
        "paired_db": paired,
        "kl_ratio": ratio,
    }
