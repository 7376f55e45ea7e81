"""Cost of taking and giving back many pages at once, beside a manager that handles them one by
one.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.progress import Progress

from allocator import PageAllocator
from benchmarks.common import interleaved, ratios, spread

PAGES = 16 * 28 * 100  # rows x heads x pages of a lane: one layer of Infinity-8B, eight pictures
POOL_SIZES = (1_000, 10_000, 100_000, 1_000_000)
CALL = 1_000
PAIRS = 20  # calls timed together, of one manager before the other has its turn


@dataclass(slots=True)
class _Page:
    page_id: int
    references: int = 0


class PerPageManager:
    """The baseline: records with counts, a deque of free ids, a set of used ones, a call a page.

    Serving engines manage their pages in this shape. It gives the same promises as ours: too few
    pages, a free, foreign or twice named page raise before anything changes.
    """

    def __init__(self, num_pages: int) -> None:
        self._pages = [_Page(page_id) for page_id in range(num_pages)]
        self._free = deque(range(num_pages))
        self._used: set[int] = set()

    def allocate(self, count: int) -> list[int]:
        if count > len(self._free):
            raise MemoryError(f"{count} pages requested, {len(self._free)} free")
        return [self._take() for _ in range(count)]

    def release(self, page_ids: list[int]) -> None:
        if len(set(page_ids)) != len(page_ids):
            raise ValueError("a page is named twice")
        for page_id in page_ids:
            self._check(page_id)
        for page_id in page_ids:
            self._give_back(page_id)

    def _take(self) -> int:
        page = self._pages[self._free.popleft()]
        page.references = 1
        self._used.add(page.page_id)
        return page.page_id

    def _check(self, page_id: int) -> None:
        if page_id not in self._used:
            raise ValueError(f"page {page_id} is foreign or free")

    def _give_back(self, page_id: int) -> None:
        page = self._pages[page_id]
        page.references -= 1
        if page.references == 0:
            self._used.remove(page_id)
            self._free.append(page_id)


def run(repeats: int, progress: Progress | None) -> dict[str, Any]:
    ours, theirs = PageAllocator(PAGES), PerPageManager(PAGES)

    def our_pairs() -> None:
        for _ in range(PAIRS):
            ours.release(ours.allocate(PAGES))

    def their_pairs() -> None:
        for _ in range(PAIRS):
            theirs.release(theirs.allocate(PAGES))

    times = interleaved({"arrays": our_pairs, "page by page": their_pairs}, 2 * repeats, progress)
    speedups = ratios(times["page by page"], times["arrays"])
    return {
        "pages": PAGES,
        "pair_ms": 1e3 * statistics.median(times["arrays"]) / PAIRS,
        "per_page_pair_ms": 1e3 * statistics.median(times["page by page"]) / PAIRS,
        "speedup_vs_per_page": statistics.median(speedups),
        "speedup_spread": spread(speedups),
        "call_pages": CALL,
        "ns_per_page_by_pool_size": {str(size): _ns_per_page(size) for size in POOL_SIZES},
    }


def _ns_per_page(num_pages: int) -> float:
    """Taking and giving back CALL pages of a pool whose free ids lie in random order."""
    allocator = PageAllocator(num_pages)
    allocator.allocate(num_pages)
    allocator.release(np.random.default_rng(0).permutation(num_pages))
    times = []
    for _ in range(300):
        began = time.perf_counter()
        allocator.release(allocator.allocate(CALL))
        times.append(time.perf_counter() - began)
    return 1e9 * statistics.median(times) / CALL
