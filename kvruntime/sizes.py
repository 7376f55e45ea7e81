"""Sizes as people write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

LARGEST = 2**30  # rows, or tokens in a page: beyond it is a slip of the hand
_UNITS = {
    "": 1,
    "B": 1,
    **{unit: 1024 ** (i + 1) for i, unit in enumerate(("KIB", "MIB", "GIB", "TIB"))},
    **{unit: 1000 ** (i + 1) for i, unit in enumerate(("KB", "MB", "GB", "TB"))},
}
MOST_BYTES = 2**60


def parse_bytes(text: str, name: str = "memory") -> int:
    """Bytes of 80GiB, 512 MiB, 2GB or a plain number. Raises ValueError that names ``name``."""
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{name} must be a size such as 80GiB or 512MiB, got {text[:40]!r}")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if not 0 < size <= MOST_BYTES:
        raise ValueError(f"{name} must be positive and at most {MOST_BYTES} bytes, got {text!r}")
    return size


def in_units(num_bytes: float) -> str:
    """Bytes for people: 1.61 GiB, 12 MiB, 900 B."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            count = num_bytes / size
            return f"{count:,.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def parse_share(text: str) -> float | None:
    """0.8 of "80%"; None for a text that is no percentage. Raises ValueError out of (0, 100]."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*%\s*", text)
    if not match:
        return None
    share = float(match[1]) / 100
    if not 0.0 < share <= 1.0:
        raise ValueError(f"a percentage must be in (0, 100], got {text!r}")
    return share


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a positive integer up to LARGEST."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
        raise ValueError(f"{name} must be a positive integer up to 2^30, got {value!r}")


def rows_by_scale(
    scales: int, rows: int, rows_from: Mapping[int, int] | None = None
) -> tuple[int, ...]:
    """Rows of each scale. rows_from: {scale: rows from there on}, fewer than before or a multiple;
    scales that never come may be named. Raises ValueError for other rows.
    """
    check_positive("rows", rows)
    planned = [rows] * scales
    changes = {} if rows_from is None else rows_from
    if not isinstance(changes, Mapping) or not all(isinstance(scale, int) for scale in changes):
        raise ValueError(f"rows_from is {{scale: rows from there on}}, got {rows_from!r}")
    for scale, left in sorted(changes.items()):
        if isinstance(scale, bool) or scale < 0:
            raise ValueError(f"rows_from is {{scale: rows from there on}}, got scale {scale!r}")
        check_positive(f"rows from scale {scale} on", left)
        if scale < scales and left > planned[scale] and (left % planned[scale] or not scale):
            raise ValueError(
                "rows may go, or each may be repeated as often as the others, not at scale 0: "
                f"{planned[scale]} before scale {scale}, {left} from there on"
            )
        planned[scale:] = [left] * (scales - scale) if scale < scales else []
    return tuple(planned)


def fewer_rows(planned: Sequence[int], rows: int, scale: int) -> tuple[int, ...]:
    """Rows of each scale if only so many are left from that one on; where rows are repeated, those
    that are left are.
    """
    left = list(planned[:scale])
    for at in range(scale, len(planned)):
        before = planned[at - 1] if at > scale else planned[at]
        copies = max(1, planned[at] // before)
        left.append(min(planned[at], copies * (left[-1] if at > scale else rows)))
    return tuple(left)


def in_proportion(planned: Sequence[int], rows: int) -> tuple[int, ...]:
    """Rows of each scale if there are so many at first: as large a share goes, rounded in favour of
    those that stay, and each is repeated as often.
    """
    found = [rows]
    for before, after in pairwise(planned):
        found.append(-(-found[-1] * after // before))
    return tuple(found)


def largest(fits: Callable[[int], bool], least: int, beyond: int) -> int:
    """The largest number in least..beyond - 1 that fits, by bisection; ``least`` is not asked."""
    while beyond - least > 1:
        middle = (least + beyond) // 2
        if fits(middle):
            least = middle
        else:
            beyond = middle
    return least
