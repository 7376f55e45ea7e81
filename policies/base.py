"""What a policy is: how many tokens each lane keeps after each scale, and which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from policies.schedule import CacheGeometry, Lengths, ScaleSchedule


@dataclass(frozen=True, slots=True)
class Step:
    """One layer at one scale, after its attention, as ``select`` sees it.

    Candidates are the cached tokens followed by all tokens of this scale.
    """

    schedule: ScaleSchedule
    scale: int
    layer: int
    keep: Lengths  # [heads] tokens to keep
    tokens: NDArray[np.int64]  # [candidates] token numbers; empty for policies with queries
    queries: Tensor  # [rows, tokens of this scale, heads, head_dim]
    keys: Tensor  # [rows, heads, candidates, head_dim]
    bias: Tensor | None  # [heads, 1, candidates], -inf where a shorter head holds no token
    softmax_scale: float


class Policy(Protocol):
    """A pure object: nothing of a generation stays in it."""

    @property
    def name(self) -> str: ...

    @property
    def num_queries(self) -> int:
        """Queries of the current scale that ``select`` scores with; 0 when it looks at token
        numbers only.
        """
        ...

    def lengths(self, schedule: ScaleSchedule, geometry: CacheGeometry, budget: int) -> Lengths:
        """Tokens each lane holds after each scale, int64 [scales, layers, heads]; the last scale's
        are 0.

        No lane holds more than it held plus the tokens of the scale. Raises ValueError for a budget
        that cannot be met.
        """
        ...

    def select(self, step: Step) -> NDArray[np.int64] | Tensor:
        """Places to keep among the candidates, as many as ``lengths`` promised.

        Without queries: an array [keep], the same for all rows and heads. With queries: a tensor
        [rows, heads, keep] of distinct places; a head that keeps fewer uses its first ones.
        """
        ...


def uniform(schedule: ScaleSchedule, geometry: CacheGeometry, tokens: NDArray[np.int64]) -> Lengths:
    """Lengths [scales, layers, heads] from [scales, layers] tokens: the same for all heads, last
    scale 0.
    """
    lengths = np.repeat(tokens[:, :, None], geometry.heads, axis=2).astype(np.int64)
    lengths[-1] = 0
    return lengths


def check_lengths(lengths: Lengths, schedule: ScaleSchedule, geometry: CacheGeometry) -> None:
    """Raise ValueError unless ``lengths`` keeps the promises of Policy.lengths."""
    shape = (len(schedule), geometry.layers, geometry.heads)
    if lengths.shape != shape or lengths.dtype != np.int64:
        raise ValueError(f"lengths must be int64 {shape}, got {lengths.dtype} {lengths.shape}")
    before = np.concatenate([np.zeros_like(lengths[:1]), lengths[:-1]])
    room = before + np.array(schedule.tokens)[:, None, None]
    if (lengths[:-1] <= 0).any() or lengths[-1].any() or (lengths > room).any():
        raise ValueError("a lane keeps no token, more than it has, or some after the last scale")
