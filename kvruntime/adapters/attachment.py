"""A paged cache inside a model, from the moment it is attached until it is taken out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kvruntime.adapters.patching import ModelView
from kvruntime.cache import PagedKVCache
from kvruntime.errors import BackendUnavailable, ScheduleError
from kvruntime.generation import Generation
from kvruntime.options import CacheOptions
from kvruntime.planning import Plan
from kvruntime.stats import Stats, stats_of
from kvruntime.step.run import Observer
from kvruntime.storage.pool import Pool
from policies import CacheGeometry


class Attachment:
    """``stats`` tells about the generation that runs or ran last. One thread draws at a time: the
    modules of a model keep the state of one generation.
    """

    def __init__(
        self,
        seen: ModelView,
        options: CacheOptions,
        pool: Pool | None,
        observer: Observer | None,
    ) -> None:
        self._view, self._options = seen, options
        self._pool, self._observer = pool, observer
        parameter = next(seen.model.parameters())
        self._made_for = (parameter.dtype, parameter.device)
        try:
            self._cache = self._make_cache(*self._made_for)
        except BackendUnavailable:
            if parameter.dtype != torch.float32:
                raise
            self._cache = self._make_autocast_cache(parameter.device)
        self._generation: Generation | None = None
        self._stats: Stats | None = None
        self._is_attached = True
        self._lock = threading.RLock()  # whose owner draws
        self._thread: threading.Thread | None = None  # whose generation is open

    def is_attached(self) -> bool:
        """Whether the model's calls still come here."""
        return self._is_attached

    @property
    def stats(self) -> Stats:
        if self._generation is not None:
            return self._generation.stats
        return self._stats or stats_of(self._cache.plan(1), self._cache.facts)

    def plan(self, pictures: int, rows_per_picture: int = 2) -> Plan:
        """What a generation of so many pictures will need, in the number format of the weights."""
        return self._cache.plan(pictures * rows_per_picture)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer's attention; the first call of a generation opens it. Under autocast V sets the
        dtype.
        """
        with self._alone():
            if self._generation is None or not self._generation.is_open:
                self._open(q.shape[0], v)
            assert self._generation is not None
            generation = self._generation
            out = generation.attend(layer, q.to(v.dtype), k.to(v.dtype), v)
            if generation.scale == len(self._view.schedule):
                generation.close()
            return out

    def _open(self, rows: int, v: Tensor) -> None:
        if self._made_for != (v.dtype, v.device):
            self._generation = None
            self._cache = self._make_cache(v.dtype, v.device)
            self._made_for = (v.dtype, v.device)
        self._generation = None
        self._generation = self._cache.open(rows)
        self._thread = threading.current_thread()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse where another thread draws, or has left a generation half done."""
        open_elsewhere = (
            self._generation is not None
            and self._generation.is_open
            and self._thread not in (None, threading.current_thread())
            and self._thread.is_alive()
        )
        if open_elsewhere or not self._lock.acquire(blocking=False):
            raise ScheduleError(
                "another thread draws with this model, whose modules keep the state of one "
                "generation: attach a copy of the model in each thread, or draw in turn"
            )
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """This thread draws, and no other one; a generation that fails is closed."""
        with self._alone():
            try:
                yield
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the open generation, if any. Raises ScheduleError if it is another thread's."""
        with self._alone():
            if self._generation is not None:
                self._generation.close()

    def detach(self) -> None:
        """End the open generation and let the tensors go; ``stats`` stay. Twice is allowed."""
        self._is_attached = False
        generation = self._generation
        if generation is not None:
            generation.close()
            self._stats = generation.stats
        self._generation = None
        self._cache.let_go()

    def _make_autocast_cache(self, device: torch.device) -> PagedKVCache:
        """For float32 weights and a back end that cannot do that: autocast may make it a number
        format that it can. If it does not, the first step refuses.
        """
        try:
            self._made_for = (torch.bfloat16, device)
            return self._make_cache(*self._made_for)
        except BackendUnavailable:
            self._made_for = (torch.float16, device)
            return self._make_cache(*self._made_for)

    def _make_cache(self, dtype: torch.dtype, device: torch.device) -> PagedKVCache:
        seen = self._view
        name = str(dtype).removeprefix("torch.")
        return PagedKVCache(
            CacheGeometry(len(seen.attentions), seen.heads, seen.head_dim, name, name),
            seen.schedule,
            self._options,
            softmax_scale=seen.softmax_scale,
            pool=self._pool,
            device=device,
            observer=self._observer,
        )
