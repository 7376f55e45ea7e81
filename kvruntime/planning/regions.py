"""The tensors of every kind of step, declared once: the planner adds them up, the step takes them.

A step's regions are the base ones, and beside them those of one phase at a time: read, select,
commit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvruntime.planning.shapes import Kind, StepShape
from kvruntime.storage.coding import coding_scratch, lanes_scratch
from kvruntime.storage.layout import CodedFormat, RecordFormat, Records
from kvruntime.storage.records import dequantize_scratch, quantize_scratch
from policies import DTYPE_BYTES, Policy, Region, held_bytes, torch_bytes
from policies.scoring import BLOCK

READ_TOKENS = 1024  # of a lane, turned back from records at a time
CODED_TOKENS = 256  # the same of transform-coded ones, which take more room meanwhile
WRAPPED_BYTES = 64  # numbers that torch makes tensors of, a few at a time


@dataclass(frozen=True, slots=True)
class StepRegions:
    """Regions of a step, by phase; kept: those of select that last to the end of the step."""

    base: tuple[Region, ...]
    kept: tuple[Region, ...]
    read: tuple[Region, ...]
    select: tuple[Region, ...]
    commit: tuple[Region, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the workspace that the step uses."""
        phases = (self.read, self.select, self.commit)
        whole = held_bytes(self.base) + held_bytes(self.kept)
        return whole + max(held_bytes(phase) for phase in phases)

    @property
    def torch_bytes(self) -> int:
        """Bytes that torch allocates inside, at the worst."""
        phases = (self.base, self.read, self.select, self.commit)
        wrapped = WRAPPED_BYTES if any(phases) else 0
        return wrapped + max(torch_bytes(phase) for phase in phases)


