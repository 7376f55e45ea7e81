"""Sizes of a step, and how it stores what it keeps: all that its tensors depend on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvruntime.storage.layout import Records
from policies import StepSizes


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
    planes: numbers that stored tokens have beside K and V. fitted: queries that a fold is fitted
        to.
    """

    kind: Kind
    table: int
    page_size: int
    reads: Records | None
    new_table: int
    new_page_size: int
    writes: Records | None
    written: int
    sources: int
    moved: int
    fresh_is_slice: bool
    is_ragged: bool
    is_even: bool
    planes: tuple[str, ...]
    fitted: int

    @property
    def weighted(self) -> bool:
        """Whether stored tokens have log weights."""
        return "log_weight" in self.planes

    @property
    def gathers_planes(self) -> bool:
        """Whether planes of all candidates are needed to store what is kept."""
        return bool(self.planes) and (self.needs_candidates or self.attended > 0)

    @property
    def places(self) -> int:
        """Token places of a lane in the workspace: exact pages are copied whole."""
        return max(self.candidates, 0 if self.reads else self.table * self.page_size)

    @property
    def needs_candidates(self) -> bool:
        """Whether cached tokens must be read to store what is kept, attention aside."""
        return self.kind in (Kind.KEEP, Kind.CHOOSE, Kind.FOLD)

    @property
    def asks_policy(self) -> bool:
        """Whether the policy looks at candidates."""
        return self.kind in (Kind.CHOOSE, Kind.FOLD) or self.attended > 0

    @property
    def gathers(self) -> bool:
        """Whether there is anything to gather, if attention does not read pages."""
        return self.cached > 0 or self.needs_candidates or self.attended > 0

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
