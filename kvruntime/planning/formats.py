"""What pages hold from the first scale to the last: exact tokens, then ever coarser records."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvruntime.options import CacheOptions
from kvruntime.storage.layout import (
    MOST_QUANTISED_TOKENS,
    PAGED_TOKENS,
    CodedFormat,
    PageFormat,
    Records,
    fitting_page_size,
)
from policies import Allocation, CacheGeometry


def formats_of(
    geometry: CacheGeometry,
    records: Records | None,
    page_size: int,
    exact: int,
    page_bytes: int,
) -> tuple[PageFormat, ...]:
    """Exact tokens, then ever coarser records as far as more of them fit a page, the last ones
    those that are asked for.
    """
    if records is None:
        return (PageFormat(None, page_size),)
    formats, half = [PageFormat(None, exact)], page_bytes // 2
    for between in records.finer:
        each = between.num_bytes(geometry.head_dim)
        if each <= half:
            multiple = 1 if isinstance(between, CodedFormat) else PAGED_TOKENS
            size = min(fitting_page_size(half, each, 4, multiple), MOST_QUANTISED_TOKENS)
            if formats[-1].page_size < size < page_size:
                formats.append(PageFormat(between, size))
    return (*formats, PageFormat(records, page_size))


def stages_of(
    allocation: Allocation, options: CacheOptions, formats: tuple[PageFormat, ...]
) -> NDArray[np.int64]:
    """Which format a layer has after each scale, int64 [scales, layers].

    From kv_start on the last one, if that is given; else as the policy says; else after each scale
    the first one in which all that is kept takes no more pages than the last one ever does: until
    then a coarser one gains nothing.
    """
    scales, layers = allocation.tokens.shape[:2]
    start, last = options.kv_start, len(formats) - 1
    if start is not None and not 0 <= start < scales:
        raise ValueError(f"kv_start must be a scale in 0..{scales - 1}, got {start}")
    if start is not None:
        return np.repeat(np.where(np.arange(scales) < start, 0, last)[:, None], layers, axis=1)
    if last and allocation.quantised is not None:
        return np.where(allocation.quantised, last, 0)
    pages = np.array(
        [(-(-allocation.tokens // each.page_size)).sum(axis=(1, 2)) for each in formats]
    )
    fits = pages <= pages[-1].max()
    stage = np.maximum.accumulate(np.argmax(fits, axis=0))
    return np.repeat(stage[:, None], layers, axis=1)


def rounding(formats: tuple[PageFormat, ...], stage: NDArray[np.int64]) -> float:
    """What pages round, summed over scales and layers: a bit less is four times as much."""
    bits = [each.records.bits if each.records else math.inf for each in formats]
    return float((4.0 ** -np.array(bits))[stage].sum())
