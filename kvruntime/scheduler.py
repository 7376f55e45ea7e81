"""Where the tokens of a generation lie, and what each step changes about that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from allocator import BlockTable
from allocator.page_allocator import PageIds
from kvruntime.errors import ScheduleError
from kvruntime.plan import Plan
from kvruntime.pool import Pool, slots_of
from policies import Lengths, Step


@dataclass(frozen=True, slots=True)
class ScaleRecord:
    """State after all layers of a scale."""

    scale: int
    live_pages: int
    kept_tokens: int  # of one row, over all layers and heads


@dataclass(frozen=True, slots=True)
class Move:
    """What a step changes about a layer's lanes, for some rows, as far as the host knows it.

    before, after: tokens of each lane, [heads]. pages: where they lie before the step.
    is_quantised, becomes_quantised: how they are stored before and after.
    kept: candidates (cached ++ fresh) that are written, [m], alike for all lanes; None where the
        policy chooses on the device. The first ``moving.shape[2]`` of them are cached.
    moving: slots that these are read from as they are, [rows, heads, c].
    slots: where the kept ones go, [rows, heads, m]; with ragged heads [rows, n], and then
        ``heads`` and ``places`` [n] say which.
    """

    before: Lengths
    after: Lengths
    pages: PageIds
    is_quantised: bool
    becomes_quantised: bool
    kept: NDArray[np.int64] | None
    moving: NDArray[np.int64]
    slots: NDArray[np.int64]
    heads: NDArray[np.int64]
    places: NDArray[np.int64]

    @property
    def cached(self) -> int:
        """Tokens of the longest lane before the step."""
        return int(self.before.max())

    @property
    def is_ragged(self) -> bool:
        """Whether heads differ in length before the step."""
        return bool((self.before != self.before[0]).any())

    @property
    def needs_candidates(self) -> bool:
        """Whether cached tokens must be read to carry the step out, attention aside."""
        if self.kept is None:
            return True
        handed_over = self.becomes_quantised and not self.is_quantised
        return handed_over and self.cached > 0 and self.kept.size > 0


class Scheduler:
    """One generation: its place in the schedule, and a block table for each (row chunk, layer).

    Always:
        layers are served in order within a scale, scales in order
        the lengths of a served layer's tables are plan.lengths[scale, layer], an unserved one's the
        scale before
    """

    def __init__(self, plan: Plan, pool: Pool) -> None:
        geometry = plan.geometry
        self.plan = plan
        self.scale = 0
        self.layer = 0
        self.timeline: list[ScaleRecord] = []
        self.chunks = [
            slice(start, min(start + plan.chunk_rows, plan.rows))
            for start in range(0, plan.rows, plan.chunk_rows)
        ]
        size = plan.exact_page_size
        self.tables = [
            [
                BlockTable(pool.allocator, rows.stop - rows.start, geometry.heads, size)
                for _ in range(geometry.layers)
            ]
            for rows in self.chunks
        ]
        self._pool = pool
        self._survivors: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._tokens = [np.empty(0, dtype=np.int64) for _ in range(geometry.layers)]

    def expect(self, layer: int, rows: int, tokens: int) -> None:
        """Raise ScheduleError unless this call is the next one of the schedule. Changes nothing."""
        plan = self.plan
        if self.scale == len(plan.schedule):
            raise ScheduleError(f"all {self.scale} scales are done: close() and open() again")
        wanted = (self.layer, plan.rows, plan.schedule.tokens[self.scale])
        if (layer, rows, tokens) != wanted:
            raise ScheduleError(
                f"scale {self.scale} expects layer {wanted[0]} with {wanted[1]} rows "
                f"of {wanted[2]} tokens, "
                f"got layer {layer} with {rows} rows of {tokens}"
            )

    def move(self, chunk: int) -> Move:
        """Take and give back this layer's pages for one chunk of rows, as planned, and say what
        goes where. Whole arrays only; O(pages + tokens moved). Reads must come before writes: a
        page that is given back here still holds what the step reads.
        """
        plan, table = self.plan, self.tables[chunk][self.layer]
        before, pages = table.lengths, table.pages
        after = plan.lengths[self.scale, self.layer]
        was, becomes = self.scale > plan.start_scale, self.scale >= plan.start_scale
        handed_over = becomes and not was
        cached, fresh = int(before.max()), plan.schedule.tokens[self.scale]
        nothing = np.empty(0, dtype=np.int64)
        kept: NDArray[np.int64] | None = nothing
        targets, moving = nothing, np.empty((pages.shape[0], pages.shape[1], 0), dtype=np.int64)
        if not after.any():
            pass
        elif plan.policy.num_queries == 0:
            kept, targets = self._keep_known(cached, handed_over)
        elif (after == cached + fresh).all():  # then it is not ragged
            kept = targets = np.arange(0 if handed_over else cached, cached + fresh)
        else:
            kept, targets = None, np.arange(int(after.max()))
        if kept is not None and not handed_over:
            from_cache = kept[: int(np.searchsorted(kept, cached))]
            moving = slots_of(pages, table.page_size, from_cache)
        if handed_over:
            table.release()
            table.page_size = plan.page_size
        table.resize(after)
        heads = places = nothing
        if table.is_ragged:
            slots, heads, places = self._pool.ragged_slots(table)
        else:
            slots = self._pool.slots(table, targets)
        return Move(before, after, pages, was, becomes, kept, moving, slots, heads, places)

    def _keep_known(
        self, cached: int, handed_over: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which candidates are written, ascending, and at which places of every lane: survivors
        beyond the new end fill the holes. At the hand-over all survivors, from the start.
        """
        if self._survivors is None:  # the first chunk of rows
            fresh = np.arange(*self.plan.schedule.span(self.scale))
            candidates = np.concatenate([self._tokens[self.layer], fresh])
            empty = torch.empty(0, device="cpu")
            keep = self.plan.lengths[self.scale, self.layer]
            at = self.plan.schedule, self.scale, self.layer
            step = Step(*at, keep, candidates, empty, empty, None, 1.0)
            chosen = self.plan.policy.select(step)
            assert isinstance(chosen, np.ndarray)
            stay = chosen[chosen < (0 if handed_over else min(chosen.size, cached))]
            kept = chosen[stay.size :]
            is_hole = np.ones(chosen.size, dtype=bool)
            is_hole[stay] = False
            targets = np.flatnonzero(is_hole)
            tokens = np.empty(chosen.size, dtype=np.int64)
            tokens[stay] = candidates[stay]
            tokens[targets] = candidates[kept]
            self._tokens[self.layer] = tokens
            self._survivors = kept, targets
        return self._survivors

    def advance(self) -> None:
        """This layer is served; after the last one the scale is."""
        self.layer, self._survivors = self.layer + 1, None
        if self.layer == self.plan.geometry.layers:
            kept = int(self.plan.lengths[self.scale].sum())
            self.timeline.append(ScaleRecord(self.scale, self._pool.allocator.num_live, kept))
            self.scale, self.layer = self.scale + 1, 0

    def close(self) -> None:
        """Give back every page."""
        for tables in self.tables:
            for table in tables:
                table.release()
