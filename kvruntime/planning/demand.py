"""What a generation will need, to the page and to the byte, before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvruntime.planning.baseline import baseline_bytes
from kvruntime.planning.positions import Positions
from kvruntime.planning.regions import StepRegions, declare, output_bytes
from kvruntime.planning.shapes import Kind, StepShape
from kvruntime.sizes import largest, rows_by_scale
from kvruntime.storage.layout import PLANE_BYTES, PageFormat, PageLayout, Records, stored_bytes
from policies import CacheGeometry, Lengths, Policy, ScaleSchedule

WORKSPACE_LIMIT = 2**30  # bytes; one row may exceed it, more rows may not


@dataclass(frozen=True, eq=False)
class Plan:
    """Exact demand of one generation.

    rows_by_scale: rows of each scale, never more than of the scale before: samplers may drop the
        guidance rows half way.
    tokens: tokens of each lane after (scale, layer), int64 [scales, layers, heads].
    formats: what pages hold, exact at first, then coarser; pages are equally large. stage: which
        of them a layer has after a scale, int64 [scales, layers]; it never falls.
    bytes_per_page, plane_bytes_per_page: of a page's K and V, and of its planes.
    planes: numbers that a stored token has beside K and V (policies.base.PLANES).
    positions: what the host knows of every step.
    attended: candidates that a lane's queries attend to at each scale, int64 [scales]; None: all.
    own: what the model's own cache would hold, where its number formats are others.
    declared, shapes, row_shapes: what was worked out already, shared by plans of other rows.
    Always: peak_pages == max over scales of rows_by_scale * max over layers of row_pages;
        page_bytes == peak_pages * (bytes_per_page + plane_bytes_per_page).
    """

    geometry: CacheGeometry
    schedule: ScaleSchedule
    policy: Policy
    budget_tokens: int
    rows_by_scale: tuple[int, ...]
    workspace_limit: int
    tokens: Lengths
    stage: NDArray[np.int64]
    formats: tuple[PageFormat, ...]
    bytes_per_page: int  # K and V
    plane_bytes_per_page: int
    planes: tuple[str, ...]
    positions: Positions
    attended: Lengths | None = None
    own: CacheGeometry | None = None
    declared: dict[StepShape, StepRegions] = field(default_factory=dict, repr=False)
    shapes: dict[tuple[int, int, int], StepShape] = field(default_factory=dict, repr=False)
    row_shapes: set[tuple[int, StepShape]] = field(default_factory=set, repr=False)

    @property
    def rows(self) -> int:
        """Rows of the first scale: the most there are."""
        return self.rows_by_scale[0]

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
    def quantised(self) -> NDArray[np.bool_]:
        """Whether a layer's tokens are records after a scale, bool [scales, layers]."""
        return self.stage > 0

    @cached_property
    def page_tokens(self) -> NDArray[np.int64]:
        """Tokens in a page of a layer after each scale, int64 [scales, layers]."""
        return np.array([each.page_size for each in self.formats])[self.stage]

    @cached_property
    def row_pages(self) -> NDArray[np.int64]:
        """Pages one row holds after each (scale, layer) event, int64 [scales, layers]."""
        return running_total((-(-self.tokens // self.page_tokens[:, :, None])).sum(axis=2))

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
        return self._most(self.row_pages.max(axis=1))

    def peak_pages_from(self, scale: int) -> int:
        """The most pages from the moment before that scale's first step on."""
        before = int(self.row_pages[scale - 1, -1]) if scale else 0
        pages = [before, *map(int, self.row_pages[scale:].max(axis=1))]
        by_scale = (*self.rows_by_scale, self.rows_by_scale[-1])  # after the last scale too
        rows = [by_scale[scale], *self.rows_by_scale[scale:]]
        return max(n * held for n, held in zip(rows, pages, strict=True))

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
        if self._step_bytes(self.rows) <= self.workspace_limit:  # one chunk needs no output beside
            return self.rows
        limit = self.workspace_limit
        return largest(lambda rows: self._step_bytes(rows) <= limit, 1, self.rows)

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

    def regions(self, shape: StepShape) -> StepRegions:
        """What a step of this shape works in."""
        if shape not in self.declared:
            self.declared[shape] = declare(shape, self.policy)
        return self.declared[shape]

    @property
    def total_bytes(self) -> int:
        return self.page_bytes + self.workspace_bytes

    def baseline_bytes(self) -> dict[str, int]:
        """The model's own cache of as many rows (planning.baseline)."""
        return baseline_bytes(self.own or self.geometry, self.schedule, self.rows_by_scale)

    def for_rows(self, rows: int, rows_from: Mapping[int, int] | None = None) -> Plan:
        """The same generation with other rows. rows_from: {scale: rows from there on}. Raises
        ValueError for bad ones.
        """
        return replace(self, rows_by_scale=rows_by_scale(len(self.schedule), rows, rows_from))

    def thinned(self, rows: int, scale: int) -> Plan:
        """The same generation with at most so many rows from that scale on."""
        before, after = self.rows_by_scale[:scale], self.rows_by_scale[scale:]
        return replace(self, rows_by_scale=(*before, *(min(rows, n) for n in after)))

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


def running_total(after: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum over layers after each (scale, layer) event, when layers change one by one. [scales,
    layers].
    """
    changes = np.diff(after, axis=0, prepend=np.zeros_like(after[:1]))
    totals: NDArray[np.int64] = changes.ravel().cumsum().reshape(after.shape)
    return totals
