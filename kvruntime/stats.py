"""What a generation tells about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
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

    policy, budget_tokens: what decides, and tokens that a lane keeps at most. profile: where roles
        of layers come from. page_size: tokens in a page. rows: those that are left.
    live_pages: its own now, those included that a fork shares. planned_pages == peak_pages at the
        end; where rows went that were not planned to, the former counts them until they did.
    token_bytes <= page_bytes: what the policy keeps after a scale, and the pages that hold it at
        the peak, planes (plane_bytes: log weights and others) included; where rows share pages the
        former counts each row's. workspace_bytes: what a step works in at most.
    baseline_bytes: the model's own cache, all scales, without the copy that torch.cat makes;
        history_bytes: the same before the last scale.
    backend, backend_reason: who computes attention, and why. page_steps, gather_steps: layers whose
        attention read the pages themselves, and a gathered copy, one for each chunk of rows.
    kv_dtype, kv_groups: of the pages from scale kv_start on; None if all are exact.
    timeline: live pages and kept tokens after each scale.
    events: pages live after each step, layer by layer within a scale; at the end one of each step.
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
    events: tuple[int, ...]


@dataclass(slots=True)
class Tally:
    """What a generation counts while it draws. live_pages: between steps."""

    page_steps: int = 0
    gather_steps: int = 0
    live_pages: int = 0
    peak_pages: int = 0
    timeline: tuple[ScaleRecord, ...] = ()
    events: list[int] = field(default_factory=list)

    def step(self, attended: bool, chunks: int, from_pages: int) -> None:
        """A layer was served in so many chunks, of which some read the pages themselves."""
        if attended:
            self.page_steps += from_pages
            self.gather_steps += chunks - from_pages

    def pages(self, before: int, most: int, after: int) -> None:
        """What a layer's table held before its step, at most in it, and after it."""
        self.peak_pages = max(self.peak_pages, self.live_pages + most - before)
        self.live_pages += after - before
        self.events.append(self.live_pages)

    def scale(self, scale: int, kept_tokens: int) -> None:
        """All layers of a scale are served."""
        self.timeline += (ScaleRecord(scale, self.live_pages, kept_tokens),)

    def forked(self) -> Tally:
        """For a fork, which has served nothing yet."""
        return Tally(0, 0, self.live_pages, self.live_pages, self.timeline, list(self.events))


def stats_of(plan: Plan, facts: dict[str, Any], rows: int, live_pages: int, tally: Tally) -> Stats:
    """Of a generation with this plan. facts: what all of its cache's have in common."""
    baseline = plan.baseline_bytes()
    return Stats(
        **facts,
        **plan.page_format,
        rows=rows,
        live_pages=live_pages,
        page_steps=tally.page_steps,
        gather_steps=tally.gather_steps,
        peak_pages=tally.peak_pages,
        timeline=tally.timeline,
        events=tuple(tally.events),
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
        events=(),
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
