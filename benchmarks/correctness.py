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

from kvruntime.attention import Backend
from kvruntime.attention.sdpa import SDPA
from kvruntime.formats import RowFormat
from kvruntime.pool import TORCH_DTYPES, Lanes, Pages, Pool
from kvruntime.quantize import dequantize, quantize
from policies import CacheGeometry

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
    row: RowFormat | None,
    num: int,
    is_exact: bool = False,
) -> Pages:
    """``num`` pages of random tokens in their stored form; exact ones among the bytes of quantised
    pages if ``is_exact``, as a generation has them before its start scale.
    """
    pool = Pool(num, page_size, CacheGeometry(1, 1, head_dim, dtype, dtype), device, row)
    pages = pool.exact if is_exact or pool.quantised is None else pool.quantised
    for part in (pages.keys, pages.values):
        tokens = torch.randn(num, pages.page_size, head_dim, device=device).to(TORCH_DTYPES[dtype])
        part.copy_(tokens if pages.row is None else quantize(tokens, pages.row))
    return pages


def _plain(rows: Tensor, row: RowFormat | None, dtype: torch.dtype, head_dim: int) -> Tensor:
    if row is None:
        return rows
    out = torch.empty(*rows.shape[:-1], head_dim, dtype=dtype, device=rows.device)
    dequantize(rows, row, out)
    return out


def _formats(
    head_dim: int, page_sizes: tuple[int, ...]
) -> Iterator[tuple[int, RowFormat | None, bool]]:
    """Page size in tokens as asked of the pool, row format, and whether the tokens are exact."""
    for size in page_sizes:
        yield size, None, True
    for bits, groups in product((2, 4, 8), (1, 2, 4, 8)):
        if head_dim * bits % (32 * groups) == 0:
            yield 64, RowFormat(bits, groups), False
            yield 64, RowFormat(bits, groups), True


def correctness(
    device: torch.device,
    dtypes: tuple[str, ...],
    head_dims: tuple[int, ...],
    page_sizes: tuple[int, ...],
    queries: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Every format, page size, number format and path against float32 SDPA over the same tokens."""
    return [
        case
        for dtype, head_dim in product(dtypes, head_dims)
        for form in _formats(head_dim, page_sizes)
        for case in _cases(device, dtype, head_dim, *form, queries)
    ]


def _cases(
    device: torch.device,
    dtype: str,
    head_dim: int,
    page_size: int,
    row: RowFormat | None,
    is_exact: bool,
    queries: tuple[int, ...],
) -> Iterator[dict[str, Any]]:
    """Every back end and path over pages of one format, for each number of queries."""
    torch.manual_seed(0)
    rows, heads = 2, 3
    pages = filled_pool(device, dtype, head_dim, page_size, row, 20, is_exact)
    size = pages.page_size
    lengths = torch.tensor([size + 6, 2 * size, 1, 5, 0, size + 1], device=device)
    tables = torch.randperm(20, device=device)[:18].view(6, 3)
    lanes = Lanes(pages, tables, lengths, 2 * size)
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
                    "kv_dtype": row.name if row else None,
                    "kv_groups": row.groups if row else None,
                    "before_start": row is not None and is_exact,
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
    lanes.pages.gather(ids, cached, keys, values)
    even = replace(lanes, lengths=torch.full_like(lanes.lengths, cached))
    yield "gathered", backend.attend(q, keys, values, None, scale), even


def _error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, lanes: Lanes) -> float:
    """Largest difference from float32 attention, lane by lane. The largest float where a result is
    not finite.
    """
    worst, pages = 0.0, lanes.pages
    for lane, count in enumerate(lanes.lengths.tolist()):
        r, h = divmod(lane, q.shape[2])
        parts = []
        for stored, fresh in ((pages.keys, k), (pages.values, v)):
            rows = stored[lanes.tables[lane]].flatten(0, 1)[:count]
            tokens = _plain(rows, pages.row, q.dtype, q.shape[3])
            parts.append(torch.cat((tokens, fresh[r, :, h])).float()[None, None])
        wanted = F.scaled_dot_product_attention(q[r, :, h].float()[None, None], *parts)
        error = float((out[r, :, h].float() - wanted[0, 0]).abs().max())
        worst = max(worst, error if math.isfinite(error) else sys.float_info.max)
    return worst
