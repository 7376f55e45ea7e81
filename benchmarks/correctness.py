"""Right results on every path of every attention back end, over the pages' own formats."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvruntime.attention.base import Backend, Lanes
from kvruntime.attention.sdpa import SDPA
from kvruntime.step.read import gather
from kvruntime.storage.layout import (
    PLANE_BYTES,
    PageLayout,
    RecordFormat,
    exact_page_size,
    stored_bytes,
)
from kvruntime.storage.pages import Pages
from kvruntime.storage.pool import Pool
from kvruntime.storage.records import dequantize, quantize
from policies import TORCH_DTYPES, CacheGeometry

BOUNDS = {"float16": 2e-3, "bfloat16": 1.6e-2}  # exact pages; quantised ones get 5e-3 at least


def backends(device: torch.device, dtype: str, head_dim: int) -> dict[str, Backend]:
    """torch's SDPA, and xformers as it would be chosen."""
    from kvruntime.attention.xformers import XFormers

    return {
        "sdpa": SDPA(),
        "xformers": XFormers(device, TORCH_DTYPES[dtype], head_dim, 10**9),
    }


def filled_pool(
    device: torch.device,
    dtype: str,
    head_dim: int,
    page_size: int,
    records: RecordFormat | None,
    num: int,
    is_exact: bool = False,
) -> Pages:
    """``num`` pages of random tokens in their stored form, with random log weights; exact ones
    among the bytes of quantised pages if ``is_exact``, as a generation has them before its start
    scale.
    """
    geometry = CacheGeometry(1, 1, head_dim, dtype, dtype)
    size = exact_page_size(geometry, records, page_size) if is_exact else page_size
    half = page_size * stored_bytes(geometry, records) // 2
    seen = None if is_exact else records
    pool = Pool(
        num_pages=num,
        page_bytes=2 * half,
        plane_bytes=PLANE_BYTES * max(size, page_size),
        device=device,
    )
    pages = pool.view(PageLayout(size, half, head_dim, dtype, seen, planes=1))
    for part in (pages.keys, pages.values):
        tokens = torch.randn(num * size, head_dim, device=device).to(TORCH_DTYPES[dtype])
        stored = tokens if seen is None else quantize(tokens, seen)
        part.copy_(stored.view(part.shape))
    assert pages.planes is not None
    pages.planes.copy_(torch.rand(pages.planes.shape, device=device) * 3)
    return pages


def gather_pages(pages: Pages, ids: Tensor, keys: Tensor, values: Tensor) -> None:
    """Tokens of the pages ids [rows, heads, count] as numbers at the front of keys and values
    [rows, heads, tokens, head_dim].
    """
    for stored, into in ((pages.keys, keys), (pages.values, values)):
        if pages.records is None:
            gather(stored, ids, into)
        else:
            by_lane = stored[ids].flatten(0, 1).flatten(1, 2)
            dequantize(by_lane, pages.records, into.flatten(0, 1)[:, : by_lane.shape[1]])


def _plain(tokens: Tensor, pages: Pages, dtype: torch.dtype, head_dim: int) -> Tensor:
    if pages.records is None:
        return tokens
    out = torch.empty(*tokens.shape[:-1], head_dim, dtype=dtype, device=tokens.device)
    dequantize(tokens[None], pages.records, out[None])
    return out


def _formats(
    head_dim: int, page_sizes: tuple[int, ...], kv_groups: tuple[int, ...]
) -> Iterator[tuple[int, RecordFormat | None, bool, bool]]:
    """Page size in tokens as asked of the pool, record format, whether the tokens are exact, and
    whether they have log weights.
    """
    for size in page_sizes:
        yield size, None, True, False
        yield size, None, True, True
    for bits, groups in product((2, 4, 8), kv_groups):
        if head_dim * bits % (32 * groups) == 0:
            yield 64, RecordFormat(bits, groups), False, False
            yield 64, RecordFormat(bits, groups), True, False
            if groups == 1:
                yield 64, RecordFormat(bits, groups), False, True


