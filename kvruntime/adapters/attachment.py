"""A paged cache inside a model, from the moment it is attached until it is taken out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from kvruntime.adapters.caches import Caches
from kvruntime.adapters.embedding import View
from kvruntime.adapters.interception import take_over
from kvruntime.adapters.locks import lock_of
from kvruntime.adapters.patching import original_of
from kvruntime.adapters.serving import SamplerCall, Serving
from kvruntime.admission import Ticket
from kvruntime.errors import ScheduleError
from kvruntime.generation import Generation
from kvruntime.planning import Plan
from kvruntime.sizes import check_positive
from kvruntime.stats import Stats, nothing_drawn
from policies import ScaleSchedule


class Watch(Protocol):
    """Whoever compares steps with the model's own."""

    is_watching: bool

    def step(
        self,
        call: SamplerCall,
        layer: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        ours: Callable[[], Any],
    ) -> Any:
        """What the layer's forward returns."""
        ...

    def begins(self, call: SamplerCall) -> None:
        """A cache is switched on or off: a generation may begin."""
        ...

    def ends(self, call: SamplerCall, is_complete: bool) -> None: ...


class Attachment:
    """``stats`` tells about the generation that runs or ran last. One thread draws at a time: the
    modules of a model keep the state of one forward.
    """

    def __init__(self, view: View, caches: Caches, watch: Watch | None = None) -> None:
        self._view, self._caches, self._watch = view, caches, watch
        self._serving = Serving(view, caches)
        schedule = view.schedule({})
        if schedule is not None:  # bad options are refused now
            caches.expected(schedule)
        self._outside = SamplerCall({}, schedule, set(), is_by_hand=True)
        self._calls = [self._outside]  # the last one is the one that runs
        self._begun = [self._outside]  # those that have not ended, generators among them
        self._stats: Stats | None = None
        self._is_attached = True
        self._lock = lock_of(view)  # whose owner draws
        self._thread: threading.Thread | None = None  # whose generation by hand is open

    def is_attached(self) -> bool:
        """Whether the model's calls still come here."""
        return self._is_attached

    @property
    def stats(self) -> Stats:
        """Raises ScheduleError before the first generation of a model whose schedule only a call
        of its sampler tells.
        """
        if self._serving.last is not None:
            return self._serving.last.stats
        if self._stats is not None:
            return self._stats
        cache = self._caches.latest
        if cache is None:
            raise ScheduleError("nothing is drawn yet, and only the sampler's arguments tell more")
        return nothing_drawn(cache.plan(1), cache.facts)

    @property
    def schedule(self) -> ScaleSchedule:
        """Of the generation that runs or ran last. Raises ScheduleError where there was none."""
        if self._serving.drawn is None:
            raise ScheduleError("nothing is drawn yet")
        return self._serving.drawn

    def plan(self, pictures: int, rows_per_picture: int = 2, **call: Any) -> Plan:
        """What a generation of so many pictures will need, in the number format of the weights.
        call: arguments of the sampler that decide about its schedule and rows.
        """
        rows, arguments = pictures * rows_per_picture, self._view.some_arguments(call)
        schedule = self._serving.schedule(arguments)
        rows_from = self._serving.rows_from(arguments, schedule, rows, self._serving.branch)
        return self._caches.expected(schedule).plan(rows, rows_from)

    def use(self, ticket: Ticket) -> None:
        """The next generation draws on this ticket of the admission that was given to ``attach``:
        one that was acquired for ``plan(...)`` of its call. Else a call gets one itself. If the
        call ends without having used it, it is given up.
        """
        self._serving.ticket = ticket

    def branch(self, at_scale: int, count: int) -> None:
        """The next generation goes on from that scale with ``count`` rows for each, next to each
        other as ``repeat_interleave`` has them: variations that share what was drawn before. For
        a sampler that repeats its rows so, and whose arguments do not tell ``Embedding.rows``.
        """
        check_positive("at_scale", at_scale)
        check_positive("count", count)
        self._serving.branch = at_scale, count

    def on_scale(self, function: Callable[[Generation], object] | None) -> None:
        """Call ``function(generation)`` before each scale (``generation.scale``): to show progress,
        ask for its ``provenance``, or stop the sampler by raising. None: no more."""
        self._serving.on_scale = function

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer's attention, [rows, n, heads, head_dim]; the first call of a generation opens
        it.
        """
        with self._alone():
            return self._attend(self._calls[-1], layer, q, k, v)

    def _attend(self, call: SamplerCall, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._thread = threading.current_thread()
        return self._serving.attend(call, layer, q, k, v)

    def is_drawing(self) -> bool:
        """Whether a call of the sampler runs here."""
        return self._is_attached and len(self._calls) > 1

    def takes(self, layer: int) -> bool:
        """Whether a forward of this layer is a step now."""
        if self._view.embedding.toggle is None:
            return self.is_drawing()
        return layer in self._calls[-1].is_on

    def step(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the layer's forward returns."""
        with self._alone():
            call = self._calls[-1]

            def ours() -> Any:
                return take_over(
                    self._view,
                    layer,
                    original_of(self._view.attentions[layer], "forward"),
                    lambda: empty(self._view, layer),
                    lambda q, k, v: self._attend(call, layer, q, k, v),
                    args,
                    kwargs,
                )

            watch = self._watch
            if watch is not None and watch.is_watching:
                out = watch.step(call, layer, args, kwargs, ours)
            else:
                out = ours()
            call.steps += 1
            return out

    def toggled(self, layer: int, enable: bool) -> None:
        """The sampler switches a layer's cache: whatever generation is open ends with the first."""
        with self._alone():
            call = self._calls[-1]
            if layer == 0:
                self._serving.close(call)
                if self._watch is not None:
                    self._watch.begins(call)
            (call.is_on.add if enable else call.is_on.discard)(layer)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SamplerCall:
        """A call of the sampler. Raises EmbeddingError where its schedule is not known."""
        with self._alone():
            call = SamplerCall({}, None, set())
            self._serving.claim(call)
            try:
                call.arguments = self._view.arguments(args, kwargs)
            except TypeError:
                return call  # the sampler will say what is wrong with them
            try:
                call.schedule = self._serving.schedule(call.arguments)
                self._caches.expected(call.schedule)
            except BaseException:
                self._serving.give_up(call)
                raise
            call.is_on = set(self._calls[-1].is_on)
            self._begun.append(call)
            return call

    @contextmanager
    def running(self, call: SamplerCall) -> Iterator[None]:
        """This thread draws, and no other one."""
        with self._alone():
            if call.has_ended or not self._is_attached:
                raise ScheduleError("this call of the sampler has ended with attach()'s block")
            self._calls.append(call)
            try:
                yield
            finally:
                self._calls.remove(call)

    def end(self, call: SamplerCall, is_complete: bool) -> None:
        """The call has returned or failed: its generation ends."""
        call.has_ended = True
        self._begun = [other for other in self._begun if other is not call]
        try:
            if self._watch is not None:
                self._watch.ends(call, is_complete)
        except BaseException:
            is_complete = False
            raise
        finally:
            self._serving.close(call)
            self._serving.give_up(call)
            if not is_complete:
                self._switch_off(call)
            self._outside.is_on = set(call.is_on)  # as its modules are now
        if is_complete and not call.steps:
            raise self._view.error(
                f"{self._view.embedding.sampler}() returned and no attention came here: does it "
                "cache, and do toggle and attentions name what it uses?"
            )

    def abandon(self, call: SamplerCall) -> None:
        """The call will never go on, and another thread draws: its pages go back, no more."""
        call.has_ended = True
        self._begun = [other for other in self._begun if other is not call]
        self._serving.close(call)
        self._serving.give_up(call)

    def close(self) -> None:
        """End the open generation, if any. Raises ScheduleError if it is another thread's."""
        with self._alone():
            self._serving.close(self._calls[-1])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse where another thread draws, or has left a generation half done."""
        generation = self._outside.generation
        open_elsewhere = (
            generation is not None
            and generation.is_open
            and self._thread not in (None, threading.current_thread())
            and self._thread.is_alive()
        )
        if open_elsewhere or not self._lock.acquire():
            raise ScheduleError(
                "another thread draws with this model, whose modules keep the state of one "
                "forward: attach a copy of the model in each thread, or draw in turn"
            )
        try:
            yield
        finally:
            self._lock.release()

    def detach(self) -> None:
        """End the open generations and let the tensors go; ``stats`` stay. Twice is allowed."""
        self._is_attached = False
        for call in self._begun:
            self._switch_off(call)
            self._serving.give_up(call)
        self._serving.let_go()
        if self._serving.last is not None:
            self._stats = self._serving.last.stats
        self._serving.last = None

    def _switch_off(self, call: SamplerCall) -> None:
        """What a sampler that raised, or is not done, has left switched on."""
        toggle = self._view.embedding.toggle
        for layer in sorted(call.is_on):
            if toggle is not None:
                original_of(self._view.attentions[layer], toggle)(False)
            call.is_on.discard(layer)


def empty(view: View, layer: int) -> None:
    """A module's own cache, which stays on: its forward may ask whether it is."""
    if view.embedding.toggle is not None:
        original_of(view.attentions[layer], view.embedding.toggle)(True)
