"""Right results on every path of every attention back end, over the pages' own formats."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvruntime.attention import Backend
from kvruntime.attention.sdpa import SDPA
from kvruntime.formats import RowFormat
from kvruntime.pool import TORCH_DTYPES, Pages, Pool
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


def correctness(
    device: torch.device,
    dtypes: tuple[str, ...],
    head_dims: tuple[int, ...],
    page_sizes: tuple[int, ...],
    queries: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Every format, page size, number format and path against float32 SDPA over the same tokens."""
    cases = []
    rows, heads = 2, 3
    for dtype in dtypes:
        for head_dim in head_dims:
            rows_of = [RowFormat(bits, groups) for bits in (2, 4, 8) for groups in (1, 2, 4, 8)]
            rows_of = [row for row in rows_of if head_dim * row.bits % (32 * row.groups) == 0]
            formats: list[tuple[int, RowFormat | None, bool]] = [
                *((size, None, True) for size in page_sizes),
                *((64, row, is_exact) for row in rows_of for is_exact in (False, True)),
            ]
            for bytes_of, row, is_exact in formats:
                torch.manual_seed(0)
                pages = filled_pool(device, dtype, head_dim, bytes_of, row, 20, is_exact)
                size = pages.page_size
                lengths = torch.tensor([size + 6, 2 * size, 1, 5, 0, size + 1], device=device)
                tables = torch.randperm(20, device=device)[:18].view(6, 3)
                for n in queries:
                    shape = (3, rows, n, heads, head_dim)
                    q, k, v = torch.randn(shape, device=device).to(TORCH_DTYPES[dtype])
                    for name, backend in backends(device, dtype, head_dim).items():
                        for path, out in _paths(backend, q, k, v, pages, tables, lengths):
                            even = path == "gathered"
                            error = _error(out, q, k, v, pages, tables, lengths, even)
                            bound = BOUNDS[dtype]
                            case = {
                                "backend": name,
                                "path": path,
                                "dtype": dtype,
                                "head_dim": head_dim,
                                "page_size": size,
                                "kv_dtype": row.name if row else None,
                                "kv_groups": row.groups if row else None,
                                "before_start": row is not None and is_exact,
                                "queries": n,
                                "error": error,
                                "bound": bound if is_exact else max(bound, 5e-3),
                            }
                            cases.append(case)
    return cases


def _paths(
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Pages,
    tables: Tensor,
    lengths: Tensor,
) -> list[tuple[str, Tensor]]:
    """What each path of the back end answers: pages with ragged lanes, gathered with even ones."""
    scale = q.shape[3] ** -0.5
    found = []
    if backend.reads_pages(pages, q.shape[1], True):
        longest = 2 * pages.page_size
        out = backend.attend_pages(q, k, v, pages, tables, lengths, longest, scale)
        found.append(("pages", out))
    cached = 2 * pages.page_size
    keys, values = (
        torch.cat((part.new_zeros(2, 3, cached, q.shape[3]), part.transpose(1, 2)), 2)
        for part in (k, v)
    )
    pages.gather(tables.view(2, 3, 3)[:, :, :2], cached, keys, values)
    found.append(("gathered", backend.attend(q, keys, values, None, scale)))
    return found


def _error(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Pages,
    tables: Tensor,
    lengths: Tensor,
    even: bool,
) -> float:
    """Largest difference from float32 attention, lane by lane; every lane two pages if even. The
    largest float where a result is not finite.
    """
    worst = 0.0
    for lane in range(tables.shape[0]):
        r, h = divmod(lane, q.shape[2])
        count = 2 * pages.page_size if even else int(lengths[lane])
        parts = []
        for stored, fresh in ((pages.keys, k), (pages.values, v)):
            rows = stored[tables[lane]].flatten(0, 1)[:count]
            tokens = _plain(rows, pages.row, q.dtype, q.shape[3])
            parts.append(torch.cat((tokens, fresh[r, :, h])).float()[None, None])
        wanted = F.scaled_dot_product_attention(q[r, :, h].float()[None, None], *parts)
        error = float((out[r, :, h].float() - wanted[0, 0]).abs().max())
        worst = max(worst, error if math.isfinite(error) else sys.float_info.max)
    return worst
