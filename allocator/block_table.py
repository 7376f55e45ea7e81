"""Which pages hold the tokens of a layer's lanes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.page_allocator import PageAllocator, PageIds

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What ``BlockTable.propose`` would do to some rows; nothing is changed yet.

    rows: the rows of the table. pages: int32 [rows, heads, width] after the change; places that
        get a page of their own only at the commit are named by ``fresh``.
    fresh: bool, of the same shape: a page is taken for this place.
    replaced: bool, of the same shape: fresh places that hold a shared page before.
    dropped: ids that the rows own before and not after, those of ``replaced`` among them.
    lengths, num_pages: of each head after the change, [heads].
    """

    rows: slice
    pages: PageIds
    fresh: NDArray[np.bool_]
    replaced: NDArray[np.bool_]
    dropped: PageIds
    lengths: Counts
    num_pages: Counts

    @property
    def num_taken(self) -> int:
        return int(np.count_nonzero(self.fresh))


class BlockTable:
    """Page ids and lengths of rows x heads lanes, one layer in one generation.

    Always:
        lane (r, h) owns pages[r, h, : num_pages[r, h]], in the order of its tokens
        every owned page is live in the allocator, and has as many references at least as lanes of
        the table own it: one, but for rows that were repeated
        entries of ``pages`` past num_pages are 0 and mean nothing
        lengths[r, h] tokens are stored in num_pages[r, h] pages
    Rows in lockstep are equally long; they differ only while a step goes through them in chunks.

    A change has two halves: ``propose`` works it out and ``commit`` carries it out. ``state`` is
    set in one assignment, so that an interrupt finds the table before the change or after it.

    most_owned: the most pages that a commit has left owned, since it was last set by whoever asks.
    """

    def __init__(self, allocator: PageAllocator, rows: int, heads: int) -> None:
        for name, value in (("rows", rows), ("heads", heads)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        counts = np.zeros((2, rows, heads), dtype=np.int64)
        self._allocator = allocator
        self._has_copies = False  # whether lanes may own the same page
        self._counted: tuple[object, int] = (None, 0)  # a state, and the distinct pages in it
        self.most_owned = 0
        self.state: tuple[PageIds, Counts, Counts] = (
            np.zeros((rows, heads, 0), dtype=np.int32),
            counts[0],
            counts[1],
        )

    @property
    def pages(self) -> PageIds:
        """int32 [rows, heads, width]."""
        return self.state[0]

    @property
    def lengths(self) -> Counts:
        """Tokens of each lane, int64 [rows, heads]."""
        return self.state[1]

    @property
    def num_pages(self) -> Counts:
        """Pages of each lane, int64 [rows, heads]."""
        return self.state[2]

    @property
    def num_owned(self) -> int:
        """Pages of all lanes, each once. O(pages) for each state where rows were repeated."""
        if not self._has_copies:
            return int(self.state[2].sum())
        state, count = self._counted
        if state is not self.state:
            state, owned = self.state, self.owned()
            places, order = (
                np.empty(self._allocator.num_pages, dtype=np.int32),
                np.arange(owned.size),
            )
            places[owned] = order  # of an id named twice the last place stands
            count = int(np.count_nonzero(places[owned] == order))
            self._counted = state, count
        return count

    def owned(self) -> PageIds:
        """Every page id of the table, lane by lane; one that two lanes own twice."""
        pages, _, num_pages = self.state
        return pages[_used(num_pages, pages.shape[2])]

    def propose(
        self,
        rows: slice,
        lengths: Counts,
        page_size: int,
        written: NDArray[np.bool_] | None = None,
        afresh: bool = False,
    ) -> Change:
        """The change that makes lane (r, h) of these rows ``lengths[h]`` tokens long.

        Pages that stay keep their places; a shorter lane gives back its last ones. written: bool
        [heads, width], pages that will be written: shared ones among them are replaced
        (copy-on-write); None means all. afresh: no page stays, as when pages change their format.
        """
        pages, _, num_pages = self.state
        old, count = pages[rows], num_pages[rows]
        after = -(-lengths // page_size)
        width = int(after.max(initial=0))
        shape = (*old.shape[:2], width)
        common = min(width, old.shape[2])
        keeps = np.zeros(shape, dtype=bool)
        if not afresh:
            keeps[:, :, :common] = _used(np.minimum(count, after), common)
        ids = np.zeros(shape, dtype=np.int32)
        np.copyto(ids[:, :, :common], old[:, :, :common], where=keeps[:, :, :common])
        replaced = np.zeros(shape, dtype=bool)
        if self._allocator.is_sharing:
            touched = keeps if written is None else keeps & written[:, :width]
            replaced[touched] = self._is_of_others(ids[touched])
            keeps &= ~replaced
        goes = _used(count, old.shape[2])
        goes[:, :, :common] &= ~keeps[:, :, :common]
        fresh = _used(after, width) & ~keeps
        return Change(rows, ids, fresh, replaced, old[goes], lengths, after)

    def _is_of_others(self, ids: PageIds) -> NDArray[np.bool_]:
        """Whether a lane must not write its page: another one owns it too. Where all that do are
        named here, the first of them may.
        """
        shared = self._allocator.references(ids) > 1
        if self._has_copies and shared.any():
            pages, first, times = np.unique(ids, return_index=True, return_counts=True)
            alone = self._allocator.references(pages) == times
            shared[first[alone]] = False
        return shared

    def commit(self, change: Change) -> tuple[PageIds, PageIds]:
        """Carry the change out: returns (old, new) ids of the shared pages that were replaced.

        Whoever owns the tensors copies old to new before writing. Raises OutOfPages, changing
        nothing.
        """
        ids = change.pages.copy()
        old = ids[change.replaced]
        ids[change.fresh] = self._allocator.exchange(change.dropped, change.num_taken)
        pages, lengths, num_pages = self.state
        new_lengths, new_num_pages = lengths.copy(), num_pages.copy()
        new_lengths[change.rows], new_num_pages[change.rows] = change.lengths, change.num_pages
        if ids.shape[0] == pages.shape[0]:
            table = ids
        else:
            width = int(new_num_pages.max(initial=0))
            table = np.zeros((*pages.shape[:2], width), dtype=np.int32)
            table[:, :, : pages.shape[2]] = pages[:, :, :width]
            table[change.rows] = 0
            table[change.rows, :, : ids.shape[2]] = ids
        self.state = table, new_lengths, new_num_pages
        self.most_owned = max(self.most_owned, self.num_owned)
        return old, ids[change.replaced]

    def share(self) -> BlockTable:
        """A second table over the same pages, each with one more reference (a fork)."""
        pages, lengths, num_pages = self.state
        twin = BlockTable(self._allocator, *pages.shape[:2])
        self._allocator.retain(self.owned())
        twin.state = pages.copy(), lengths.copy(), num_pages.copy()
        twin._has_copies = self._has_copies
        return twin

    def repeat_rows(self, count: int) -> None:
        """Each row becomes ``count`` rows next to each other, over the same pages."""
        self._has_copies = True
        self._allocator.retain(np.tile(self.owned(), count - 1))
        pages, lengths, num_pages = self.state
        self.state = pages.repeat(count, 0), lengths.repeat(count, 0), num_pages.repeat(count, 0)

    def rehearsal(self, rows: NDArray[np.int64], num_pages: int) -> BlockTable:
        """These rows with the pages that they share, in an allocator of their own, of so many pages
        beside those that they own now: to see what later changes would take.
        """
        pages, lengths, counts = self.state
        pages, lengths, counts = pages[rows], lengths[rows], counts[rows]
        used = _used(counts, pages.shape[2])
        distinct, numbers = np.unique(pages[used], return_inverse=True)
        allocator = PageAllocator(distinct.size + num_pages)
        ids = np.zeros_like(pages)
        ids[used] = numbers
        allocator.rebuild([ids[used]])
        twin = BlockTable(allocator, *pages.shape[:2])
        twin.state, twin._has_copies = (ids, lengths, counts), self._has_copies
        return twin

    def keep_rows(self, rows: NDArray[np.int64]) -> None:
        """Give back the pages of all but these distinct rows, which become rows 0, 1, ..."""
        pages, lengths, num_pages = self.state
        goes = np.ones(pages.shape[0], dtype=bool)
        goes[rows] = False
        gone = pages[goes][_used(num_pages[goes], pages.shape[2])]
        if gone.size:
            self._allocator.release(gone)
        self.state = pages[rows].copy(), lengths[rows].copy(), num_pages[rows].copy()

    def release(self) -> None:
        """Give every page back; the table is empty then and may grow again."""
        owned = self.owned()
        if owned.size:
            self._allocator.release(owned)
        pages, lengths, _ = self.state
        empty = np.zeros((2, *lengths.shape), dtype=np.int64)
        self.state = np.zeros((*pages.shape[:2], 0), dtype=np.int32), empty[0], empty[1]

    def check(self) -> None:
        """Assert every invariant. O(pages of the table)."""
        pages, _, num_pages = self.state
        owned = self.owned()
        assert owned.size == int(num_pages.sum()), "a lane lost a page"
        ids, times = np.unique(owned, return_counts=True)
        assert self._has_copies or (times == 1).all(), "two lanes own one page"
        assert (self._allocator.references(owned) > 0).all(), "a lane owns a free page"
        assert (self._allocator.references(ids) >= times).all(), "more owners than references"
        assert not pages[~_used(num_pages, pages.shape[2])].any(), "an id past the end"


def _used(num_pages: Counts, width: int) -> NDArray[np.bool_]:
    """Which of ``width`` places of each lane are in use, bool [*num_pages.shape, width]."""
    used: NDArray[np.bool_] = np.arange(width) < num_pages[..., None]
    return used
