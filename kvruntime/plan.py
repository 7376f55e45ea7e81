"""What a generation will need, to the page, before its first step; and how many rows fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvruntime.catalogue import Model, find_model
from kvruntime.errors import WillNeverFit
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


def default_page_size(schedule: ScaleSchedule) -> int:
    """16 tokens where the whole history is short (64-token pages waste half of it), else 64."""
    return 16 if schedule.history < 1024 else 64


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Exact demand of one generation.

    lengths: tokens of each lane after (scale, layer), int64 [scales, layers, heads].
    row_pages: pages one row holds after each (scale, layer) event, int64 [scales, layers].
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
    row_pages: NDArray[np.int64]

    @property
    def peak_pages(self) -> int:
        return self.rows * int(self.row_pages.max(initial=0))

    @property
    def page_bytes(self) -> int:
        """Bytes of the pool: every page that is live at the peak."""
        return self.peak_pages * self.page_size * self.geometry.token_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of the tokens kept after a scale, at the worst scale: what the papers count."""
        kept = int(self.lengths.sum(axis=(1, 2)).max())
        return self.rows * kept * self.geometry.token_bytes

    @property
    def peak_token_bytes(self) -> int:
        """The same at the worst (scale, layer): drafters may grow before refiners have shrunk."""
        per_layer = self.lengths.sum(axis=2)
        return self.rows * int(running_total(per_layer).max()) * self.geometry.token_bytes

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

    def _before(self) -> Lengths:
        return np.concatenate([np.zeros_like(self.lengths[:1]), self.lengths[:-1]])

    def _gathered(self) -> NDArray[np.int64]:
        """Token places a lane needs in the workspace at each (scale, layer)."""
        longest = self._before().max(axis=2)
        whole_pages = -(-longest // self.page_size) * self.page_size
        fresh = np.array(self.schedule.tokens)[:, None]
        places: NDArray[np.int64] = np.maximum(whole_pages, longest + fresh)
        return places

    def _row_bytes(self) -> tuple[int, int]:
        """Bytes of one row: the gather workspace, and the scratch of the worst (scale, layer)."""
        geometry = self.geometry
        gather = self.workspace_row_tokens * geometry.heads * geometry.token_bytes
        number = DTYPE_BYTES[geometry.key_dtype]
        before, after = self._before().max(axis=2), self.lengths.max(axis=2)
        fresh = np.array(self.schedule.tokens)[:, None]
        candidates = before + fresh
        page_ids = -(-before // self.page_size) * _ID_BYTES
        drops = after < candidates
        # tokens written: all of them, or at most the fresh ones and those beyond the new end
        moved = np.minimum(after, fresh + np.maximum(0, before - after))
        if self.policy.num_queries:
            moved = np.where(drops, after, fresh)
        write = moved * _ID_BYTES + np.where(drops, moved * geometry.token_bytes, 0)
        scratch = np.maximum(page_ids, write)
        if self.policy.num_queries:
            queries = self.policy.num_queries
            score = candidates * (queries * (4 if number == 4 else number + 4) + 4)
            score = score + 2 * queries * geometry.head_dim * number
            choose = candidates * 4 + after * (4 + 3 * _ID_BYTES)
            move = write + after * _ID_BYTES
            worst = np.maximum(np.maximum(score, choose), move)
            scratch = np.maximum(scratch, np.where(drops & (after > 0), worst, 0))
        return gather, geometry.heads * int(scratch.max())


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
) -> Plan:
    """The plan of one generation of ``rows`` rows. O(scales x layers x heads); allocates no tensor.

    budget: a float is a fraction of the history, an int a token count. Raises ValueError for bad
    arguments.
    """
    page_size = default_page_size(schedule) if page_size is None else page_size
    for name, value in (("rows", rows), ("page_size", page_size)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST:
            raise ValueError(f"{name} must be a positive integer up to 2^30, got {value!r}")
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
    pages = (-(-lengths // page_size)).sum(axis=2)
    return Plan(
        geometry,
        schedule,
        policy,
        tokens,
        page_size,
        rows,
        workspace_limit,
        lengths,
        running_total(pages),
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
    memory: int | None = None,
    reserved: int = 0,
) -> Plan:
    """What ``batch`` pictures of a catalogue model need. Needs no weights and no GPU.

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
    result = plan_generation(known.geometry, known.schedule, chosen, budget, rows, page_size)
    if memory is not None:
        result.require(memory, reserved)
    return result
