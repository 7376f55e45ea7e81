"""What a policy is: how many tokens each lane holds after each scale, which, and what becomes of
the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

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
    """

    tokens: Lengths
    quantised: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Needs:
    """What ``select`` looks at. A policy that needs nothing chooses by token numbers alone.

    queries: how many queries of the current scale it scores with.
    weights: it folds tokens into others, so that stored tokens have log weights.
    """

    queries: int = 0
    weights: bool = False

    @property
    def content(self) -> bool:
        """Whether the choice depends on what the tokens hold."""
        return self.queries > 0


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Sizes of a step, for the scratch that a policy declares.

    cached, fresh: tokens of the longest lane before the step, and of the scale. kept: tokens of
    the longest lane after it. dtype: of keys and values.
    """

    rows: int
    heads: int
    head_dim: int
    dtype: str
    cached: int
    fresh: int
    kept: int

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
    scratch: the tensors that the policy declared, by name; their content is whatever it was.
    """

    schedule: ScaleSchedule
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

    @property
    def cached(self) -> int:
        """Tokens of the longest lane before the step."""
        return self.keys.shape[2] - self.queries.shape[1]


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
    values, log_weights: [rows, heads, m, head_dim] and float32 [rows, heads, m] to store in place
        of those, for a policy that fits them itself; go with ``into``.
    """

    keep: Tensor
    into: Tensor | None = None
    values: Tensor | None = None
    log_weights: Tensor | None = None


NO_NEEDS = Needs()


class Policy(Protocol):
    """A pure object: nothing of a generation stays in it."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    def allocate(self, problem: Problem) -> Allocation:
        """Tokens of every lane. Raises ValueError for a budget that cannot be met."""
        ...

    def scratch(self, sizes: StepSizes) -> list[Region]:
        """What ``select`` works in, so that the plan counts it; [] for token numbers alone."""
        ...

    def select(self, candidates: Candidates) -> Selection:
        """Which candidates each head keeps, as many as ``candidates.keep`` says.

        Called only where something is dropped. Without content the choice depends on ``scale``,
        ``keep`` and ``positions`` alone: it is made once for all layers and generations that are
        alike in these, for one head where all heads are.
        """
        ...
