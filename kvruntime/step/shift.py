"""Shift: what stays in its lane is not touched; cached survivors move into the holes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvruntime.step.commit import Write, write_planes
from kvruntime.step.encode import encode
from kvruntime.step.prepare import Prepared
from kvruntime.step.read import plane_numbers
from kvruntime.storage.pages import Pages, read, write


def shift(step: Prepared, pages: Pages | None, ids: Tensor | None, k: Tensor, v: Tensor) -> Write:
    """Cached survivors go from slot to slot as they are stored, fresh ones beside them. ``pages``
    and ``ids``: where the cached ones lie; None if there are none.
    """
    shape, commits, rows = step.shape, step.views.commit, step.shape.rows
    moved = None
    if shape.moved:
        assert pages is not None and ids is not None
        page, offset = _moved_places(step, k.device)
        slots = commits["old_slots"].view(rows, -1)
        torch.index_select(ids.view(rows, -1), 1, page, out=slots)
        if shape.planes:
            moved_planes = commits["moved_planes"].view(*slots.shape, -1)
            torch.ops.aten.index.Tensor_out(pages.planes, [slots, offset], out=moved_planes)
            by_lane = moved_planes.view(rows, shape.heads, shape.moved, -1)
            _kept_planes(step)[:, :, : shape.moved] = by_lane
        slots.mul_(shape.page_size).add_(offset)
        moved = commits["moved"].view(2, *slots.shape, -1)
        read(pages.keys, slots, moved[0])
        read(pages.values, slots, moved[1])

    def write_kept(new_pages: Pages, slots: Tensor) -> None:
        by_lane = slots.view(rows, shape.heads, -1)
        for part, (target, fresh) in enumerate(((new_pages.keys, k), (new_pages.values, v))):
            if moved is not None:
                old = moved[part].view(rows, shape.heads, shape.moved, -1)
                write(target, by_lane[:, :, : shape.moved], old)
            if shape.sources > shape.moved:
                write(target, by_lane[:, :, shape.moved :], _fresh(step, part, fresh))
        if shape.planes:
            _kept_planes(step)[:, :, shape.moved :] = _fresh_planes(step, k.device)
            write_planes(step, new_pages)

    return write_kept


def _kept_planes(step: Prepared) -> Tensor:
    """Planes of what a shift writes, [rows, heads, sources, planes]."""
    kept = step.views.commit["kept_planes"]
    return kept.view(step.shape.rows, step.shape.heads, step.shape.sources, -1)


def _moved_places(step: Prepared, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where cached survivors lie: a row's page and the place in it, int64 [heads * moved]."""
    known_shift, size, table = step.known.shift, step.shape.page_size, step.shape.table
    assert known_shift is not None
    heads = np.arange(step.shape.heads)
    sources = known_shift.sources[: known_shift.moved]
    return (
        step.known.constant(
            device,
            "moved page",
            lambda: (heads[:, None] * table + sources // size).ravel(),
        ),
        step.known.constant(device, "moved offset", lambda: np.tile(sources % size, heads.size)),
    )


def _fresh_planes(step: Prepared, device: torch.device) -> Tensor:
    """Planes of the tokens of the new scale that a shift keeps, float16 [m, planes]."""
    known_shift = step.known.shift
    assert known_shift is not None
    sources = known_shift.sources[known_shift.moved :] - step.shape.cached
    return step.known.constant(device, "shifted planes", lambda: plane_numbers(step)[sources])


def _fresh(step: Prepared, part: int, fresh: Tensor) -> Tensor:
    """The tokens of the new scale that a shift keeps, as they are stored: [rows, heads, m,
    width].
    """
    shape, commits, known_shift = step.shape, step.views.commit, step.known.shift
    assert known_shift is not None
    sources = known_shift.sources[known_shift.moved :] - shape.cached
    tokens = fresh.transpose(1, 2)
    if shape.fresh_is_slice:
        tokens = tokens[:, :, int(sources[0]) : int(sources[-1]) + 1]
        if shape.writes is None:
            return tokens
    lanes = (shape.rows, shape.heads, sources.size)
    staged = commits["staged"].view(*lanes, shape.head_dim)
    if shape.fresh_is_slice:
        staged.copy_(tokens)
    else:
        which = step.known.constant(fresh.device, "fresh", lambda: sources)
        torch.ops.aten.index.Tensor_out(tokens, [None, None, which], out=staged)
    if shape.writes is None:
        return staged
    return encode(step, part, staged.flatten(1, 2)).view(*lanes, -1)
