"""What a generation tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvruntime.planning.demand import Plan


@dataclass(frozen=True, slots=True)
class ScaleRecord:
    """State after all layers of a scale."""

    scale: int
    live_pages: int
    kept_tokens: int  # of one row, over all layers and heads


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of one generation. Bytes are of the whole generation.

    live_pages: its own now, shared ones included. token_bytes <= page_bytes: what the policy keeps
        after a scale, and the pages that hold it at the peak, planes (plane_bytes: log
        weights and others) included.
    planned_pages == peak_pages at the end; where rows went that were not planned to, the former
        counts them until they did. rows: those that are left.
    baseline_bytes: the model's own cache, all scales, without the copy that torch.cat makes;
        history_bytes: the same before the last scale.
    backend_reason: why it is this back end. page_steps, gather_steps: layers whose attention read
        the pages themselves, and a gathered copy, one for each chunk of rows.
    kv_dtype, kv_groups: of the pages from scale kv_start on; None if all are exact.
    """

    policy: str
    profile: str
    backend: str
    backend_reason: str
    page_steps: int
    gather_steps: int
    kv_dtype: str | None
    kv_groups: int | None
    kv_start: int | None
    page_size: int
    rows: int
    budget_tokens: int
    planned_pages: int
    peak_pages: int
    live_pages: int
    token_bytes: int
    page_bytes: int
    plane_bytes: int
    workspace_bytes: int
    baseline_bytes: int
    history_bytes: int
    timeline: tuple[ScaleRecord, ...]


def stats_of(plan: Plan, facts: dict[str, Any], **counts: Any) -> Stats:
    """Of a generation with this plan. facts: what all of its cache's have in common; counts: what
    it has done.
    """
    baseline = plan.baseline_bytes()
    return Stats(
        **facts,
        **plan.page_format,
        **counts,
        page_size=plan.page_size,
        budget_tokens=plan.budget_tokens,
        planned_pages=plan.peak_pages,
        token_bytes=plan.token_bytes,
        page_bytes=plan.page_bytes,
        plane_bytes=plan.plane_bytes,
        workspace_bytes=plan.workspace_bytes,
        baseline_bytes=baseline["all_scales_bytes"],
        history_bytes=baseline["history_bytes"],
    )


def nothing_drawn(plan: Plan, facts: dict[str, Any]) -> Stats:
    """Before the first generation: what is known already, and zeros."""
    zeros: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
    return Stats(
        **facts,
        **plan.page_format,
        **zeros,
        page_size=plan.page_size,
        budget_tokens=plan.budget_tokens,
        timeline=(),
    )


_COUNTS = (
    "page_steps",
    "gather_steps",
    "rows",
    "planned_pages",
    "peak_pages",
    "live_pages",
    "token_bytes",
    "page_bytes",
    "plane_bytes",
    "workspace_bytes",
    "baseline_bytes",
    "history_bytes",
)
