"""What a generation will need, to the page and to the byte, before its first step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator import BlockTable
from kvruntime.planning.baseline import baseline_bytes, own_curve
from kvruntime.planning.occupancy import (
    Occupancy,
    occupancy,
    occupancy_from,
    repeated_occupancy,
)
from kvruntime.planning.regions import StepRegions, output_bytes
from kvruntime.planning.shapes import StepShape
from kvruntime.planning.steps import Steps
from kvruntime.sizes import fewer_rows, in_proportion, largest, rows_by_scale
from kvruntime.storage.layout import PLANE_BYTES, PageFormat, PageLayout, Records, stored_bytes
from policies import CacheGeometry

WORKSPACE_LIMIT = 2**30  # bytes; one row may exceed it, more rows may not


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan(Steps):
    """Exact demand of one generation.

    rows_by_scale: rows of each scale: samplers may drop the guidance rows half way, or repeat rows
        (``Generation.branch``), which share pages then.
    bytes_per_page, plane_bytes_per_page: of a page's K and V, and of its planes.
    own: what the model's own cache would hold, where its number formats are others.
    seen: pages at each step where they are not those of the planned rows (``seen_from``).
    row_shapes: what was worked out already, shared by plans of other rows.
    Always: peak_pages == max of occupancy.within; unless rows are repeated, that is
        max over scales of rows_by_scale * max over layers of row_pages;
        page_bytes == peak_pages * (bytes_per_page + plane_bytes_per_page).
    """

    budget_tokens: int
    rows_by_scale: tuple[int, ...]
    workspace_limit: int
    bytes_per_page: int  # K and V
    plane_bytes_per_page: int
    own: CacheGeometry | None = None
    seen: Occupancy | None = None
    row_shapes: set[tuple[int, StepShape]] = field(default_factory=set, repr=False)

    @property
    def rows(self) -> int:
        """Rows of the first scale."""
        return self.rows_by_scale[0]

    def copies(self, scale: int) -> int:
        """How many rows each row becomes when that scale begins, 1 if none is repeated."""
        rows = self.rows_by_scale
        return max(1, rows[scale] // rows[scale - 1]) if 0 < scale < len(rows) else 1

    @property
    def branches(self) -> bool:
        """Whether rows are ever repeated."""
        return any(self.copies(scale) > 1 for scale in range(len(self.schedule)))

    @property
    def records(self) -> Records | None:
        """The coarsest format; None where all pages are exact."""
        return self.formats[-1].records

    @property
    def page_size(self) -> int:
        """Tokens in a page of the coarsest format."""
        return self.formats[-1].page_size

    @property
    def exact_page_size(self) -> int:
        return self.formats[0].page_size

    @cached_property
    def layer_pages(self) -> NDArray[np.int64]:
        """Pages one row holds of a layer after each scale, int64 [scales, layers]."""
        pages: NDArray[np.int64] = (-(-self.tokens // self.page_tokens[:, :, None])).sum(axis=2)
        return pages

    @cached_property
    def row_pages(self) -> NDArray[np.int64]:
        """Pages one row holds after each (scale, layer) event, int64 [scales, layers]."""
        return running_total(self.layer_pages)

    @cached_property
    def occupancy(self) -> Occupancy:
        """Pages that all rows hold at each step."""
        if self.seen is not None:
            return self.seen
        rows, pages = self.rows_by_scale, self.layer_pages
        if not self.branches:
            return occupancy(rows, pages)
        alike = [self._changes(layer) for layer in range(self.geometry.layers)]
        heads = self.geometry.heads
        return repeated_occupancy(rows, pages, self.chunk_rows, self.propose, heads, alike)

    def _changes(self, layer: int) -> Hashable:
        """What layers have in common whose tables go through the same changes."""
        known = [id(self.positions.step(scale, layer)) for scale in range(len(self.schedule))]
        return (*known, self.tokens[:, layer].tobytes(), self.stage[:, layer].tobytes())

    def seen_from(self, scale: int, tables: Sequence[BlockTable]) -> Plan:
        """The same plan, where from that scale on pages are counted for what these tables hold now
        (rehearsals, which are changed) and not for the rows that were planned.
        """
        rows, past = self.rows_by_scale[scale:], self.occupancy
        later = occupancy_from(tables, scale, rows, self.chunk_rows, self.propose)
        within, after, start = (
            np.concatenate([getattr(past, name)[:scale], getattr(later, name)])
            for name in ("within", "after", "at_start")
        )
        return replace(self, seen=Occupancy(within, after, start))

    @property
    def start_scale(self) -> int:
        """The first scale after which any layer is quantised; the number of scales if none is."""
        any_layer = self.quantised.any(axis=1)
        return int(np.argmax(any_layer)) if any_layer.any() else len(self.schedule)

    @property
    def page_format(self) -> dict[str, Any]:
        """How pages are quantised, as users ask for it; None throughout if they never are."""
        records = self.records
        return {
            "kv_dtype": records.name if records else None,
            "kv_groups": records.groups if records else None,
            "kv_start": self.start_scale if records else None,
        }

    @property
    def peak_pages(self) -> int:
        return int(self.occupancy.within.max())

    def peak_pages_from(self, scale: int) -> int:
        """The most pages from the moment before that scale's first step on."""
        start, within = self.occupancy.at_start[scale:], self.occupancy.within[scale:]
        if not start.size:
            return int(self.occupancy.after[-1, -1])
        return max(int(start[0]), int(within.max()))

    def _most(self, of_a_row: NDArray[np.int64]) -> int:  # of what each row has at each scale
        return max(rows * int(n) for rows, n in zip(self.rows_by_scale, of_a_row, strict=True))

    @property
    def page_bytes(self) -> int:
        """Bytes of every page that is live at the peak: K, V and planes."""
        return self.peak_pages * (self.bytes_per_page + self.plane_bytes_per_page)

    @property
    def plane_bytes(self) -> int:
        """The part of page_bytes that planes take, log weights among them; of policies that have
        none 0, unless the pool's pages have room for some."""
        return self.peak_pages * self.plane_bytes_per_page

    @property
    def token_bytes(self) -> int:
        """Bytes of the tokens kept after a scale, at the worst scale: what the papers count."""
        return self._most((self.tokens.sum(axis=2) * self._unit()).sum(axis=1))

    @property
    def peak_token_bytes(self) -> int:
        """The same at the worst (scale, layer): drafters may grow before refiners have shrunk."""
        return self._most(running_total(self.tokens.sum(axis=2) * self._unit()).max(axis=1))

    def _unit(self) -> NDArray[np.int64]:
        """Bytes of one kept token after each scale, [scales, layers]."""
        stored = [stored_bytes(self.geometry, each.records) for each in self.formats]
        return np.array(stored)[self.stage] + PLANE_BYTES * len(self.planes)

    @cached_property
    def chunk_rows(self) -> int:
        """Rows processed at a time: as many as the workspace limit allows, at least one."""
        limit, most = self.workspace_limit, max(self.rows_by_scale)
        if self._step_bytes(most) <= limit:  # one chunk needs no output beside
            return most
        return largest(lambda rows: self._step_bytes(rows) <= limit, 1, most)

    @cached_property
    def workspace_bytes(self) -> int:
        """One layer's step at its worst: what it works in, and what torch allocates beside."""
        return self._step_bytes(self.chunk_rows)

    @cached_property
    def scratch_bytes(self) -> int:
        """The part of the workspace that is made beforehand."""
        return max(regions.num_bytes for _, _, regions in self._steps(self.chunk_rows))

    def _step_bytes(self, rows: int) -> int:
        steps = self._steps(rows)
        beside = max(regions.torch_bytes + output_bytes(shape, of) for of, shape, regions in steps)
        return max(regions.num_bytes for _, _, regions in steps) + beside

    def _steps(self, rows: int) -> list[tuple[int, StepShape, StepRegions]]:
        """All rows, and the shape and regions of a chunk of at most ``rows``, of every step."""
        if not self.row_shapes:
            scales, layers = range(len(self.schedule)), range(self.geometry.layers)
            # all or none of them: a policy that is asked may raise
            shapes = {(scale, self.shape(scale, layer, 1)) for scale in scales for layer in layers}
            self.row_shapes.update(shapes)
        steps = {(self.rows_by_scale[scale], shape) for scale, shape in self.row_shapes}
        of_rows = [(of, replace(shape, rows=min(rows, of))) for of, shape in steps]
        return [(of, shape, self.regions(shape)) for of, shape in of_rows]

    @property
    def total_bytes(self) -> int:
        return self.page_bytes + self.workspace_bytes

    def baseline_bytes(self) -> dict[str, int]:
        """The model's own cache of as many rows (planning.baseline)."""
        return baseline_bytes(self.own or self.geometry, self.schedule, self.rows_by_scale)

    def own_curve(self) -> NDArray[np.int64]:
        """The same step by step, int64 [scales, layers]."""
        return own_curve(self.own or self.geometry, self.schedule, self.rows_by_scale)

    def for_rows(self, rows: int, rows_from: Mapping[int, int] | None = None) -> Plan:
        """The same generation with other rows. rows_from: {scale: rows from there on}. Raises
        ValueError for bad ones.
        """
        planned = rows_by_scale(len(self.schedule), rows, rows_from)
        return replace(self, rows_by_scale=planned, seen=None)

    def thinned(self, rows: int, scale: int) -> Plan:
        """The same generation with at most so many rows from that scale on, until they are
        repeated.
        """
        return replace(self, rows_by_scale=fewer_rows(self.rows_by_scale, rows, scale), seen=None)

    def as_large_for(self, rows: int) -> Plan:
        """The same generation begun with other rows: as large a share of them goes, each is
        repeated as often.
        """
        return replace(self, rows_by_scale=in_proportion(self.rows_by_scale, rows), seen=None)

    def layout(self, pages: PageFormat, page_bytes: int | None = None) -> PageLayout:
        """How pages of one of the formats are read."""
        geometry = self.geometry
        return PageLayout(
            pages.page_size,
            (page_bytes or self.bytes_per_page) // 2,
            geometry.head_dim,
            geometry.key_dtype,
            pages.records,
            len(self.planes),
        )

    def longest_table(self, pages: PageFormat) -> int:
        """Most pages of one lane that are ever read in that format, at least 1."""
        tables = -(-self.tokens.max(axis=2) // self.page_tokens)
        is_it = self.stage == self.formats.index(pages)
        return max(1, int(np.where(is_it, tables, 0).max()))


def running_total(after: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum over layers after each (scale, layer) event, when layers change one by one. [scales,
    layers].
    """
    changes = np.diff(after, axis=0, prepend=np.zeros_like(after[:1]))
    totals: NDArray[np.int64] = changes.ravel().cumsum().reshape(after.shape)
    return totals
