"""What every step of a generation does to a layer's lanes, whatever the rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from allocator import BlockTable, Change
from kvruntime.planning.positions import Positions
from kvruntime.planning.regions import StepRegions, declare
from kvruntime.planning.shapes import Kind, StepShape
from kvruntime.storage.layout import PageFormat
from policies import CacheGeometry, Lengths, Policy, ScaleSchedule


@dataclass(frozen=True, eq=False, kw_only=True)
class Steps:
    """The steps of a generation, (scale, layer) by (scale, layer).

    tokens: tokens of each lane after (scale, layer), int64 [scales, layers, heads].
    formats: what pages hold, exact at first, then coarser; pages are equally large. stage: which
        of them a layer has after a scale, int64 [scales, layers]; it never falls.
    planes: numbers that a stored token has beside K and V (policies.base.PLANES).
    positions: what the host knows of every step.
    attended: candidates that a lane's queries attend to at each scale, int64 [scales]; None: all.
    declared, shapes: what was worked out already.
    """

    geometry: CacheGeometry
    schedule: ScaleSchedule
    policy: Policy
    tokens: Lengths
    stage: NDArray[np.int64]
    formats: tuple[PageFormat, ...]
    planes: tuple[str, ...]
    positions: Positions
    attended: Lengths | None = None
    declared: dict[StepShape, StepRegions] = field(default_factory=dict, repr=False)
    shapes: dict[tuple[int, int, int], StepShape] = field(default_factory=dict, repr=False)

    @cached_property
    def quantised(self) -> NDArray[np.bool_]:
        """Whether a layer's tokens are records after a scale, bool [scales, layers]."""
        return self.stage > 0

    @cached_property
    def page_tokens(self) -> NDArray[np.int64]:
        """Tokens in a page of a layer after each scale, int64 [scales, layers]."""
        return np.array([each.page_size for each in self.formats])[self.stage]

    def lengths_before(self, scale: int, layer: int) -> NDArray[np.int64]:
        """Tokens of each head before this step, [heads]."""
        after = self.tokens[scale, layer]
        return self.tokens[scale - 1, layer] if scale else np.zeros_like(after)

    def format_after(self, scale: int, layer: int) -> PageFormat:
        """What the layer's pages hold after this scale; before the first one, exact tokens."""
        return self.formats[int(self.stage[scale, layer]) if scale >= 0 else 0]

    def shape(self, scale: int, layer: int, rows: int) -> StepShape:
        """The sizes of this layer's step for so many rows."""
        if (scale, layer, rows) not in self.shapes:
            self.shapes[scale, layer, rows] = self._shape(scale, layer, rows)
        return self.shapes[scale, layer, rows]

    def _shape(self, scale: int, layer: int, rows: int) -> StepShape:
        before, after = self.lengths_before(scale, layer), self.tokens[scale, layer]
        was, becomes = (self.format_after(at, layer) for at in (scale - 1, scale))
        known = self.positions.step(scale, layer)
        shift = known.shift
        if not after.any():
            kind = Kind.NOTHING
        elif shift is not None:
            kind = Kind.SHIFT
        elif known.keep is not None:
            kind = Kind.KEEP
        else:
            kind = Kind.FOLD if self.policy.needs.folds else Kind.CHOOSE
        folds = kind is Kind.FOLD
        cached, kept = int(before.max()), int(after.max())
        return StepShape(
            kind=kind,
            rows=rows,
            heads=self.geometry.heads,
            head_dim=self.geometry.head_dim,
            dtype=self.geometry.key_dtype,
            cached=cached,
            fresh=self.schedule.tokens[scale],
            table=-(-cached // was.page_size),
            page_size=was.page_size,
            reads=was.records,
            kept=kept,
            new_table=-(-kept // becomes.page_size),
            new_page_size=becomes.page_size,
            writes=becomes.records,
            written=int(after.sum()) if shift is None else self.geometry.heads * shift.sources.size,
            sources=0 if shift is None else shift.sources.size,
            moved=0 if shift is None else shift.moved,
            fresh_is_slice=shift is None or shift.fresh_is_slice,
            is_ragged=bool((before != cached).any()),
            is_even=bool((after == kept).all()),
            planes=self.planes,
            attended=self._attended(scale, before),
            fitted=min(self.policy.needs.refit, self.schedule.tokens[scale]) if folds else 0,
        )

    def _attended(self, scale: int, before: NDArray[np.int64]) -> int:
        """Candidates that a lane's queries attend to at this scale; 0: all there are."""
        if self.attended is None:
            return 0
        most = int(self.attended[scale])
        return most if most < int(before.max()) + self.schedule.tokens[scale] else 0

    def propose(self, table: BlockTable, scale: int, layer: int, rows: slice) -> Change:
        """What this step makes of these rows of the layer's table."""
        shape = self.shape(scale, layer, rows.stop - rows.start)
        return table.propose(
            rows,
            self.tokens[scale, layer],
            shape.new_page_size,
            self.positions.step(scale, layer).written_pages(shape.new_page_size),
            afresh=shape.reads != shape.writes and shape.cached > 0,
        )

    def regions(self, shape: StepShape) -> StepRegions:
        """What a step of this shape works in."""
        if shape not in self.declared:
            self.declared[shape] = declare(shape, self.policy)
        return self.declared[shape]
