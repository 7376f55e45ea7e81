"""Prepare: all that the host can work out about a step, changing nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator import BlockTable, Change
from allocator.page_allocator import PageIds
from kvruntime.planning.demand import Plan
from kvruntime.planning.positions import KnownStep
from kvruntime.planning.shapes import StepShape
from kvruntime.planning.workspace import StepViews, Workspace
from kvruntime.storage.coding import Transform
from kvruntime.storage.pool import Pool


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A step of some rows before it runs.

    size: of the scale, in tokens.
    ids: pages that hold the cached tokens, int32 [rows, heads, table].
    before, after: tokens of each head, [heads].
    change: what becomes of the pages.
    transforms: of K and V where pages are transform-coded.
    """

    scale: int
    layer: int
    rows: slice
    size: tuple[int, ...]
    shape: StepShape
    views: StepViews
    known: KnownStep
    ids: PageIds
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    change: Change
    transforms: tuple[Transform, Transform] | None

    def transform(self, part: int) -> Transform:
        """Of K or V (KEYS, VALUES), where pages are transform-coded."""
        assert self.transforms is not None, "PagedKVCache asks for a coding"
        return self.transforms[part]


def prepare(
    plan: Plan,
    pool: Pool,
    table: BlockTable,
    scale: int,
    layer: int,
    rows: slice,
    workspace: Workspace,
    transforms: tuple[Transform, Transform] | None = None,
) -> Prepared:
    """Work the step out for these rows. Whole arrays only; O(pages of the rows)."""
    shape = plan.shape(scale, layer, rows.stop - rows.start)
    known = plan.positions.step(scale, layer)
    before, after = plan.lengths_before(scale, layer), plan.tokens[scale, layer]
    with pool.changing():  # of pages that are shared others change how many own them
        change = plan.propose(table, scale, layer, rows)
    pool.follow()
    return Prepared(
        scale=scale,
        layer=layer,
        rows=rows,
        size=plan.schedule.sizes[scale],
        shape=shape,
        views=workspace.views(shape, plan.regions(shape)),
        known=known,
        ids=np.ascontiguousarray(table.pages[rows, :, : shape.table]),
        before=before,
        after=after,
        change=change,
        transforms=transforms,
    )
