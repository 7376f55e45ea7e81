"""Where the tokens of a generation lie, and what each step changes about that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator import BlockTable, PageAllocator
from kvruntime.errors import ScheduleError
from kvruntime.plan import Plan


@dataclass(frozen=True, slots=True)
class ScaleRecord:
    """State after all layers of a scale."""

    scale: int
    live_pages: int
    kept_tokens: int  # of one row, over all layers and heads


@dataclass(frozen=True, slots=True)
class Compaction:
    """Survivors that move: from ``sources`` among cached ++ fresh to ``targets`` in the lane."""

    sources: NDArray[np.int64]
    targets: NDArray[np.int64]


class Scheduler:
    """One generation: its place in the schedule, and a block table for each (row chunk, layer).

    Always:
        layers are served in order within a scale, scales in order
        the lengths of a served layer's tables are plan.lengths[scale, layer], an unserved one's the
        scale before
    """

    def __init__(self, plan: Plan, allocator: PageAllocator) -> None:
        geometry = plan.geometry
        self.plan = plan
        self.scale = 0
        self.layer = 0
        self.timeline: list[ScaleRecord] = []
        self.compaction: Compaction | None = (
            None  # of this (scale, layer), once the first chunk made it
        )
        self.chunks = [
            slice(start, min(start + plan.chunk_rows, plan.rows))
            for start in range(0, plan.rows, plan.chunk_rows)
        ]
        self.tables = [
            [
                BlockTable(allocator, rows.stop - rows.start, geometry.heads, plan.page_size)
                for _ in range(geometry.layers)
            ]
            for rows in self.chunks
        ]
        self._allocator = allocator
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

    @property
    def candidates(self) -> NDArray[np.int64]:
        """Token numbers of this layer's cached places, then of this scale."""
        fresh = np.arange(*self.plan.schedule.span(self.scale))
        return np.concatenate([self._tokens[self.layer], fresh])

    def compact(self, kept: NDArray[np.int64]) -> None:
        """Pack the kept places (ascending) to the front: survivors beyond the new end fill the
        holes.
        """
        cached = self._tokens[self.layer].size
        candidates = self.candidates
        stay = kept[kept < min(kept.size, cached)]
        sources = kept[stay.size :]
        is_hole = np.ones(kept.size, dtype=bool)
        is_hole[stay] = False
        targets = np.flatnonzero(is_hole)
        tokens = np.empty(kept.size, dtype=np.int64)
        tokens[stay] = candidates[stay]
        tokens[targets] = candidates[sources]
        self._tokens[self.layer] = tokens
        self.compaction = Compaction(sources, targets)

    def advance(self) -> None:
        """This layer is served; after the last one the scale is."""
        self.layer, self.compaction = self.layer + 1, None
        if self.layer == self.plan.geometry.layers:
            kept = int(self.plan.lengths[self.scale].sum())
            self.timeline.append(ScaleRecord(self.scale, self._allocator.num_live, kept))
            self.scale, self.layer = self.scale + 1, 0

    def close(self) -> None:
        """Give back every page."""
        for tables in self.tables:
            for table in tables:
                table.release()
