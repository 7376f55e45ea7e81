"""The bytes that pages are runs of, shared by any number of generations; who owns which page."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import numpy as np
import torch

from allocator import BlockTable, OutOfPages, PageAllocator
from kvruntime.errors import ScheduleError, WillNeverFit
from kvruntime.frames import is_on_stack
from kvruntime.sizes import check_positive
from kvruntime.storage.layout import PLANE_BYTES, PageLayout
from kvruntime.storage.memory import asked_bytes, free_bytes, is_out_of_memory, real_device
from kvruntime.storage.pages import Pages, planes_of
from policies import TORCH_DTYPES


@dataclass(frozen=True, slots=True)
class PoolStats:
    """live_pages + free_pages == num_pages, of pool_bytes together; reserved_pages: that open
    generations may own at most; peak_pages: most that were live at once since the pool was empty.
    """

    num_pages: int
    live_pages: int
    free_pages: int
    reserved_pages: int
    peak_pages: int
    pool_bytes: int


class Claimant(Protocol):
    """Whoever decides instead of the pool what generations may hold."""

    @property
    def held_pages(self) -> int: ...


class Pool:
    """One run of bytes in equally large pages, for any number of generations of any geometry whose
    tokens fit a page.

    memory: bytes to take, a number, "2GiB", or "80%" of what is free on the device. num_pages:
    the number of pages instead. page_bytes: bytes of a page, K and V; ``PagedKVCache.page_bytes``
    says what a cache would choose. plane_bytes: further bytes of a page for planes, such as log
    weights, ``PagedKVCache.plane_bytes``; 0 serves policies that have none.

    Always: what open generations own is live in the allocator; reserved_pages is the sum of what
    they may own at most, and never exceeds num_pages. A change of owners that was interrupted is
    found by its mark and mended by the next one, from the block tables of the open generations.
    One generation belongs to one thread at a time; different ones may be in different threads.
    """

    def __init__(
        self,
        memory: int | str | None = None,
        *,
        num_pages: int | None = None,
        page_bytes: int,
        plane_bytes: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_positive("page_bytes", page_bytes)
        if page_bytes % 4:
            raise ValueError(f"page_bytes must be a multiple of 4, got {page_bytes}")
        if isinstance(plane_bytes, bool) or not isinstance(plane_bytes, int) or plane_bytes < 0:
            raise ValueError(f"plane_bytes must be a number of bytes, got {plane_bytes!r}")
        if plane_bytes % PLANE_BYTES:
            raise ValueError(f"plane_bytes must be a multiple of 2, got {plane_bytes}")
        if (memory is None) == (num_pages is None):
            raise ValueError("give either memory or num_pages")
        self.device = real_device(device)
        self.page_bytes, self.plane_bytes = page_bytes, plane_bytes
        if num_pages is None:
            each = page_bytes + plane_bytes
            num_pages = asked_bytes(memory, self.device, least=each) // each
        check_positive("num_pages", num_pages)
        self.num_pages = num_pages
        shapes = (page_bytes // 2, page_bytes // 2, plane_bytes)
        try:
            with torch.inference_mode(False):  # they outlive a caller's inference_mode
                self.keys, self.values, self.planes = (
                    torch.empty((num_pages, size), dtype=torch.uint8, device=self.device)
                    for size in shapes
                )
            self.allocator = PageAllocator(num_pages)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            advice = "that much is free on the device: draw fewer at once or lower the budget"
            raise WillNeverFit(self.num_bytes, free_bytes(self.device), advice) from error
        self._lock = threading.RLock()
        self._tables = weakref.WeakKeyDictionary[object, list[BlockTable]]()
        self._reserved = weakref.WeakKeyDictionary[object, int]()
        self._leaving: list[object] = []  # dismissed in the middle of a change
        self._changer: FrameType | None = None  # in which a change goes on
        self._finalizers = weakref.WeakKeyDictionary[object, "weakref.finalize[..., object]"]()
        self._is_changing = self._has_lost = False
        self._claimant: Claimant | None = None
        self._stream: object = None
        self._event: torch.cuda.Event | None = None
        self._views: dict[PageLayout, Pages] = {}

    @property
    def num_bytes(self) -> int:
        return self.num_pages * (self.page_bytes + self.plane_bytes)

    @property
    def stats(self) -> PoolStats:
        if self._is_mid_change():
            owned = [table.owned() for table in self._all_tables()]
            return self._stats(np.unique(np.concatenate(owned)).size if owned else 0)
        with self.changing():
            return self._stats(self.allocator.num_live)

    def _stats(self, num_live: int) -> PoolStats:
        claimed = self._claimant.held_pages if self._claimant else 0
        reserved = claimed + sum(self._reserved.values())
        peak = max(self.allocator.high_water, num_live)
        total = self.num_pages
        return PoolStats(total, num_live, total - num_live, reserved, peak, self.num_bytes)

    def view(self, layout: PageLayout) -> Pages:
        """The pages read through a layout, which must have been made for this pool's pages."""
        if layout not in self._views:
            dtype = torch.int32 if layout.records else TORCH_DTYPES[layout.dtype]
            with torch.inference_mode(False):
                keys, values = (
                    half.view(-1, layout.page_size, layout.stride_bytes).view(dtype)[
                        :, :, : layout.width
                    ]
                    for half in (self.keys, self.values)
                )
                planes = planes_of(self.planes, layout.planes)
            self._views[layout] = Pages(keys, values, planes, layout.records)
        return self._views[layout]

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """For whoever changes owners, or asks who owns what: no other thread changes any meanwhile,
        and if it ends early, by an error or an interrupt, or did before, the allocator is rebuilt
        from the block tables.

        Raises ScheduleError in the middle of a change of this very thread, where only a signal
        handler or a finalizer can be. Whoever changes lets errors out of the function that does.
        """
        if self._is_mid_change():
            raise ScheduleError(
                "the pool is in the middle of a change: a signal handler or finalizer may close "
                "generations and read stats, but not open, step, fork or thin them"
            )
        with self._lock:
            self._changer = sys._getframe(2)  # whose with statement this is
            try:
                if self._is_changing or self._has_lost:
                    self._mend()
                self._is_changing = True
                self._let_leave()
                yield
                self._let_leave()
                self._is_changing = False
            finally:
                self._changer = None

    def _is_mid_change(self) -> bool:
        """Whether this runs within a change. The lock cannot tell: an interrupt may leave it."""
        return is_on_stack(self._changer)

    def _let_leave(self) -> None:
        while self._leaving:
            self._release(self._leaving[-1])
            self._leaving.pop()

    def _all_tables(self) -> list[BlockTable]:
        return [table for group in list(self._tables.values()) for table in group]

    def _mend(self) -> None:
        self._has_lost = False
        self.allocator.rebuild(table.owned() for table in self._all_tables())
        self._is_changing = False

    def claim(self, claimant: Claimant) -> None:
        """The claimant decides from now on who may hold how much. Raises ScheduleError for a pool
        in use."""
        with self.changing():
            if self._tables or self._claimant is not None:
                raise ScheduleError("the pool is in use: give Admission a pool of its own")
            self._claimant = claimant

    def admit(
        self,
        owner: object,
        tables: list[BlockTable],
        pages: int,
        claimant: Claimant | None = None,
    ) -> None:
        """Let ``owner`` hold up to ``pages`` pages in ``tables``, until it is dismissed or gone.
        A claimant, which has promised them, asks for 0.

        Raises WillNeverFit, OutOfPages if others' reservations leave too few, and ScheduleError
        without the claimant where there is one.
        """
        with self.changing():
            if claimant is not self._claimant:
                raise ScheduleError("the pool has an Admission: open with admission=...")
            if pages > self.num_pages:
                each = self.page_bytes + self.plane_bytes
                raise WillNeverFit(
                    pages * each, self.num_bytes, "lower the budget or make the pool larger"
                )
            free = self.num_pages - sum(self._reserved.values())
            if pages > free:
                raise OutOfPages(pages, free, self.num_pages)
            if not self._tables:
                self.allocator.reset_high_water()
            self._tables[owner] = tables
            self._reserved[owner] = pages
            self._finalizers[owner] = weakref.finalize(owner, self._mark_lost, tables)
            self._finalizers[owner].atexit = False

    def reserve(self, owner: object, pages: int) -> None:
        """Lower what an admitted owner may hold."""
        self._reserved[owner] = pages

    def dismiss(self, owner: object) -> None:
        """Take back every page of an owner. Twice is allowed. In the middle of a change of this
        thread it is done at the end of that.
        """
        if self._is_mid_change():
            self._leaving.append(owner)
            return
        with self.changing():
            self._release(owner)

    def _release(self, owner: object) -> None:
        for table in self._tables.get(owner, []):
            table.release()
        self._tables.pop(owner, None)  # last: until then an interrupt can be mended
        self._reserved.pop(owner, None)
        if owner in self._finalizers:  # which holds this pool
            self._finalizers.pop(owner).detach()

    @property
    def owners(self) -> tuple[object, ...]:
        """The open generations; of another thread's some that come or go meanwhile."""
        return tuple(one for one in (ref() for ref in self._tables.keyrefs()) if one is not None)

    def _mark_lost(self, tables: list[BlockTable]) -> None:
        """An owner went without being dismissed: its pages are found when somebody asks next."""
        had_lost, self._has_lost = self._has_lost, True  # an interrupt in here would be dropped
        if not any(table.num_pages.any() for table in tables):
            self._has_lost = had_lost

    def follow(self) -> None:
        """On CUDA: what this stream does to pages from now on comes after what others have done."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            with self._lock:
                if self._event is not None and stream != self._stream:
                    stream.wait_event(self._event)

    def note_use(self) -> None:
        """On CUDA: remember how far this stream has read and written, and all others before it."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            with self._lock:
                self.follow()  # else what the last one noted would be forgotten
                if self._event is None:
                    self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._event.record(stream)
                self._stream = stream

    def check(self) -> None:
        """Assert every invariant. O(num_pages); for tests and idle points."""
        with self.changing():
            self.allocator.check()
            tables = self._all_tables()
            for table in tables:
                table.check()
            owned = sum(int(table.num_pages.sum()) for table in tables)
            extra = self.allocator._extra_references
            assert owned == self.allocator.num_live + extra, "a page without an owner"
            assert sum(self._reserved.values()) <= self.num_pages, "more reserved than there is"
