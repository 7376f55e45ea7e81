"""Hands out page ids from a fixed range, whole arrays at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocator.errors import OutOfPages, PageStateError

PageIds = NDArray[np.int32]


class PageAllocator:
    """Owns the ids 0 .. num_pages - 1; never touches tensors.

    Always:
        num_free + num_live == num_pages
        a page is on the free stack exactly when it has no reference
        the ids on the free stack are distinct
        num_live <= high_water <= num_pages

    Every call costs O(ids in the call), whatever the size of the pool, and changes either
    everything or nothing. Ids may come in any shape; the ones that name pages must be distinct
    within a call.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages <= 0:
            raise ValueError(f"num_pages must be positive, got {num_pages}")
        self.num_pages = num_pages
        self.num_free = num_pages
        self.high_water = 0
        self._stack: PageIds = np.arange(num_pages, dtype=np.int32)[::-1].copy()
        self._references: PageIds = np.zeros(num_pages, dtype=np.int32)
        self._seen: PageIds = np.zeros(num_pages, dtype=np.int32)  # scratch of _distinct

    @property
    def num_live(self) -> int:
        return self.num_pages - self.num_free

    def references(self, pages: ArrayLike) -> PageIds:
        """How many owners each page has; 0 for a free one. Raises PageStateError for a foreign
        id.
        """
        return self._references.take(self._known(pages))

    def allocate(self, count: int) -> PageIds:
        """Take ``count`` pages with one reference each. Raises OutOfPages, taking none, if too few
        are free.
        """
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        if count > self.num_free:
            raise OutOfPages(count, self.num_free, self.num_pages)
        pages = self._stack[self.num_free - count : self.num_free].copy()
        self._references[pages] = 1
        self.num_free -= count
        self.high_water = max(self.high_water, self.num_live)
        return pages

    def retain(self, pages: ArrayLike) -> None:
        """Add a reference to each of these live pages. Raises PageStateError, adding none, if one
        is free.
        """
        ids, held = self._live(pages)
        self._references[ids] = held + 1

    def release(self, pages: ArrayLike) -> PageIds:
        """Drop a reference from each of these live pages; return those that became free.

        Raises PageStateError, dropping none, for a page that is free, foreign or named twice.
        """
        ids, held = self._live(pages)
        self._references[ids] = held - 1
        freed: PageIds = ids[held == 1].astype(np.int32)
        self._stack[self.num_free : self.num_free + freed.size] = freed
        self.num_free += freed.size
        return freed

    def reset_high_water(self) -> None:
        """Count the high-water mark from the pages live now."""
        self.high_water = self.num_live

    def check(self) -> None:
        """Assert every invariant. O(num_pages); for tests and idle points."""
        free = self._stack[: self.num_free]
        assert np.unique(free).size == free.size, "a page is on the free stack twice"
        assert not self._references[free].any(), "a free page has references"
        assert np.count_nonzero(self._references > 0) == self.num_live, "pages lost or invented"
        assert (self._references >= 0).all(), "negative reference count"
        assert self.num_live <= self.high_water <= self.num_pages, "high-water mark out of range"

    def _known(self, pages: ArrayLike) -> NDArray[np.intp]:
        """The ids as a flat index array, each in range."""
        given: NDArray[Any] = np.asarray(pages).ravel()
        if given.size == 0:
            return np.empty(0, dtype=np.intp)
        if not np.issubdtype(given.dtype, np.integer):
            raise PageStateError(f"page ids must be integers, got {given.dtype}")
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= self.num_pages:
            foreign = low if low < 0 else high
            raise PageStateError(f"page {foreign} is not one of the {self.num_pages} of this pool")
        return given.astype(np.intp)

    def _live(self, pages: ArrayLike) -> tuple[NDArray[np.intp], PageIds]:
        """The ids as a flat index array and their references; each id in range, live and named
        once.
        """
        ids = self._known(pages)
        held = self._references.take(ids)
        if not held.all():
            raise PageStateError(f"page {ids[held == 0][0]} is free already; nothing was changed")
        order = np.arange(ids.size, dtype=np.int32)
        self._seen[ids] = (
            order  # the last mention of an id wins, so an earlier one no longer matches
        )
        twice = self._seen.take(ids) != order
        if twice.any():
            raise PageStateError(f"page {ids[twice][0]} is named twice in one call")
        return ids, held
