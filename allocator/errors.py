"""Errors of the page level, and the root of every error that the runtime raises.

KVRuntimeError
 +- OutOfPages       the pool has fewer free pages than asked
 +- PageStateError   a page id that is foreign, free already, or named twice in one call
 +- (kvruntime.errors holds the others)

The root lives here because imports go down only: ``kvruntime`` stands on ``allocator``.
"""

from __future__ import annotations


class KVRuntimeError(Exception):
    """Root of the errors of allocator and kvruntime."""


class OutOfPages(KVRuntimeError):
    """More pages were requested than are free now, of total; nothing was taken."""

    def __init__(self, requested: int, free: int, total: int) -> None:
        super().__init__(
            f"{requested} pages requested, {free} free of {total}: "
            "close a generation, lower the budget or make the pool larger"
        )
        self.requested, self.free, self.total = requested, free, total


class PageStateError(KVRuntimeError):
    """A page that a call names is foreign, free or named too often; nothing was changed."""
