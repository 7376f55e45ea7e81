"""What the model's own cache takes, for comparison."""

from __future__ import annotations

from collections.abc import Sequence

from policies import DTYPE_BYTES, CacheGeometry, ScaleSchedule


def history_bytes(geometry: CacheGeometry, schedule: ScaleSchedule, rows: int) -> int:
    """The model's own cache before its last scale."""
    lanes = rows * geometry.layers * geometry.heads
    return lanes * schedule.history * geometry.token_bytes


def baseline_bytes(
    geometry: CacheGeometry, schedule: ScaleSchedule, rows_by_scale: Sequence[int]
) -> dict[str, int]:
    """The model's own cache at its largest: before the last scale, with it, and while torch.cat
    copies the last layer.

    K is concatenated before V, and each old tensor goes when its new one is there.
    """
    numbers = geometry.heads * geometry.head_dim  # of one token, one layer
    key = numbers * DTYPE_BYTES[geometry.key_dtype]
    value = numbers * DTYPE_BYTES[geometry.value_dtype]
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
