"""The problem as a policy sees it: how many tokens each scale has, and what a token costs."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ScaleSchedule:
    """The scales of a generation, coarse to fine. sizes: (h, w), or (t, h, w) for video, in tokens.
    Raises ValueError for anything else.

    Tokens are numbered through the whole generation, scale by scale, row by row.
    """

    sizes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("a schedule needs at least one scale")
        for size in self.sizes:
            if (
                not isinstance(size, tuple)
                or len(size) not in (2, 3)
                or not all(isinstance(n, int) and n > 0 for n in size)
            ):
                raise ValueError(f"a scale is a tuple of 2 or 3 positive integers, got {size!r}")

    @classmethod
    def of(cls, sizes: Iterable[Any]) -> ScaleSchedule:
        """From sizes that are sides of square scales, (h, w) pairs or (t, h, w) triples, or a
        mixture. Raises ValueError for others.
        """
        plain = []
        for size in sizes:
            try:
                numbers = (size, size) if isinstance(size, Integral) else tuple(size)
                plain.append(tuple(operator.index(n) for n in numbers))
            except TypeError:
                message = f"a scale is a side, (h, w) or (t, h, w), all integers, got {size!r}"
                raise ValueError(message) from None
        return cls(tuple(plain))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(math.prod(size) for size in self.sizes)

    @property
    def seen(self) -> tuple[int, ...]:
        """Tokens up to and including each scale."""
        return tuple(accumulate(self.tokens))

    @property
    def total(self) -> int:
        return self.seen[-1]

    @property
    def history(self) -> int:
        """Tokens before the last scale: all that a later scale ever reads."""
        return self.total - self.tokens[-1]

    def first(self, scales: int) -> int:
        """Tokens of the first so many scales, the last one of all aside: nobody reads its own."""
        return sum(self.tokens[:-1][:scales])

    def span(self, scale: int) -> tuple[int, int]:
        """First token of ``scale`` and the first one after it."""
        end = self.seen[scale]
        return end - self.tokens[scale], end

    def resolve(self, budget: float) -> int:
        """A budget in tokens: a float is a fraction of the history, an int a token count.

        More tokens than there are means all of them. Rounds down, to none where the fraction is so
        small: a policy that cannot work with that says so.
        """
        if isinstance(budget, int):
            return min(budget, self.total)
        return int(budget * self.history + 1e-9)


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """Shape and number formats of a model's K and V: so many layers of key-value heads, each of
    head_dim numbers. key_dtype, value_dtype: float32, bfloat16 or float16. Raises ValueError for
    others.
    """

    layers: int
    heads: int
    head_dim: int
    key_dtype: str = "bfloat16"
    value_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for dtype in (self.key_dtype, self.value_dtype):
            if dtype not in DTYPE_BYTES:
                raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one lane, K and V."""
        return self.head_dim * (DTYPE_BYTES[self.key_dtype] + DTYPE_BYTES[self.value_dtype])


Lengths = NDArray[np.int64]
