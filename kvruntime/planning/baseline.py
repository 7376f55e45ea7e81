"""What the model's own cache takes, for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from policies import DTYPE_BYTES, CacheGeometry, ScaleSchedule


def history_bytes(geometry: CacheGeometry, schedule: ScaleSchedule, rows: int) -> int:
    """The model's own cache before its last scale."""
    lanes = rows * geometry.layers * geometry.heads
    return lanes * schedule.history * geometry.token_bytes


def own_curve(
    geometry: CacheGeometry, schedule: ScaleSchedule, rows_by_scale: Sequence[int]
) -> NDArray[np.int64]:
    """The same step by step: most bytes while each layer's tensors are concatenated, [scales,
    layers]. Its maximum is ``with_cat_copy_bytes``.
    """
    key, value = _token_bytes(geometry)
    fresh, seen = np.array(schedule.tokens)[:, None], np.array(schedule.seen)[:, None]
    before, layers = seen - fresh, np.arange(1, geometry.layers + 1)
    held = (key + value) * (seen * layers + before * (geometry.layers - layers))
    copy = np.maximum(value * before, key * before - value * fresh)
    curve: NDArray[np.int64] = np.array(rows_by_scale)[:, None] * (held + copy)
    return curve


def _token_bytes(geometry: CacheGeometry) -> tuple[int, int]:
    """Bytes of a token's K and of its V in one layer."""
    numbers = geometry.heads * geometry.head_dim
    return numbers * DTYPE_BYTES[geometry.key_dtype], numbers * DTYPE_BYTES[geometry.value_dtype]


def baseline_bytes(
    geometry: CacheGeometry, schedule: ScaleSchedule, rows_by_scale: Sequence[int]
) -> dict[str, int]:
    """The model's own cache at its largest: before the last scale, with it, and while torch.cat
    copies the last layer.

    K is concatenated before V, and each old tensor goes when its new one is there.
    """
    key, value = _token_bytes(geometry)
    both = geometry.layers * (key + value)
    held, copied = [0], [0]
    for rows, fresh, seen in zip(rows_by_scale, schedule.tokens, schedule.seen, strict=True):
        before = seen - fresh
        held.append(rows * both * seen)
        copied.append(held[-1] + rows * max(value * before, key * before - value * fresh))
    return {
        "history_bytes": max(held[:-1]),
        "all_scales_bytes": max(held),
        "with_cat_copy_bytes": max(copied),
    }
