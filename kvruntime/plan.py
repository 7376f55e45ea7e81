"""What a generation will need, to the page, before its first step; and how many rows fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvruntime.catalogue import Model, find_model
from kvruntime.errors import WillNeverFit
from kvruntime.formats import RowFormat, default_start, exact_page_size, row_format, stored_bytes
from policies import (
    DTYPE_BYTES,
    CacheGeometry,
    Lengths,
    Policy,
    Profile,
    ScaleSchedule,
    check_lengths,
    load_preset,
    load_profile,
    make_policy,
)

WORKSPACE_LIMIT = 256 * 2**20  # bytes; one row may exceed it, more rows may not
MAX_ROWS = 2**20  # no search goes beyond; a schedule of one scale caches nothing
_LARGEST = 2**30  # rows, or tokens in a page: beyond it is a slip of the hand
_ID_BYTES = 8  # torch indexes with int64
_COEFFICIENT_BYTES = 28  # scratch of one group of a row: scale and shift in several formats
SLICE_TOKENS = 1024  # rows of a lane that are quantised, or turned back, at a time


def default_page_size(schedule: ScaleSchedule) -> int:
    """16 tokens where the whole history is short (64-token pages waste half of it), else 64."""
    return 16 if schedule.history < 1024 else 64


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Exact demand of one generation.

    lengths: tokens of each lane after (scale, layer), int64 [scales, layers, heads].
    page_tokens: tokens in a page after each scale, int64 [scales].
    row_pages: pages one row holds after each (scale, layer) event, int64 [scales, layers].
    row: how pages are quantised from ``start_scale`` on; None if they never are, and then
        start_scale is the number of scales.
    Always: peak_pages == rows * max(row_pages); page_bytes == peak_pages * bytes of a page.
    """

    geometry: CacheGeometry
    schedule: ScaleSchedule
    policy: Policy
    budget_tokens: int
    page_size: int
    rows: int
    workspace_limit: int
    lengths: Lengths
    page_tokens: NDArray[np.int64]
    row_pages: NDArray[np.int64]
    row: RowFormat | None
    start_scale: int

    @property
    def exact_page_size(self) -> int:
        """Tokens in a page before start_scale: all pages are equally large in bytes."""
        return exact_page_size(self.geometry, self.row, self.page_size)

    @property
    def page_format(self) -> dict[str, Any]:
        """How pages are quantised, as users ask for it; None throughout if they never are."""
        row = self.row
        return {
            "kv_dtype": row.name if row else None,
            "kv_groups": row.groups if row else None,
            "kv_start": self.start_scale if row else None,
        }

    def longest_table(self, is_quantised: bool) -> int:
        """Most pages of one lane that are ever read in that format, at least 1."""
        pages, _, quantised = self._read()
        return max(1, int(np.where(quantised == is_quantised, pages, 0).max()))

    @property
    def peak_pages(self) -> int:
        return self.rows * int(self.row_pages.max(initial=0))

    @property
    def page_bytes(self) -> int:
        """Bytes of the pool: every page that is live at the peak."""
        return self.peak_pages * self.page_size * stored_bytes(self.geometry, self.row)

    @property
    def token_bytes(self) -> int:
        """Bytes of the tokens kept after a scale, at the worst scale: what the papers count."""
        return self.rows * int((self.lengths.sum(axis=(1, 2)) * self._unit()).max())

    @property
    def peak_token_bytes(self) -> int:
        """The same at the worst (scale, layer): drafters may grow before refiners have shrunk."""
        per_layer = self.lengths.sum(axis=2) * self._unit()[:, None]
        return self.rows * int(running_total(per_layer).max())

    @property
    def chunk_rows(self) -> int:
        """Rows processed at a time: as many as the workspace limit allows, at least one."""
        gather, scratch = self._row_bytes()
        return max(1, min(self.rows, self.workspace_limit // max(1, gather + scratch)))

    @property
    def workspace_row_tokens(self) -> int:
        """Token places of one lane in the gather workspace."""
        return int(self._gathered().max())

    @property
    def workspace_bytes(self) -> int:
        """One layer's gathered keys and values, and the scratch of selection and compaction."""
        gather, scratch = self._row_bytes()
        return self.chunk_rows * (gather + scratch)

    @property
    def total_bytes(self) -> int:
        return self.page_bytes + self.workspace_bytes

    def baseline_bytes(self) -> dict[str, int]:
        """The model's own cache: before the last scale, with it, and while torch.cat copies the
        last layer.

        K is concatenated before V, and each old tensor goes when its new one is there.
        """
        geometry, schedule = self.geometry, self.schedule
        lane_tokens = (
            self.rows * geometry.heads * geometry.head_dim
        )  # numbers of one token, one layer
        key = lane_tokens * DTYPE_BYTES[geometry.key_dtype]
        value = lane_tokens * DTYPE_BYTES[geometry.value_dtype]
        both = geometry.layers * (key + value)
        fresh = schedule.tokens[-1]
        copying = max(value * schedule.history, key * schedule.history - value * fresh)
        return {
            "history_bytes": both * schedule.history,
            "all_scales_bytes": both * schedule.total,
            "with_cat_copy_bytes": both * schedule.total + copying,
        }

    def for_rows(self, rows: int) -> Plan:
        """The same generation with other rows. Raises ValueError for bad ones."""
        _check_positive("rows", rows)
        return replace(self, rows=rows)

    def max_rows(self, memory: int, reserved: int = 0) -> int:
        """The most rows whose pool and workspace fit in ``memory`` bytes less ``reserved``, up to
        MAX_ROWS; 0 if none do.
        """
        fits, too_many = 0, MAX_ROWS + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if replace(self, rows=middle).total_bytes <= memory - reserved:
                fits = middle
            else:
                too_many = middle
        return fits

    def require(self, memory: int, reserved: int = 0) -> None:
        """Raise WillNeverFit, with what to change, unless this plan fits."""
        if self.total_bytes > memory - reserved:
            fits = self.max_rows(memory, reserved)
            advice = (
                f"{fits} of {self.rows} rows would fit"
                if fits
                else "not one row fits: lower the budget or the resolution"
            )
            raise WillNeverFit(self.total_bytes, memory - reserved, advice)

    def _unit(self) -> NDArray[np.int64]:
        """Bytes of one kept token after each scale, [scales]."""
        exact = np.arange(len(self.schedule)) < self.start_scale
        quantised = stored_bytes(self.geometry, self.row)
        return np.where(exact, self.geometry.token_bytes, quantised).astype(np.int64)

    def _before(self) -> Lengths:
        return np.concatenate([np.zeros_like(self.lengths[:1]), self.lengths[:-1]])

    def _read(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Pages that the longest lane is read from, [scales, layers]; how many tokens they hold,
        and whether they are quantised, [scales, 1].
        """
        size = np.concatenate([[1], self.page_tokens[:-1]])[:, None]
        pages: NDArray[np.int64] = -(-self._before().max(axis=2) // size)
        return pages, size, (np.arange(len(self.schedule)) > self.start_scale)[:, None]

    def _gathered(self) -> NDArray[np.int64]:
        """Token places a lane needs in the workspace at each (scale, layer)."""
        longest = self._before().max(axis=2)
        pages, size, quantised = self._read()
        fresh = np.array(self.schedule.tokens)[:, None]
        whole_pages = np.where(quantised, 0, pages * size)  # quantised ones are cut to the tokens
        places: NDArray[np.int64] = np.maximum(whole_pages, longest + fresh)
        return places

    def _row_bytes(self) -> tuple[int, int]:
        """Bytes of one row: the gather workspace, and the scratch of the worst (scale, layer)."""
        geometry = self.geometry
        gather = self.workspace_row_tokens * geometry.token_bytes
        number = DTYPE_BYTES[geometry.key_dtype]
        token = geometry.head_dim * number  # one token of K or of V, which are moved in turn
        before, after = self._before().max(axis=2), self.lengths.max(axis=2)
        fresh = np.array(self.schedule.tokens)[:, None]
        scales = np.arange(len(self.schedule))[:, None]
        candidates = before + fresh
        drops = after < candidates
        # tokens written: at most the fresh ones and those beyond the new end; all of them where
        # heads choose for themselves, and where a lane changes its format
        moved = np.minimum(after, fresh + np.maximum(0, before - after))
        if self.policy.num_queries:
            moved = np.where(drops, after, fresh)
        moved = np.where(scales == self.start_scale, after, moved)
        pages, size, quantised = self._read()
        beyond = np.clip(before - after, 0, after if self.policy.num_queries == 0 else 0)
        uploaded = (pages + 1 + moved + beyond) * _ID_BYTES  # table, length, slots to and from
        read = np.zeros_like(before)
        write = np.where(drops, moved * token, 0)
        if self.row is not None:  # a slice of rows at a time is quantised or read
            row = self.row.row_bytes(geometry.head_dim)
            codes = geometry.head_dim * self.row.bits // 8
            passing = row + 2 * codes + self.row.groups * _COEFFICIENT_BYTES
            values = geometry.head_dim * 4 if geometry.key_dtype == "bfloat16" else 0
            sliced = np.minimum(pages * size, SLICE_TOKENS) * (passing + values)
            read = np.where(quantised, sliced, 0)
            passing += token + 5 * geometry.head_dim
            sliced = np.minimum(moved, SLICE_TOKENS) * passing
            write = np.where(
                scales < self.start_scale, write, moved * (row + 3 * _ID_BYTES) + sliced
            )
        scratch = np.maximum(read, write)
        if self.policy.num_queries:
            queries = self.policy.num_queries
            score = candidates * (queries * (4 if number == 4 else number + 4) + 4)
            score = score + 2 * queries * token
            choose = candidates * 4 + after * (4 + 3 * _ID_BYTES)
            move = write + after * _ID_BYTES
            worst = np.maximum(np.maximum(score, choose), move)
            scratch = np.maximum(scratch, np.where(drops & (after > 0), worst, 0))
        return geometry.heads * gather, geometry.heads * int((scratch + uploaded).max())


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST:
        raise ValueError(f"{name} must be a positive integer up to 2^30, got {value!r}")


def running_total(after: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum over layers after each (scale, layer) event, when layers change one by one. [scales,
    layers].
    """
    changes = np.diff(after, axis=0, prepend=np.zeros_like(after[:1]))
    totals: NDArray[np.int64] = changes.ravel().cumsum().reshape(after.shape)
    return totals


def plan_generation(
    geometry: CacheGeometry,
    schedule: ScaleSchedule,
    policy: Policy,
    budget: float,
    rows: int,
    page_size: int | None = None,
    workspace_limit: int = WORKSPACE_LIMIT,
    row: RowFormat | None = None,
    start_scale: int | None = None,
) -> Plan:
    """The plan of one generation of ``rows`` rows. O(scales x layers x heads); allocates no tensor.

    budget: a float is a fraction of the history, an int a token count. row, start_scale: pages are
    quantised like this from that scale on (default_start). Raises ValueError for bad arguments.
    """
    page_size = default_page_size(schedule) if page_size is None else page_size
    _check_positive("rows", rows)
    _check_positive("page_size", page_size)
    if workspace_limit <= 0:
        raise ValueError(f"workspace_limit must be positive, got {workspace_limit}")
    tokens = schedule.resolve(budget)
    if schedule.history:
        lengths = policy.lengths(schedule, geometry, tokens)
    else:  # a single scale caches nothing, whatever the budget
        lengths = np.zeros((len(schedule), geometry.layers, geometry.heads), dtype=np.int64)
    check_lengths(lengths, schedule, geometry)
    if policy.num_queries == 0 and (lengths != lengths[:, :, :1]).any():
        raise ValueError(f"{policy.name} has no queries, so all heads of a layer must keep as many")
    never = len(schedule)
    if row is not None and page_size > SLICE_TOKENS:
        raise ValueError(f"quantised pages hold at most {SLICE_TOKENS} tokens, got {page_size}")
    if row is None:
        if start_scale is not None:
            raise ValueError(f"kv_start {start_scale} goes with a kv_dtype")
        start_scale = never
    elif start_scale is None:
        start_scale = default_start(lengths, geometry, row)
    elif isinstance(start_scale, bool) or not isinstance(start_scale, int):
        raise ValueError(f"kv_start must be a scale, got {start_scale!r}")
    elif not 0 <= start_scale < never:
        raise ValueError(f"kv_start must be a scale in 0..{never - 1}, got {start_scale}")
    exact = exact_page_size(geometry, row, page_size)
    page_tokens = np.where(np.arange(never) < start_scale, exact, page_size)
    pages = (-(-lengths // page_tokens[:, None, None])).sum(axis=2)
    return Plan(
        geometry,
        schedule,
        policy,
        tokens,
        page_size,
        rows,
        workspace_limit,
        lengths,
        page_tokens,
        running_total(pages),
        row,
        start_scale,
    )


def choose_policy(
    policy: str | Policy, profile: Profile | str | Path | None, layers: int, model: str = ""
) -> Policy:
    """A policy by name, with the profile or else the model's published preset; an object is used as
    it is.
    """
    if not isinstance(policy, str):
        if profile is not None:
            raise ValueError(f"{policy.name} is an object with roles of its own: give no profile")
        return policy
    if isinstance(profile, str | Path):
        profile = load_profile(profile)
    if profile is not None and profile.layers != layers:
        raise ValueError(f"the profile has {profile.layers} layers, the model {layers}")
    return make_policy(policy, profile, load_preset(model))


def profile_note(
    policy: str | Policy, profile: Profile | str | Path | None, schedule: ScaleSchedule
) -> str:
    """Where the roles of a policy come from, for people."""
    if not isinstance(policy, str):
        return "the policy object's own"
    if profile is None:
        return "none: all layers alike"
    if isinstance(profile, str | Path):
        profile = load_profile(profile)
    return "given" if profile.schedule == schedule else "given, made for another schedule"


def plan(
    model: str | Model,
    batch: int = 1,
    policy: str | Policy = "scalekv",
    budget: float = 0.10,
    *,
    profile: Profile | str | Path | None = None,
    page_size: int | None = None,
    kv_dtype: str | None = None,
    kv_groups: int = 1,
    kv_start: int | None = None,
    memory: int | None = None,
    reserved: int = 0,
) -> Plan:
    """What ``batch`` pictures of a catalogue model need. Needs no weights and no GPU.

    kv_dtype, kv_groups, kv_start: quantised pages (docs/embedding.md), None for exact ones.
    memory: bytes that pool and workspace may take beside ``reserved``; raises WillNeverFit if they
    do not fit.
    """
    known = find_model(model) if isinstance(model, str) else model
    if isinstance(batch, bool) or not isinstance(batch, int) or batch <= 0:
        raise ValueError(f"batch must be a positive integer, got {batch!r}")
    if profile is None and isinstance(policy, str):
        profile = known.profile
    chosen = choose_policy(policy, profile, known.geometry.layers, known.name)
    rows = batch * known.rows_per_picture
    row = row_format(kv_dtype, kv_groups)
    result = plan_generation(
        known.geometry,
        known.schedule,
        chosen,
        budget,
        rows,
        page_size,
        row=row,
        start_scale=kv_start,
    )
    if memory is not None:
        result.require(memory, reserved)
    return result
