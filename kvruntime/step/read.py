"""Read: cached tokens out of their pages, fresh ones behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvruntime.planning.regions import pages_read
from kvruntime.step.prepare import Prepared
from kvruntime.storage.coding import KEYS, VALUES
from kvruntime.storage.layout import CodedFormat, Records
from kvruntime.storage.pages import Pages
from kvruntime.storage.records import dequantize
from policies.scratch import part_of, wide


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What attention and selection look at: cached ++ fresh tokens of every lane.

    keys, values: [rows, heads, candidates, head_dim].
    log_weights: float32 [rows or 1, heads, 1, candidates], -inf where a shorter head holds no
        token; None: nothing is added to the logits.
    planes: float16 [rows, heads, candidates, planes]; None where nothing asks for them.
    """

    keys: Tensor
    values: Tensor
    log_weights: Tensor | None
    planes: Tensor | None = None


def page_ids(step: Prepared, uploaded: Tensor) -> Tensor:
    """The pages that are read, int64 [rows, heads, table], as torch indexes with."""
    return step.views.base["ids"].copy_(uploaded)


def read_held(
    step: Prepared, pages: Pages | None, ids: Tensor | None, k: Tensor, v: Tensor
) -> Held:
    """Gather the lanes out of ``pages``, if they hold any, and put the fresh k and v [rows, n,
    heads, head_dim] behind them.
    """
    shape, base, count = step.shape, step.views.base, step.shape.candidates
    keys, values, log_weights = base["keys"], base["values"], None
    if pages is not None and ids is not None:
        for part, stored, into in ((KEYS, pages.keys, keys), (VALUES, pages.values, values)):
            if pages.records is None:
                gather(stored, ids, into)
            else:
                _gather_records(step, part, pages.records, stored, ids, into)
        if shape.has_bias:
            log_weights = base["log_weights"].zero_()
        if shape.weighted or shape.gathers_planes:
            _gather_planes(step, pages, ids)
    for into, fresh in ((keys, k), (values, v)):
        into[:, :, shape.cached : count].copy_(fresh.transpose(1, 2))
    if shape.cached and shape.is_ragged:
        hide = hidden(step, keys.device)
        assert log_weights is not None
        log_weights[:, :, 0, : shape.cached].masked_fill_(hide, -torch.inf)
        for into in (keys, values):  # stale bits may be NaN, and 0 x NaN is NaN
            into[:, :, : shape.cached].masked_fill_(hide.unsqueeze(-1), 0.0)
        if shape.gathers_planes:
            base["planes"][:, :, : shape.cached].masked_fill_(hide.unsqueeze(-1), 0.0)
    planes = None
    if shape.gathers_planes:
        planes = base["planes"][:, :, :count]
        fresh_planes = step.known.constant(keys.device, "planes", lambda: plane_numbers(step))
        planes[:, :, shape.cached :] = fresh_planes
    return Held(keys[:, :, :count], values[:, :, :count], log_weights, planes)


def gather(stored: Tensor, ids: Tensor, into: Tensor) -> None:
    """Copy the pages ids [rows, heads, count] of [num_pages, page_size, width] whole to the front
    of into [rows, heads, places, width].

    What follows the tokens of a partly filled last page is whatever that page held before.
    """
    pages, places = wide(stored, into[:, :, : ids.shape[2] * stored.shape[1]])
    if pages.is_contiguous():  # fewer and longer runs to index
        pages = pages.flatten(1)
    places = places.view(*ids.shape, *pages.shape[1:])
    torch.ops.aten.index.Tensor_out(pages, [ids], out=places)


def _gather_records(
    step: Prepared, part: int, records: Records, stored: Tensor, ids: Tensor, into: Tensor
) -> None:
    """The same for records, which become numbers again, a slice of every lane at a time."""
    rows, heads, table = ids.shape
    scratch, size, cached = step.views.read, stored.shape[1], step.shape.cached
    count = pages_read(records, size)
    for first in range(0, table, count):
        some = ids[:, :, first : first + count]
        shape = (rows, heads, some.shape[2], size, stored.shape[2])
        gathered = part_of(scratch["records"], *shape)
        torch.ops.aten.index.Tensor_out(stored, [some], out=gathered)
        start = first * size
        end = min(cached, start + some.shape[2] * size)
        by_lane, target = gathered.flatten(2, 3)[:, :, : end - start], into[:, :, start:end]
        if isinstance(records, CodedFormat):
            step.transform(part).decode_lanes(by_lane, records, target, scratch)
        else:
            dequantize(by_lane.flatten(0, 1), records, target.flatten(0, 1), scratch)


def _gather_planes(step: Prepared, pages: Pages, ids: Tensor) -> None:
    """Planes of what is cached into "planes", and log weights into "log_weights"."""
    shape, base, cached = step.shape, step.views.base, step.shape.cached
    assert pages.planes is not None
    by_page = step.views.read["page_planes"]
    torch.ops.aten.index.Tensor_out(pages.planes[:, : pages.page_size], [ids], out=by_page)
    held = by_page.flatten(2, 3)[:, :, :cached]
    if shape.weighted:
        base["log_weights"][:, :, 0, :cached] = held[..., shape.planes.index("log_weight")]
    if shape.gathers_planes:
        base["planes"][:, :, :cached] = held


def plane_numbers(step: Prepared) -> NDArray[np.float16]:
    """Planes of the tokens of the new scale, [fresh, planes]."""
    fresh, columns = step.shape.fresh, step.size[-1]
    line, column = np.divmod(np.arange(fresh), columns)
    known = {
        "scale": np.full(fresh, step.scale),
        "line": (line + 0.5) * columns / fresh,
        "column": (column + 0.5) / columns,
    }
    numbers = [known.get(plane, np.zeros(fresh)) for plane in step.shape.planes]
    return np.stack(numbers, axis=1).astype(np.float16)


def hidden(step: Prepared, device: torch.device) -> Tensor:
    """Where a shorter head holds no token, bool [heads, cached]."""
    return step.known.constant(
        device, "hidden", lambda: np.arange(step.shape.cached) >= step.before[:, None]
    )