def correctness(
    device: torch.device,
    dtypes: tuple[str, ...],
    head_dims: tuple[int, ...],
    page_sizes: tuple[int, ...],
    kv_groups: tuple[int, ...],
    queries: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Every format, page size, number format and path against float32 SDPA over the same tokens."""
    return [
        case
        for dtype, head_dim in product(dtypes, head_dims)
        for form in _formats(head_dim, page_sizes, kv_groups)
        for case in _cases(device, dtype, head_dim, *form, queries)
    ]


def _cases(
    device: torch.device,
    dtype: str,
    head_dim: int,
    page_size: int,
    records: RecordFormat | None,
    is_exact: bool,
    weighted: bool,
    queries: tuple[int, ...],
) -> Iterator[dict[str, Any]]:
    """Every back end and path over pages of one format, for each number of queries."""
    torch.manual_seed(0)
    rows, heads = 2, 3
    pages = filled_pool(device, dtype, head_dim, page_size, records, 20, is_exact)
    size = pages.page_size
    lengths = torch.tensor([size + 6, 2 * size, 1, 5, 0, size + 1], device=device)
    tables = torch.randperm(20, device=device)[:18].view(6, 3)
    lanes = Lanes(pages, tables, lengths, 2 * size, weighted)
    bound = BOUNDS[dtype]
    for n in queries:
        shape = (3, rows, n, heads, head_dim)
        q, k, v = torch.randn(shape, device=device).to(TORCH_DTYPES[dtype])
        for name, backend in backends(device, dtype, head_dim).items():
            for path, out, held in _paths(backend, q, k, v, lanes):
                yield {
                    "backend": name,
                    "path": path,
                    "dtype": dtype,
                    "head_dim": head_dim,
                    "page_size": size,
                    "kv_dtype": records.name if records else None,
                    "kv_groups": records.groups if records else None,
                    "before_start": records is not None and is_exact,
                    "weighted": weighted,
                    "queries": n,
                    "error": _error(out, q, k, v, held),
                    "bound": bound if is_exact else max(bound, 5e-3),
                }


def _paths(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, lanes: Lanes
) -> Iterator[tuple[str, Tensor, Lanes]]:
    """What each path of the back end answers, and what it attended to: pages with ragged lanes;
    gathered with all of them as long as the longest.
    """
    rows, _, heads, head_dim = q.shape
    scale = head_dim**-0.5
    if backend.reads_pages(lanes.pages, q.shape[1], True):
        yield "pages", backend.attend_pages(q, k, v, lanes, scale), lanes
    cached = lanes.longest
    keys, values = (
        torch.cat((part.new_zeros(rows, heads, cached, head_dim), part.transpose(1, 2)), 2)
        for part in (k, v)
    )
    ids = lanes.tables.view(rows, heads, -1)[:, :, : cached // lanes.pages.page_size]
    gather_pages(lanes.pages, ids, keys, values)
    even = replace(lanes, lengths=torch.full_like(lanes.lengths, cached))
    bias = None
    if lanes.weighted:
        bias = q.new_zeros(rows, heads, 1, keys.shape[2], dtype=torch.float32)
        held = [_log_weights(even, lane) for lane in range(rows * heads)]
        bias[..., :cached] = torch.stack(held).view(rows, heads, 1, cached)
    yield "gathered", backend.attend(q, keys, values, bias, scale), even


def _log_weights(lanes: Lanes, lane: int) -> Tensor:
    """Of the tokens that a lane holds, float32 [tokens]; zero where they have none."""
    size, count = lanes.pages.page_size, int(lanes.lengths[lane])
    if not lanes.weighted:
        return torch.zeros(count, device=lanes.tables.device)
    assert lanes.pages.planes is not None
    return lanes.pages.planes[lanes.tables[lane], :size].flatten()[:count].float()


def _error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, lanes: Lanes) -> float:
    """Largest difference from float32 attention, lane by lane. The largest float where a result is
    not finite.
    """
    worst, pages = 0.0, lanes.pages
    for lane, count in enumerate(lanes.lengths.tolist()):
        r, h = divmod(lane, q.shape[2])
        parts = []
        for stored, fresh in ((pages.keys, k), (pages.values, v)):
            kept = stored[lanes.tables[lane]].flatten(0, 1)[:count]
            tokens = _plain(kept, pages, q.dtype, q.shape[3])
            parts.append(torch.cat((tokens, fresh[r, :, h])).float()[None, None])
        log_weights = F.pad(_log_weights(lanes, lane), (0, q.shape[1]))
        query = q[r, :, h].float()[None, None]
        keys, values = parts
        wanted = F.scaled_dot_product_attention(query, keys, values, log_weights[None, None, None])
        error = float((out[r, :, h].float() - wanted[0, 0]).abs().max())
        worst = max(worst, error if math.isfinite(error) else sys.float_info.max)
    return worst
