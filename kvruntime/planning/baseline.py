"""What the model's own cache takes, for comparison."""

from __future__ import annotations

from policies import DTYPE_BYTES, CacheGeometry, ScaleSchedule


def history_bytes(geometry: CacheGeometry, schedule: ScaleSchedule, rows: int) -> int:
    """The model's own cache before its last scale."""
    lanes = rows * geometry.layers * geometry.heads
    return lanes * schedule.history * geometry.token_bytes


def baseline_bytes(geometry: CacheGeometry, schedule: ScaleSchedule, rows: int) -> dict[str, int]:
    """The model's own cache: before the last scale, with it, and while torch.cat copies the last
    layer.

    K is concatenated before V, and each old tensor goes when its new one is there.
    """
    numbers = rows * geometry.heads * geometry.head_dim  # of one token, one layer
    key = numbers * DTYPE_BYTES[geometry.key_dtype]
    value = numbers * DTYPE_BYTES[geometry.value_dtype]
    both = geometry.layers * (key + value)
    fresh = schedule.tokens[-1]
    copying = max(value * schedule.history, key * schedule.history - value * fresh)
    return {
        "history_bytes": both * schedule.history,
        "all_scales_bytes": both * schedule.total,
        "with_cat_copy_bytes": both * schedule.total + copying,
    }
