"""How many pictures a process draws whose memory may grow by so much and no more: the operating
system refuses the rest. What it consists of, when it draws as many as it can.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import Progress

import kvruntime
from kvruntime.reference import load_model

GROWTH = 256 * 2**20  # bytes beyond the loaded model
CACHES: dict[str, tuple[str, float | str, str | None] | None] = {
    "its own": None,
    "full": ("full", 1.0, None),
    "scalekv 10 %": ("scalekv", 0.10, None),
    "centroid int4 2 %": ("centroid", "2%", "int4"),
}
WITHIN = 0.04  # of the number that is looked for
REFUSED = 3


def run(progress: Progress, growth: int = GROWTH) -> dict[str, Any]:
    """For each cache the most pictures that are drawn, and how the attempt at more ended."""
    bar = progress.add_task("processes", total=len(CACHES))
    fits: list[dict[str, Any]] = []
    for name in CACHES:
        found, beyond = most_pictures(name, growth)
        own = fits[0]["pictures"] if fits else found["pictures"]
        fits.append({"cache": name, **found, "times_own": found["pictures"] / own, "more": beyond})
        progress.advance(bar)
    return {"model": "emoji64", "growth_bytes": growth, "fits": fits}


def most_pictures(name: str, growth: int) -> tuple[dict[str, Any], str]:
    """What the process with the most pictures tells, and how one with some more ended."""
    best: dict[str, Any] | None = None
    pictures, beyond, ended = 1, None, ""
    while True:
        told, how = attempt(name, pictures, growth)
        if told is not None:
            best = told
        else:
            beyond, ended = pictures, how
        least = 0 if best is None else best["pictures"]
        if beyond is not None and beyond - least <= max(1, int(WITHIN * beyond)):
            break
        pictures = 2 * pictures if beyond is None else (least + beyond) // 2
    if best is None:
        raise MemoryError(f"{name}: not one picture is drawn within {growth} bytes: {ended}")
    return best, ended


def attempt(name: str, pictures: int, growth: int) -> tuple[dict[str, Any] | None, str]:
    """A process that draws so many: what it tells, or None and why."""
    command = [sys.executable, "-m", "benchmarks.whole_process", name, str(pictures), str(growth)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if done.returncode == 0:
        return json.loads(done.stdout), ""
    if done.returncode == REFUSED:
        return None, "refused before it drew"
    if not re.search(r"not enough memory|can't allocate|MemoryError|bad_alloc", done.stderr):
        raise RuntimeError(f"{name}, {pictures} pictures: {done.stderr[-2000:]}")
    return None, "died while it drew"


def _draw(name: str, pictures: int, growth: int) -> dict[str, Any]:
    """In the process: bytes of it by kind. rest: what layers compute, and what the allocator
    keeps.
    """
    me = psutil.Process()
    libraries = me.memory_info().rss
    model = load_model()
    weights = sum(part.nbytes for part in model.state_dict().values())
    model.generate(torch.tensor([0]))  # torch's own tables
    limit = me.memory_info().data + growth
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    labels, cache = torch.arange(pictures) % model.num_classes, CACHES[name]
    own = pages = workspace = 0
    if cache is None:
        with kvruntime.attach(model, "full", 1.0) as attached:
            own = attached.plan(pictures).baseline_bytes()["all_scales_bytes"]
        model.generate(labels)
    else:
        policy, budget, kv_dtype = cache
        with kvruntime.attach(model, policy, budget, kv_dtype=kv_dtype) as attached:
            model.generate(labels)
            pages, workspace = attached.stats.page_bytes, attached.stats.workspace_bytes
    status = Path("/proc/self/status").read_text()  # getrusage remembers what forked it
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", status)
    most = 1024 * int(kilobytes)
    known = {
        "libraries": libraries,
        "weights": weights,
        "own_cache": own,
        "pages": pages,
        "workspace": workspace,
    }
    return {"pictures": pictures, "bytes": {**known, "rest": most - sum(known.values())}}


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CACHES)
    parser.add_argument("pictures", type=int)
    parser.add_argument("growth", type=int)
    asked = parser.parse_args()
    try:
        told = _draw(asked.name, asked.pictures, asked.growth)
    except kvruntime.WillNeverFit as error:
        print(error, file=sys.stderr)
        return REFUSED
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
