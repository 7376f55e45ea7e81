"""Every error the runtime raises.

KVRuntimeError
 +- OutOfPages          the pool has fewer free pages than asked (allocator)
 +- PageStateError      a page id that is foreign, free already, or named twice (allocator)
 +- WillNeverFit        a generation needs more memory than it may have, whatever else ends
 +- QueueFull           as many generations wait for the pool as may
 +- Cancelled           somebody gave this generation's place up
 +- ScheduleError       the calls do not follow the schedule, or no generation is open
 +- BackendUnavailable  an attention back end cannot run here
 +- UnsupportedModel    attach() does not recognise the model
 +- EmbeddingError      a description of a model does not fit it
Bad arguments raise ValueError with the value.
"""

from __future__ import annotations

from collections.abc import Sequence

from allocator.errors import KVRuntimeError, OutOfPages, PageStateError


class WillNeverFit(KVRuntimeError):
    """Refused before anything was allocated; ``needed`` and ``total`` are bytes."""

    def __init__(self, needed: int, total: int, advice: str) -> None:
        super().__init__(f"{needed} bytes needed, {total} allowed: {advice}")
        self.needed, self.total = needed, total


class QueueFull(KVRuntimeError):
    """Refused: so many generations wait already, and no more than ``most`` may."""

    def __init__(self, waiting: int, most: int) -> None:
        super().__init__(f"{waiting} generations wait for the pool, {most} may: try again later")
        self.waiting, self.most = waiting, most


class Cancelled(KVRuntimeError):
    """Raised in the thread that draws or waits, after Ticket.cancel(); the generation closes."""


class ScheduleError(KVRuntimeError):
    """A call that does not fit the schedule or the state of the generation; nothing was changed."""


class BackendUnavailable(KVRuntimeError):
    """An attention back end cannot run here, and why."""

    def __init__(self, backend: str, reasons: Sequence[str]) -> None:
        super().__init__(f"{backend} cannot run here: {'; '.join(reasons)}")
        self.backend, self.reasons = backend, tuple(reasons)


class UnsupportedModel(KVRuntimeError):
    """No adapter fits; ``missing`` says for each what was looked for and not found."""

    def __init__(self, model: object, missing: dict[str, list[str]]) -> None:
        tried = "; ".join(f"{name} lacks {', '.join(lacks)}" for name, lacks in missing.items())
        super().__init__(
            f"{type(model).__name__} is not a model that attach() knows: {tried}. "
            "Describe it with kvruntime.Embedding, or name a known one: attach(model, "
            "embedding=kvruntime.adapters.VAR) (docs/embedding.md)."
        )
        self.missing = missing


class EmbeddingError(KVRuntimeError):
    """A description of a model does not fit it; the message says where, and what to change."""

    def __init__(self, embedding: str, what: str) -> None:
        super().__init__(f"{embedding}: {what}")
        self.embedding = embedding


__all__ = [
    "BackendUnavailable",
    "Cancelled",
    "EmbeddingError",
    "KVRuntimeError",
    "OutOfPages",
    "PageStateError",
    "QueueFull",
    "ScheduleError",
    "UnsupportedModel",
    "WillNeverFit",
]
