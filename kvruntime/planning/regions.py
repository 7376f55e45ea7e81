"""The tensors of every kind of step, declared once: the planner adds them up, the step takes them.

A step's regions are the base ones, and beside them those of one phase at a time: read, select,
commit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from kvruntime.storage.layout import RecordFormat
from kvruntime.storage.records import dequantize_scratch, quantize_scratch
from policies import DTYPE_BYTES, Policy, Region, StepSizes, held_bytes, torch_bytes

READ_TOKENS = 1024  # of a lane, turned back from records at a time
WRAPPED_BYTES = 64  # numbers that torch makes tensors of, a few at a time
FOLD_TOKENS = 256  # of a lane, turned into float32 and added to their centroids at a time


class Kind(Enum):
    """How a step stores what it keeps."""

    NOTHING = "nothing"  # the last scale
    SHIFT = "shift"  # the host knows; what stays in a lane is not touched
    KEEP = "keep"  # the host knows; every lane is written from its start
    CHOOSE = "choose"  # the policy decides on the device
    FOLD = "fold"  # the same, and kept tokens become means


@dataclass(frozen=True, slots=True)
class StepShape(StepSizes):
    """Sizes of one layer's step for some rows.

    table, page_size, reads: pages of the longest lane before, tokens in one, and their records
        (None: exact). new_table, new_page_size, writes: the same after the step.
    written: tokens written for one row, over its heads.
    sources: of a shift, how many candidates are written to each lane; moved: how many are cached.
    fresh_is_slice: of a shift, whether those of the new scale are neighbours.
    is_ragged: whether heads differ in length before. is_even: whether they are equal after.
    weighted: whether stored tokens have log weights.
    """

    kind: Kind
    table: int
    page_size: int
    reads: RecordFormat | None
    new_table: int
    new_page_size: int
    writes: RecordFormat | None
    written: int
    sources: int
    moved: int
    fresh_is_slice: bool
    is_ragged: bool
    is_even: bool
    weighted: bool

    @property
    def places(self) -> int:
        """Token places of a lane in the workspace: exact pages are copied whole."""
        return max(self.candidates, 0 if self.reads else self.table * self.page_size)

    @property
    def needs_candidates(self) -> bool:
        """Whether cached tokens must be read to store what is kept, attention aside."""
        return self.kind in (Kind.KEEP, Kind.CHOOSE, Kind.FOLD)

    @property
    def gathers(self) -> bool:
        """Whether there is anything to gather, if attention does not read pages."""
        return self.cached > 0 or self.needs_candidates

    @property
    def copies_records(self) -> bool:
        """Whether records that were cached are written as they are, and not quantised again."""
        is_known = self.kind in (Kind.KEEP, Kind.CHOOSE)
        return is_known and self.cached > 0 and self.reads is not None and self.reads == self.writes

    @property
    def weighs_in_place(self) -> bool:
        """Whether a fold may multiply the gathered tokens themselves."""
        return self.dtype == "float32" and self.places == self.candidates

    @property
    def has_bias(self) -> bool:
        """Whether logits of gathered tokens get something added."""
        return self.cached > 0 and (self.is_ragged or self.weighted)


@dataclass(frozen=True, slots=True)
class StepRegions:
    """Regions of a step, by phase."""

    base: tuple[Region, ...]
    read: tuple[Region, ...]
    select: tuple[Region, ...]
    commit: tuple[Region, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the workspace that the step uses."""
        phases = (self.read, self.select, self.commit)
        return held_bytes(self.base) + max(held_bytes(phase) for phase in phases)

    @property
    def torch_bytes(self) -> int:
        """Bytes that torch allocates inside, at the worst."""
        phases = (self.base, self.read, self.select, self.commit)
        wrapped = WRAPPED_BYTES if any(phases) else 0
        return wrapped + max(torch_bytes(phase) for phase in phases)


def declare(shape: StepShape, policy: Policy) -> StepRegions:
    """The regions of such a step."""
    select = policy.scratch(shape) if shape.kind in (Kind.CHOOSE, Kind.FOLD) else []
    if select:
        each = _checked_bytes(shape)
        most = (shape.rows, shape.heads, shape.kept, each)
        select = [*select, Region("torch: check", most, "uint8", by_torch=True)]
    return StepRegions(
        tuple(_base(shape)), tuple(_read(shape)), tuple(select), tuple(_commit(shape))
    )


def _checked_bytes(shape: StepShape) -> int:
    """Bytes for each kept place while a choice is checked (step.choose)."""
    if shape.kind is Kind.FOLD:
        return 19  # the place, where that candidate is folded, three comparisons
    if shape.is_ragged:
        return 11  # the place, three comparisons
    return 1 if shape.is_even else 8  # two comparisons; which places are beyond the end


def _base(shape: StepShape) -> list[Region]:
    rows, heads = shape.rows, shape.heads
    regions = []
    if shape.cached:
        regions.append(Region("ids", (rows, heads, shape.table), "int64"))
    if shape.gathers:
        room = (rows, heads, shape.places, shape.head_dim)
        regions += [Region("keys", room, shape.dtype), Region("values", room, shape.dtype)]
    if shape.has_bias:
        alike = rows if shape.weighted else 1
        regions.append(Region("log_weights", (alike, heads, 1, shape.candidates), "float32"))
    if shape.kind in (Kind.CHOOSE, Kind.FOLD):
        regions.append(Region("chosen", (rows, heads, shape.kept), "int64"))
    if shape.kind is Kind.FOLD:
        regions.append(Region("into", (rows, heads, shape.candidates), "int64"))
    return regions


