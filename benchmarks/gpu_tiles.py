"""Which tiles the paged kernel runs fastest in."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import seconds_of, spread
from benchmarks.correctness import filled_pool
from benchmarks.gpu_sizes import Sizes
from kvruntime.attention.base import Lanes
from kvruntime.storage.layout import RecordFormat
from policies import TORCH_DTYPES


def tiles(device: torch.device, sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """The paged kernel in every tile beside the one that the rule takes (operators.tile_for), for
    the queries of some scales.
    """
    from kvruntime.attention.operators import TILES, tile_for  # xformers may not be there
    from kvruntime.attention.xformers import XFormers

    dtype, head_dim, report = sizes.dtypes[-1], sizes.head_dims[-1], []
    for records in (None, RecordFormat(4)):
        for n in sizes.queries:
            held, (q, k, v) = held_lanes(device, sizes, records, sizes.budget, n)
            for tile in TILES:
                backend = XFormers(device, TORCH_DTYPES[dtype], head_dim, 10**9, tile)

                call = partial(backend.attend_pages, q, k, v, held, 0.1)
                report.append(
                    {
                        "kv_dtype": records.name if records else None,
                        "queries": n,
                        "tile_queries": tile.queries,
                        "warps": tile.warps,
                        "is_the_rule": tile == tile_for(n),
                        "seconds": spread(seconds_of(device, call, repeats)),
                    }
                )
    return report


def held_lanes(
    device: torch.device, sizes: Sizes, records: RecordFormat | None, cached: int, n: int
) -> tuple[Lanes, Tensor]:
    """Full lanes of so many cached tokens, and q, k and v of a step of n."""
    dtype, head_dim = sizes.dtypes[-1], sizes.head_dims[-1]
    rows, heads, page_size = 2, sizes.heads, 64
    lanes, width = rows * heads, -(-cached // page_size)
    pages = filled_pool(device, dtype, head_dim, page_size, records, lanes * width)
    tables = torch.randperm(lanes * width, device=device).view(lanes, width)
    lengths = torch.full((lanes,), cached, device=device)
    fresh = torch.randn(3, rows, n, heads, head_dim, device=device).to(TORCH_DTYPES[dtype])
    return Lanes(pages, tables, lengths, cached), fresh
