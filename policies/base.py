"""What a policy is: how many tokens each lane holds after each scale, which, and what becomes of
the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from policies.schedule import CacheGeometry, Lengths, ScaleSchedule
from policies.scratch import Region


@dataclass(frozen=True, slots=True)
class Problem:
    """What ``allocate`` divides: ``budget_tokens`` for each lane on average."""

    geometry: CacheGeometry
    schedule: ScaleSchedule
    budget_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """How much every lane may hold.

    tokens: tokens of a lane after each scale, int64 [scales, layers, heads]; zero is allowed, the
        last scale's are zero. No lane holds more than it held plus the tokens of the scale.
    quantised: whether a layer's tokens are quantised after each scale, bool [scales, layers], if
        the cache is asked for a kv_dtype; once quantised they stay so. None: the planner decides.
    attended: how many of its candidates a lane's queries attend to at each scale, int64 [scales],
        as ``attend_to`` says; all where a lane has no more. None: always all.
    """

    tokens: Lengths
    quantised: NDArray[np.bool_] | None = None
    attended: Lengths | None = None


PLANES = ("log_weight", "score", "scale", "line", "column")
"""Numbers that a stored token may have beside K and V, float16 each.

log_weight: logarithm of how many tokens it stands for, added to its logit. Folding adds them up.
score: whatever a policy adds up from scale to scale; 0 at first.
scale, line, column: where it comes from: the number of its scale, and how far down and to the right
    in the picture, in (0, 1); of a (t, h, w) scale, down its t * h lines. Of a folded one the
    mean, weighted by how many tokens each stands for.
"""
ORIGIN = ("scale", "line", "column")


@dataclass(frozen=True, slots=True)
class Needs:
    """What a policy looks at, and what stored tokens have for it.

    content: its choice depends on what the tokens hold; else on token numbers alone.
    folds: it folds tokens into others.
    planes: of PLANES. With "score" it is asked at every scale but the last, also where nothing is
        dropped.
    refit: how many queries what is folded is fitted to, or as many as the scale has
        (Selection.seen). 0: means as they are.
    by_lane: without content, its choice depends on the layer and the head too.
    """

    content: bool = False
    folds: bool = False
    planes: tuple[str, ...] = ()
    refit: int = 0
    by_lane: bool = False

    def __post_init__(self) -> None:
        unknown = [plane for plane in self.planes if plane not in PLANES]
        if unknown:
            raise ValueError(f"planes are {', '.join(PLANES)}, got {unknown[0]!r}")
        if (self.folds or self.planes) and not self.content:
            raise ValueError("a policy that folds, or has planes, looks at the content")
        if self.refit and not self.weighted:
            raise ValueError("refit fits log weights: it goes with folds and the plane log_weight")

    @property
    def weighted(self) -> bool:
        """Whether stored tokens have log weights."""
        return "log_weight" in self.planes

    @property
    def every_scale(self) -> bool:
        """Whether it is asked also where nothing is dropped."""
        return "score" in self.planes


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Sizes of a step, for the scratch that a policy declares.

    cached, fresh: tokens of the longest lane before the step, and of the scale. kept: tokens of
    the longest lane after it. dtype: of keys and values. attended: candidates that a lane's queries
    attend to; 0: all.
    """

    rows: int
    heads: int
    head_dim: int
    dtype: str
    cached: int
    fresh: int
    kept: int
    attended: int = field(default=0, kw_only=True)

    @property
    def candidates(self) -> int:
        return self.cached + self.fresh


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """One layer at one scale, after its attention: the cached tokens, then all of this scale.

    keep: tokens that each head is to keep, int64 [heads], on the host.
    positions: token numbers, int64 [1, heads, candidates], -1 where a shorter head holds no token.
        Empty for policies that look at the content, which get the rest:
    queries: [rows, fresh, heads, head_dim]. keys, values: [rows, heads, candidates, head_dim].
    log_weights: float32 [rows or 1, heads, 1, candidates], added to the logits: the logarithm of
        how many tokens each one stands for, -inf where a shorter head holds none; None: all zero.
    planes: what the policy's planes hold, by name, float16 [rows, heads, candidates].
    scratch: the tensors that the policy declared, by name; their content is whatever it was.
    """

    problem: Problem
    scale: int
    layer: int
    keep: Lengths
    positions: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    log_weights: Tensor | None
    softmax_scale: float
    scratch: Mapping[str, Tensor]
    planes: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def schedule(self) -> ScaleSchedule:
        return self.problem.schedule

    @property
    def cached(self) -> int:
        """Tokens of the longest lane before the step."""
        return self.keys.shape[2] - self.queries.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What n queries see of the candidates: a fold is fitted to it (kvruntime.step.refit).

    queries: float32 [lanes, n, head_dim], times the softmax scale; they need not be queries of this
        scale. normaliser: log-sum-exp of each one's logits, [lanes, n, 1]. outputs: their
        attention, [lanes, n, head_dim]. received: attention that each candidate gets from all of
        them, [lanes, candidates], -1 where there is none.
    """

    queries: Tensor
    normaliser: Tensor
    outputs: Tensor
    received: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What a step keeps, and what it folds into what.

    keep: places among the candidates, int64 [rows, heads, m], m the most that a head keeps; a head
        that keeps fewer uses its first ones. Ascending, distinct, in range: checked. Without
        content [1, heads, m], the same for all rows.
    into: for each candidate the place in ``keep`` that it is folded into, int64 [rows, heads,
        candidates], -1 for none; a kept one names itself. None: what is not kept is dropped.
        The kept token becomes the mean of keys and of values, each weighted by how many tokens it
        stands for, and the weights add up.
    scores: what the plane "score" is to hold for each candidate, floating [rows, heads,
        candidates]; None: what it holds.
    seen: what the fold is fitted to, in regions that stay; goes with ``needs.refit``.
    """

    keep: Tensor
    into: Tensor | None = None
    scores: Tensor | None = None
    seen: Seen | None = None


NO_NEEDS = Needs()
CONTENT = Needs(content=True)
WEIGHTED = Needs(content=True, folds=True, planes=("log_weight",))


class Policy(Protocol):
    """A pure object: nothing of a generation stays in it."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    def allocate(self, problem: Problem) -> Allocation:
        """Tokens of every lane, for this problem: geometry, schedule, budget. Raises ValueError for
        a budget that cannot be met.
        """
        ...

    def scratch(self, sizes: StepSizes) -> list[Region]:
        """What ``select`` works in at a step of these sizes, so that the plan counts it; [] for
        token numbers alone.
        """
        ...

    def select(self, candidates: Candidates) -> Selection:
        """Which candidates each head keeps, as many as ``candidates.keep`` says.

        Called only where something is dropped. Without content the choice depends on ``scale``,
        ``keep`` and ``positions`` alone, unless ``needs.by_lane``: it is made once for all layers
        and generations that are alike in these, for one head where all heads are.
        """
        ...


@runtime_checkable
class Attending(Policy, Protocol):
    """A policy whose queries attend to some of the candidates: its allocation has ``attended``."""

    def attend_to(self, candidates: Candidates) -> Tensor:
        """Which candidates the queries of each head attend to, before anything is dropped: places
        as in Selection.keep, as many as ``candidates.keep`` says. It may use the same scratch as
        ``select``.
        """
        ...
