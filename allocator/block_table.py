"""Which pages hold the tokens of a layer's lanes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocator.errors import OutOfPages
from allocator.page_allocator import PageAllocator, PageIds


class BlockTable:
    """Page ids and lengths of rows x heads lanes, one layer in one generation.

    The lanes of a head run in lockstep over the rows, so there is one length per head.

    Always:
        num_pages[h] == ceil(lengths[h] / page_size)
        lane (r, h) owns pages[r, h, : num_pages[h]], in the order of its tokens
        every owned page is live in the allocator, and no two lanes of the table own the same one
        entries of ``pages`` past num_pages[h] are 0 and mean nothing
    """

    def __init__(self, allocator: PageAllocator, rows: int, heads: int, page_size: int) -> None:
        for name, value in (("rows", rows), ("heads", heads), ("page_size", page_size)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.page_size = page_size
        self.lengths: NDArray[np.int64] = np.zeros(heads, dtype=np.int64)
        self.pages: PageIds = np.zeros((rows, heads, 0), dtype=np.int32)
        self._allocator = allocator

    @property
    def num_pages(self) -> NDArray[np.int64]:
        """Pages of one lane of each head, [heads]."""
        return -(-self.lengths // self.page_size)

    @property
    def is_ragged(self) -> bool:
        """Whether heads differ in length."""
        return bool((self.lengths != self.lengths[0]).any())

    def owned(self) -> PageIds:
        """Every page id of the table, lane by lane."""
        return self.pages[:, self._places(self.num_pages)].ravel()

    def resize(self, lengths: ArrayLike) -> None:
        """Make every lane of head h ``lengths[h]`` tokens long.

        A shorter lane gives back its last pages, a longer one gets new ones behind those it has;
        releases come first, so the pages in use never exceed the larger of before and after. One
        allocator call each, O(pages moved). Raises OutOfPages, changing nothing, if the new pages
        do not fit.
        """
        wanted = np.asarray(lengths)
        if not np.issubdtype(wanted.dtype, np.integer) or wanted.shape != self.lengths.shape:
            raise ValueError(f"lengths must be {self.lengths.size} integers, got {lengths!r}")
        if (wanted < 0).any():
            raise ValueError(f"lengths must not be negative, got {wanted.tolist()}")
        wanted = wanted.astype(np.int64)
        old, new = self.num_pages, -(-wanted // self.page_size)
        rows, heads, capacity = self.pages.shape
        table = np.zeros((rows, heads, max(capacity, int(new.max()))), dtype=np.int32)
        table[:, :, :capacity] = self.pages
        place = np.arange(table.shape[2])
        drop = (place >= new[:, None]) & (place < old[:, None])  # [heads, capacity]
        take = (place >= old[:, None]) & (place < new[:, None])
        dropped = table[:, drop].ravel()
        count = rows * int(np.count_nonzero(take))
        free = self._allocator.num_free
        if count > free:  # the pages given back by this very call may be enough
            free += int(np.count_nonzero(self._allocator.references(dropped) == 1))
            if count > free:
                raise OutOfPages(count, free, self._allocator.num_pages)
        if dropped.size:
            self._allocator.release(dropped)
            table[:, drop] = 0
        if count:
            table[:, take] = self._allocator.allocate(count).reshape(rows, -1)
        self.pages = table[:, :, : int(new.max())]
        self.lengths = wanted

    def share(self) -> BlockTable:
        """A second table over the same pages, each with one more reference (a fork)."""
        rows, heads, _ = self.pages.shape
        twin = BlockTable(self._allocator, rows, heads, self.page_size)
        self._allocator.retain(self.owned())
        twin.pages, twin.lengths = self.pages.copy(), self.lengths.copy()
        return twin

    def replace_shared(self, first_token: int) -> tuple[PageIds, PageIds]:
        """Swap the shared pages that hold tokens from ``first_token`` on for pages of our own.

        Returns (old, new) ids; whoever owns the tensors copies old to new before writing
        (copy-on-write). Raises OutOfPages, changing nothing.
        """
        place = np.arange(self.pages.shape[2])
        written = self._places(self.num_pages) & (place >= first_token // self.page_size)
        lanes = self.pages[:, written]  # [rows, pages]
        shared = self._allocator.references(lanes).reshape(lanes.shape) > 1
        old = lanes[shared]
        if not old.size:
            return old, old
        new = self._allocator.allocate(old.size)
        self._allocator.release(old)
        lanes[shared] = new
        self.pages[:, written] = lanes
        return old, new

    def release(self) -> None:
        """Give every page back; the table is empty then and may grow again."""
        self.resize(np.zeros_like(self.lengths))

    def check(self) -> None:
        """Assert every invariant. O(pages of the table)."""
        owned = self.owned()
        assert owned.size == self.pages.shape[0] * int(self.num_pages.sum()), "a lane lost a page"
        assert np.unique(owned).size == owned.size, "two lanes own one page"
        assert (self._allocator.references(owned) > 0).all(), "a lane owns a free page"
        assert not self.pages[:, ~self._places(self.num_pages)].any(), "an id past the end"

    def _places(self, num_pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which entries [heads, capacity] of a row are in use."""
        used: NDArray[np.bool_] = np.arange(self.pages.shape[2]) < num_pages[:, None]
        return used
