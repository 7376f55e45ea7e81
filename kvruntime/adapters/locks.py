"""Who draws with a model: one thread at a time, whatever is attached to it."""

from __future__ import annotations

import threading
import weakref

from kvruntime.adapters.embedding import View


class Lock:
    """One for each model, whatever is attached to it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def acquire(self) -> bool:
        """Whether this thread has it now. Waits for nobody."""
        return self._lock.acquire(blocking=False)

    def release(self) -> None:
        self._lock.release()


_locks: weakref.WeakValueDictionary[int, Lock] = weakref.WeakValueDictionary()


def lock_of(view: View) -> Lock:
    return _locks.setdefault(id(view.attentions[0]), Lock())
