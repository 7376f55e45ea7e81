"""The generations of a sampler's calls, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvruntime.adapters.caches import Caches
from kvruntime.adapters.embedding import Call, View
from kvruntime.admission import Ticket
from kvruntime.generation import Generation
from kvruntime.sizes import rows_by_scale
from policies import ScaleSchedule


@dataclass(eq=False)
class SamplerCall:
    """One call of the sampler: its generation is its own, however calls are nested or, where
    they are generators, interleaved.

    arguments: by name. is_on: layers whose cache is switched on. steps: layers served. ticket,
    branch: what ``Attachment.use`` and ``branch`` have said of it. is_by_hand: of no sampler, and
    never over: each of its generations takes what was said last.
    """

    arguments: Call
    schedule: ScaleSchedule | None
    is_on: set[int]
    generation: Generation | None = None
    steps: int = 0
    has_ended: bool = False
    ticket: Ticket | None = None
    branch: tuple[int, int] | None = None
    is_by_hand: bool = False


class Serving:
    """Serves the steps of calls of one model's sampler from paged caches."""

    def __init__(self, view: View, caches: Caches) -> None:
        self._view, self._caches = view, caches
        self._open_now: list[Generation] = []
        self.last: Generation | None = None
        self.drawn: ScaleSchedule | None = None  # its schedule
        self.ticket: Ticket | None = None  # of the next call
        self.branch: tuple[int, int] | None = None  # scale and count, of the next call
        self.on_scale: Callable[[Generation], object] | None = None

    def schedule(self, call: Mapping[str, Any]) -> ScaleSchedule:
        """Raises EmbeddingError where the call does not tell."""
        schedule = self._view.schedule(call)
        if schedule is None:
            sampler = self._view.embedding.sampler
            raise self._view.error(
                f"schedule(model, call) gives none: the arguments of {sampler}() must tell, here "
                f"{sorted(call) or 'none'}"
            )
        return schedule

    def rows_from(
        self,
        call: Call,
        schedule: ScaleSchedule,
        rows: int,
        branch: tuple[int, int] | None,
    ) -> Mapping[int, int]:
        """{scale: rows from there on} of a call that begins with so many. Raises EmbeddingError,
        and ValueError for a branch that cannot be.
        """
        rows_from = self._view.rows_from(call, rows)
        try:
            planned = rows_by_scale(len(schedule), rows, rows_from)
        except ValueError as error:
            what = f"rows(model, call, {rows}) gives {rows_from}: {error}"
            raise self._view.error(what) from None
        if branch is None:
            return rows_from
        at, count = branch
        if not 0 < at < len(schedule):
            raise ValueError(f"branch() at scale {at}: it goes at one of 1..{len(schedule) - 1}")
        if planned[at] != planned[at - 1]:
            raise ValueError(
                f"branch() at scale {at}, where {planned[at - 1]} rows become {planned[at]}: it "
                "goes at another scale"
            )
        later = {scale: count * left for scale, left in rows_from.items() if scale > at}
        return {**rows_from, **later, at: count * planned[at]}

    def claim(self, call: SamplerCall) -> None:
        """What was said of the next call is said of this one."""
        call.ticket, self.ticket = self.ticket, None
        call.branch, self.branch = self.branch, None

    def give_up(self, call: SamplerCall) -> None:
        """The call has ended, perhaps without using what was said of it."""
        ticket, call.ticket, call.branch = call.ticket, None, None
        if ticket is not None:
            ticket.cancel()

    def attend(self, call: SamplerCall, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[rows, n, heads, head_dim]; the first layer opens the generation, the last of the last
        scale closes it.
        """
        if call.generation is None:
            self._open(call, k, v)
        assert call.generation is not None
        generation = call.generation
        self._check_place(generation, layer, q)
        if generation.place.copies > 1:
            generation.branch(generation.place.copies)
        elif q.shape[0] < generation.rows:
            generation.keep_rows(q.shape[0])
        if layer == 0 and self.on_scale is not None:
            self.on_scale(generation)
        dtype = self._caches.dtype(v)
        out = generation.attend(layer, q.to(dtype), k.to(dtype), v.to(dtype))
        if generation.scale == len(generation.plan.schedule):
            generation.close()
        return out.to(self._caches.attended(v))

    def _open(self, call: SamplerCall, k: Tensor, v: Tensor) -> None:
        if call.is_by_hand:
            self.claim(call)
        ticket, call.ticket = call.ticket, None
        schedule = call.schedule or self.schedule(call.arguments)
        cache = self._caches.of(schedule, k, v)
        rows = k.shape[0]
        rows_from = self.rows_from(call.arguments, schedule, rows, call.branch)
        self.last, self.drawn = None, schedule
        self.last = call.generation = cache.open(rows, rows_from, ticket)
        self._open_now = [one for one in self._open_now if one.is_open]
        self._open_now.append(call.generation)

    def _check_place(self, generation: Generation, layer: int, q: Tensor) -> None:
        """Raise EmbeddingError, which says what to change, for a step that is not the next one."""
        scale, due, rows, _ = generation.place
        schedule, view = generation.plan.schedule, self._view
        if scale == len(schedule):
            raise view.error(
                f"schedule(model, call) has {scale} scales and the model goes on: it must give all "
                "that the sampler draws"
            )
        if not generation.is_open:
            return  # it has failed: attend() says so
        lane = (generation.plan.geometry.heads, generation.plan.geometry.head_dim)
        if tuple(q.shape[2:]) != lane:
            raise view.error(
                f"heads(attention) gives {lane} heads and numbers of each, the model came with "
                f"{tuple(q.shape[2:])}"
            )
        if layer != due:
            raise view.error(
                f"layer {layer} ran where layer {due} of scale {scale} was due: attentions(model) "
                "must give the modules in the order they run, each once in a scale"
            )
        if q.shape[1] != schedule.tokens[scale]:
            raise view.error(
                f"scale {scale} has {schedule.tokens[scale]} tokens by schedule(model, call), the "
                f"model came with {q.shape[1]}"
            )
        planned = generation.plan.rows_by_scale[scale]
        if q.shape[0] != (rows if due else planned):
            raise view.error(
                f"scale {scale} is planned with {planned} rows, the model came with {q.shape[0]}: "
                "rows(model, call, rows) must give {scale: rows from there on} of this call"
            )

    def close(self, call: SamplerCall) -> None:
        """End the call's generation, if any."""
        if call.generation is not None:
            call.generation.close()
            call.generation = None

    def let_go(self) -> None:
        """End all generations and let the tensors go."""
        for generation in self._open_now:
            generation.close()
        self._open_now.clear()
        self.forget_next()
        self._caches.let_go()

    def forget_next(self) -> None:
        """There will be no next call."""
        ticket, self.ticket, self.branch = self.ticket, None, None
        if ticket is not None:
            ticket.cancel()
