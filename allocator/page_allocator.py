"""Hands out page ids from a fixed range, whole arrays at a time."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocator.errors import OutOfPages, PageStateError

PageIds = NDArray[np.int32]


class PageAllocator:
    """Owns the ids 0 .. num_pages - 1; never touches tensors.

    Always, with ``place`` running over 0 .. num_free - 1:
        num_free + num_live == num_pages
        a live page's entry of _references is the number of its owners, at least 1
        a free page's entry is -1 - place, where _stack[place] is that page
        _extra_references is the sum over live pages of their owners beyond the first
        num_live <= high_water <= num_pages

    Every call costs O(ids in the call), whatever the size of the pool, or sorting them where pages
    are shared, and changes everything or nothing. Ids may come in any shape; a page that one call
    names several times gains or loses as many references. The arrays that calls work in are made
    once, since fresh ones cost more than the work: whoever shares an allocator between threads
    holds a lock around each call, and after a call that was interrupted half way calls ``rebuild``.
    """

    def __init__(self, num_pages: int) -> None:
        num_pages = operator.index(num_pages)
        if num_pages <= 0:
            raise ValueError(f"num_pages must be positive, got {num_pages}")
        self.num_pages = num_pages
        self.num_free = num_pages
        self.high_water = 0
        self._extra_references = 0  # beyond one for each live page
        self._stack = np.empty(2 * num_pages, dtype=np.intp)  # above the free ones: ids of a call
        self._stack[:num_pages] = np.arange(num_pages)[::-1]
        self._references: PageIds = np.arange(-num_pages, 0, dtype=np.int32)
        self._marks: PageIds = np.arange(-1, -1 - 2 * num_pages, -1, dtype=np.int32)  # by place
        self._owners: PageIds = np.empty(num_pages, dtype=np.int32)
        self._found: PageIds = np.empty(num_pages, dtype=np.int32)

    @property
    def num_live(self) -> int:
        return self.num_pages - self.num_free

    @property
    def is_sharing(self) -> bool:
        """Whether any page has more than one owner."""
        return self._extra_references > 0

    def references(self, pages: ArrayLike) -> PageIds:
        """How many owners each page has, 0 for a free one. Raises PageStateError if foreign."""
        return np.maximum(self._references.take(self._known(pages)), 0)

    def allocate(self, count: int) -> PageIds:
        """Take ``count`` pages, each with one reference.

        Raises OutOfPages, taking none, if fewer are free.
        """
        count = _checked(count)
        if count > self.num_free:
            raise OutOfPages(count, self.num_free, self.num_pages)
        self.num_free -= count
        ids = self._stack[self.num_free : self.num_free + count]
        self._references[ids] = 1
        self.high_water = max(self.high_water, self.num_live)
        return ids.astype(np.int32)

    def retain(self, pages: ArrayLike) -> None:
        """Add a reference to each of these live pages.

        Raises PageStateError, adding none, for a page that is free or foreign.
        """
        marked = self._mark(pages)
        if marked is not None:
            ids, owners = marked
            self._references[ids] = owners + 1
            self._extra_references += ids.size
            return
        ids, owners, times = self._counted(pages)
        self._references[ids] = owners + times
        self._extra_references += int(times.sum())

    def release(self, pages: ArrayLike) -> int:
        """Drop a reference from each of these live pages; return how many became free.

        Raises PageStateError, dropping none, for a page that is free, foreign or named more often
        than it has owners.
        """
        marked = self._mark(pages)
        if marked is None:
            ids = self._drop_counted(pages)
        else:
            ids, owners = marked
            if self.is_sharing and owners.max(initial=1) > 1:
                self._references[ids] = owners - 1
                self._extra_references -= int(np.count_nonzero(owners > 1))
                ids = self._put_back(ids[owners == 1])
        self.num_free += ids.size
        return ids.size

    def exchange(self, dropped: ArrayLike, count: int) -> PageIds:
        """Drop a reference from each of ``dropped``, then take ``count`` pages, as one change.

        Pages in use never exceed the larger of before and after. Raises OutOfPages, changing
        nothing, if what is free and what becomes free are not enough.
        """
        ids, count = np.asarray(dropped), _checked(count)
        if count > self.num_free:
            distinct, times = np.unique(self._known(ids), return_counts=True)
            free = self.num_free + int(np.count_nonzero(self._references[distinct] == times))
            if count > free:
                raise OutOfPages(count, free, self.num_pages)
        if ids.size:
            self.release(ids)
        return self.allocate(count)

    def rebuild(self, owned: Iterable[PageIds]) -> None:
        """Forget everything and believe ``owned``: an array of the ids that each owner has.

        O(num_pages). For after an interrupt in the middle of a change, when owners know better.
        """
        counts = np.zeros(self.num_pages, dtype=np.int32)
        for ids in owned:
            np.add.at(counts, ids, 1)
        free = np.flatnonzero(counts == 0)[::-1]
        self._stack[: free.size] = free
        self._references[:] = counts
        self._references[free] = -1 - np.arange(free.size, dtype=np.int32)
        self.num_free = free.size
        self._extra_references = int(np.maximum(counts - 1, 0).sum())
        self.high_water = max(self.high_water, self.num_live)

    def reset_high_water(self) -> None:
        """Count the high-water mark from the pages live now."""
        self.high_water = self.num_live

    def check(self) -> None:
        """Assert every invariant. O(num_pages); for tests and idle points."""
        free = self._stack[: self.num_free]
        assert free.size + np.count_nonzero(self._references > 0) == self.num_pages, (
            "pages lost or invented"
        )
        assert (self._references[free] == -1 - np.arange(free.size)).all(), (
            "a free page is not where it says"
        )
        extra = int(np.maximum(self._references - 1, 0).sum())
        assert extra == self._extra_references, "extra references miscounted"
        assert self.num_live <= self.high_water <= self.num_pages, "high-water mark out of range"

    def _known(self, pages: ArrayLike) -> NDArray[Any]:
        """The ids as a flat array of integers, each in range."""
        given: NDArray[Any] = np.asarray(pages).ravel()
        if given.size == 0:
            return np.empty(0, dtype=np.intp)
        if not np.issubdtype(given.dtype, np.integer):
            raise PageStateError(f"page ids must be integers, got {given.dtype}")
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= self.num_pages:
            foreign = low if low < 0 else high
            raise PageStateError(f"page {foreign} is not one of the {self.num_pages} of this pool")
        return given

    def _mark(self, pages: ArrayLike) -> tuple[NDArray[np.intp], PageIds] | None:
        """The ids as a flat index array and their owners; each id in range and live. None, leaving
        no trace, where one is named twice.

        Leaves each page on top of the free stack and its entry as if it were free: of an id named
        twice only one mark survives, which is how it is found. The caller counts those that are
        free from now on, and writes the entries of the others.
        """
        given = self._known(pages)
        if given.size > self.num_pages:
            return None
        top = slice(self.num_free, self.num_free + given.size)
        ids, marks = self._stack[top], self._marks[top]
        owners, found = self._owners[: given.size], self._found[: given.size]
        ids[:] = given
        self._references.take(ids, out=owners, mode="wrap")  # in range; "wrap" is the fastest
        _check_live(ids, owners)
        self._references[ids] = marks
        self._references.take(ids, out=found, mode="wrap")
        if (found != marks).any():
            self._references[ids] = owners
            return None
        return ids, owners

    def _counted(self, pages: ArrayLike) -> tuple[NDArray[np.intp], PageIds, NDArray[np.intp]]:
        """Each id once, its owners, and how often it is named. Slower than ``_mark``: it sorts."""
        ids, times = np.unique(self._known(pages), return_counts=True)
        owners = self._references[ids]
        _check_live(ids, owners)
        return ids, owners, times

    def _drop_counted(self, pages: ArrayLike) -> NDArray[np.intp]:
        """Drop references where a page is named several times; those that are free then are put on
        top of the free stack, and the caller counts them.
        """
        ids, owners, times = self._counted(pages)
        if (times > owners).any():
            page, named, has = (part[times > owners][0] for part in (ids, times, owners))
            raise PageStateError(f"page {page} is named {named} times and has {has} owners")
        self._references[ids] = owners - times
        gone = self._put_back(ids[owners == times])
        self._extra_references -= int(times.sum()) - gone.size
        return gone

    def _put_back(self, ids: NDArray[np.intp]) -> NDArray[np.intp]:
        """On top of the free stack, where the caller counts them."""
        top = slice(self.num_free, self.num_free + ids.size)
        self._references[ids] = self._marks[top]
        self._stack[top] = ids
        return ids


def _check_live(ids: NDArray[np.intp], owners: PageIds) -> None:
    if owners.min(initial=1) <= 0:
        raise PageStateError(f"page {ids[owners <= 0][0]} is free already; nothing was changed")


def _checked(count: int) -> int:
    count = operator.index(count)
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    return count