def declare(shape: StepShape, policy: Policy) -> StepRegions:
    """The regions of such a step."""
    select = policy.scratch(shape) if shape.asks_policy else []
    if select and shape.kind in (Kind.CHOOSE, Kind.FOLD):
        each = _checked_bytes(shape)
        most = (shape.rows, shape.heads, shape.kept, each)
        select = [*select, Region("torch: check", most, "uint8", by_torch=True)]
    return StepRegions(
        base=tuple(_base(shape)),
        kept=tuple(region for region in select if region.stays),
        read=tuple(_read(shape)),
        select=tuple(region for region in select if not region.stays),
        commit=tuple(_commit(shape)),
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
    if shape.gathers_planes:
        room = (rows, heads, shape.places, len(shape.planes))
        regions.append(Region("planes", room, "float16"))
    if shape.kind in (Kind.CHOOSE, Kind.FOLD):
        regions.append(Region("chosen", (rows, heads, shape.kept), "int64"))
    if shape.kind is Kind.FOLD:
        regions.append(Region("into", (rows, heads, shape.candidates), "int64"))
    if shape.attended:
        room = (rows, heads, shape.attended, shape.head_dim)
        regions += [
            Region("attended", (rows, heads, shape.attended), "int64"),
            Region("attended_keys", room, shape.dtype),
            Region("attended_values", room, shape.dtype),
            Region("attended_weights", (rows, heads, 1, shape.attended), "float32"),
        ]
    return regions


def pages_read(records: Records, page_size: int) -> int:
    """Pages of a lane that are turned back from records at a time, at most."""
    tokens = CODED_TOKENS if isinstance(records, CodedFormat) else READ_TOKENS
    return max(1, tokens // page_size)


def _read(shape: StepShape) -> list[Region]:
    rows, heads, lanes = shape.rows, shape.heads, shape.rows * shape.heads
    regions: list[Region] = []
    if not shape.gathers or not shape.cached:
        return regions
    if shape.reads is not None:
        pages = min(shape.table, pages_read(shape.reads, shape.page_size))
        tokens = pages * shape.page_size
        words = shape.reads.words(shape.head_dim)
        regions.append(Region("records", (lanes, tokens, words), "int32"))
        if isinstance(shape.reads, CodedFormat):
            regions += lanes_scratch(lanes * min(tokens, shape.cached), shape.head_dim)
        else:
            regions += dequantize_scratch(lanes, tokens, shape.head_dim, shape.dtype, shape.reads)
    if shape.weighted or shape.gathers_planes:
        room = (rows, heads, shape.table, shape.page_size, len(shape.planes))
        regions.append(Region("page_planes", room, "float16"))
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
    if shape.planes:
        regions += [
            Region("plane_pages", (rows, shape.written), "int64"),
            Region("kept_planes", (rows, shape.written, len(shape.planes)), "float16"),
        ]
    if shape.kind is Kind.SHIFT:
        moved, added = lanes * shape.moved, lanes * (shape.sources - shape.moved)
        regions += [
            Region("old_slots", (moved,), "int64"),
            Region("moved", (2, moved, width), stored),
        ]
        if shape.planes:
            regions.append(Region("moved_planes", (moved, len(shape.planes)), "float16"))
        if shape.writes or not shape.fresh_is_slice:
            regions.append(Region("staged", (added, shape.head_dim), shape.dtype))
        if shape.writes:
            regions.append(Region("encoded", (added, width), "int32"))
            regions += _encode(shape, added)
        return regions
    if not shape.is_even:
        regions.append(Region("spread", (rows, shape.heads, shape.kept), "int64"))
    regions.append(Region("torch: starts", (lanes,), "int64", by_torch=True))
    regions += _fold(shape) if shape.kind is Kind.FOLD else _keep(shape)
    if shape.writes:
        regions.append(Region("encoded", (written, width), "int32"))
        regions += _encode(shape, written)
    return regions


def _encode(shape: StepShape, tokens: int) -> list[Region]:
    """Of steps that write records of so many tokens over all lanes, beside the records."""
    assert shape.writes is not None
    if isinstance(shape.writes, CodedFormat):
        return coding_scratch(shape.rows * shape.heads, tokens, shape.head_dim)
    return quantize_scratch(tokens, shape.head_dim, shape.writes)


def _keep(shape: StepShape) -> list[Region]:
    """Of steps that write candidates as they are."""
    written = shape.rows * shape.written
    regions = [
        Region("at", (shape.rows, shape.written), "int64"),
        Region("staged", (written, shape.head_dim), shape.dtype),
    ]
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
    tokens = min(BLOCK, shape.candidates)
    regions = [
        Region("sums", (lanes, shape.kept, shape.head_dim), "float32"),
        Region("counts", (lanes, shape.kept), "float32"),
        Region("log_counts", (lanes, shape.kept), "float32"),
        Region("shares", (lanes, shape.candidates), "float32"),
        Region("targets", (lanes, shape.candidates), "int64"),
        Region("torch: dropped", (lanes, shape.candidates), "bool", by_torch=True),
    ]
    if not shape.weighs_in_place:
        regions.append(Region("block", (lanes, tokens, shape.head_dim), "float32"))
        regions.append(Region("torch: targets", (lanes, 2 * tokens), "int64", by_torch=True))
    if not shape.is_even:
        regions.append(Region("packed", (written, shape.head_dim), "float32"))
        regions.append(Region("torch: packed", (shape.rows, shape.written), "float32", True))
    if shape.writes is None and shape.dtype != "float32":
        regions.append(Region("staged", (written, shape.head_dim), shape.dtype))
    if set(shape.planes) - {"log_weight"}:
        regions.append(Region("weighed", (lanes, shape.candidates), "float32"))
        regions.append(Region("plane_sums", (lanes, shape.kept), "float32"))
    return regions + (_refit(shape) if shape.fitted else [])


def _refit(shape: StepShape) -> list[Region]:
    """Of folds that are fitted to queries (step.refit)."""
    lanes, written = shape.rows * shape.heads, shape.rows * shape.written
    queries, kept, dim = shape.fitted, shape.kept, shape.head_dim
    least = min(queries, kept)
    regions = [
        Region("masses", (lanes, kept), "float32"),
        Region("torch: gone", (lanes, shape.candidates), "bool", by_torch=True),
        Region("kept_keys", (lanes, kept, dim), "float32"),
        Region("logits_kept", (lanes, queries, kept), "float32"),
        Region("attention_kept", (lanes, queries, kept), "float32"),
        Region("moved", (lanes, kept), "float32"),
        Region("got", (lanes, kept), "float32"),
        Region("factor", (lanes, kept), "float32"),
        Region("gram", (lanes, least, least), "float32"),
        Region("triangle", (lanes, least, least), "float32"),
        Region("status", (lanes,), "int32"),
        Region("gap", (lanes, queries, dim), "float32"),
        Region("solved", (lanes, least, dim), "float32"),
    ]
    if kept < queries:
        regions.append(Region("right", (lanes, kept, dim), "float32"))
    if shape.writes is not None or shape.dtype != "float32":
        regions.append(Region("read_back", (written, dim), "float32"))
    if shape.writes is not None:
        if isinstance(shape.writes, RecordFormat):  # a coding turns back in what it codes in
            regions += dequantize_scratch(1, written, dim, "float32", shape.writes)
        if shape.dtype != "float32":
            regions.append(Region("rounded", (written, dim), shape.dtype))
    return regions


def output_bytes(shape: StepShape, all_rows: int) -> int:
    """What attention returns: all rows' output where they come in several chunks."""
    if all_rows == shape.rows:
        return 0
    numbers = math.prod((all_rows, shape.fresh, shape.heads, shape.head_dim))
    return numbers * DTYPE_BYTES[shape.dtype]