def _read(shape: StepShape) -> list[Region]:
    rows, heads, lanes = shape.rows, shape.heads, shape.rows * shape.heads
    regions: list[Region] = []
    if not shape.gathers or not shape.cached:
        return regions
    if shape.reads is not None:
        pages = min(shape.table, max(1, READ_TOKENS // shape.page_size))
        tokens = pages * shape.page_size
        words = shape.reads.words(shape.head_dim)
        regions.append(Region("records", (lanes, tokens, words), "int32"))
        regions += dequantize_scratch(lanes, tokens, shape.head_dim, shape.dtype, shape.reads)
    if shape.weighted:
        regions.append(Region("halves", (rows, heads, shape.table, shape.page_size), "float16"))
    return regions


def _commit(shape: StepShape) -> list[Region]:
    if shape.kind is Kind.NOTHING:
        return []
    rows, lanes, written = shape.rows, shape.rows * shape.heads, shape.rows * shape.written
    width = shape.writes.words(shape.head_dim) if shape.writes else shape.head_dim
    stored = "int32" if shape.writes else shape.dtype
    regions = [
        Region("new_ids", (rows, shape.heads, shape.new_table), "int64"),
        Region("slots", (rows, shape.written), "int64"),
    ]
    if shape.weighted:
        regions += [
            Region("weight_slots", (rows, shape.written), "int64"),
            Region("log_kept", (rows, shape.written), "float16"),
        ]
    if shape.kind is Kind.SHIFT:
        moved, added = lanes * shape.moved, lanes * (shape.sources - shape.moved)
        regions += [
            Region("old_slots", (moved,), "int64"),
            Region("moved", (2, moved, width), stored),
        ]
        if shape.weighted:
            regions.append(Region("torch: log weights", (moved,), "float16", by_torch=True))
        if shape.writes or not shape.fresh_is_slice:
            regions.append(Region("staged", (added, shape.head_dim), shape.dtype))
        if shape.writes:
            regions.append(Region("encoded", (added, width), "int32"))
            regions += quantize_scratch(added, shape.head_dim, shape.writes)
        return regions
    if not shape.is_even:
        regions.append(Region("spread", (rows, shape.heads, shape.kept), "int64"))
    regions.append(Region("torch: starts", (lanes,), "int64", by_torch=True))
    regions += _fold(shape) if shape.kind is Kind.FOLD else _keep(shape)
    if shape.writes:
        regions.append(Region("encoded", (written, width), "int32"))
        regions += quantize_scratch(written, shape.head_dim, shape.writes)
    return regions


def _keep(shape: StepShape) -> list[Region]:
    """Of steps that write candidates as they are."""
    written = shape.rows * shape.written
    regions = [
        Region("at", (shape.rows, shape.written), "int64"),
        Region("staged", (written, shape.head_dim), shape.dtype),
    ]
    if shape.weighted:
        places = shape.heads * shape.kept
        regions.append(Region("log_spread", (shape.rows, shape.heads, shape.kept), "float32"))
        regions.append(Region("torch: places", (shape.rows, places), "int64", by_torch=True))
    if shape.copies_records:
        assert shape.writes is not None
        width = shape.writes.words(shape.head_dim)
        regions += [
            Region("old_slots", (shape.rows, shape.written), "int64"),
            Region("old_pages", (shape.rows, shape.written), "int64"),
            Region("was_cached", (shape.rows, shape.written), "bool"),
            Region("old_records", (2, shape.rows, shape.written, width), "int32"),
        ]
    return regions


def _fold(shape: StepShape) -> list[Region]:
    """Of steps that write means."""
    lanes, written = shape.rows * shape.heads, shape.rows * shape.written
    tokens = min(FOLD_TOKENS, shape.candidates)
    regions = [
        Region("sums", (lanes, shape.kept, shape.head_dim), "float32"),
        Region("counts", (lanes, shape.kept), "float32"),
        Region("log_counts", (lanes, shape.kept), "float32"),
        Region("shares", (lanes, shape.candidates), "float32"),
        Region("targets", (lanes, shape.candidates), "int64"),
        Region("torch: dropped", (lanes, shape.candidates), "bool", by_torch=True),
    ]
    if not shape.weighs_in_place:
        regions += [
            Region("block", (lanes, tokens, shape.head_dim), "float32"),
            Region("torch: targets", (lanes, 2 * tokens), "int64", by_torch=True),
        ]
    if not shape.is_even:
        regions.append(Region("packed", (written, shape.head_dim), "float32"))
        regions.append(Region("torch: packed", (shape.rows, shape.written), "float32", True))
    if shape.writes is None and shape.dtype != "float32":
        regions.append(Region("staged", (written, shape.head_dim), shape.dtype))
    return regions


def output_bytes(shape: StepShape, all_rows: int) -> int:
    """What attention returns: all rows' output where they come in several chunks."""
    if all_rows == shape.rows:
        return 0
    numbers = math.prod((all_rows, shape.fresh, shape.heads, shape.head_dim))
    return numbers * DTYPE_BYTES[shape.dtype]
