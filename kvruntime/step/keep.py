"""Keep: every lane is written from its start with the candidates it keeps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvruntime.step.commit import Write, used, write_planes
from kvruntime.step.encode import encode
from kvruntime.step.prepare import Prepared
from kvruntime.step.read import Held
from kvruntime.storage.pages import Pages, read, write
from policies import Selection
from policies.scratch import wide


def keep(
    step: Prepared, pages: Pages | None, ids: Tensor | None, held: Held, selection: Selection | None
) -> Write:
    """Every lane is written from its start with the candidates it keeps. Records that were cached
    are copied as they are. selection: the policy's; None: what the host knows.
    """
    shape, commits = step.shape, step.views.commit
    chosen = _known_places(step, held.keys.device) if selection is None else selection.keep
    at = _flat_places(step, chosen)
    old = None
    if shape.copies_records:
        assert pages is not None and ids is not None
        old = _old_records(step, pages, ids, at)
    if shape.planes:
        carried = step.views.base["planes"].flatten(0, 2)
        torch.ops.aten.index.Tensor_out(carried, [at], out=commits["kept_planes"])
    staged = commits["staged"].view(shape.rows, shape.written, -1)

    def write_kept(new_pages: Pages, slots: Tensor) -> None:
        bases = step.views.base["keys"], step.views.base["values"]
        for part, (target, base) in enumerate(
            zip((new_pages.keys, new_pages.values), bases, strict=True)
        ):
            source, into = wide(base, staged)
            torch.ops.aten.index.Tensor_out(source.flatten(0, 2), [at], out=into)
            stored = staged
            if shape.writes is not None:
                stored = encode(step, part, staged)
                if old is not None:
                    was_cached = commits["was_cached"].unsqueeze(-1)
                    torch.where(was_cached, old[part], stored, out=stored)
            write(target, slots, stored)
        if shape.planes:
            write_planes(step, new_pages)

    return write_kept


def _known_places(step: Prepared, device: torch.device) -> Tensor:
    """What the host knows is kept, int64 [1, heads, kept]."""
    places = step.known.keep
    assert places is not None
    return step.known.constant(device, "keep", lambda: places[None])


def _flat_places(step: Prepared, chosen: Tensor) -> Tensor:
    """Candidates [rows or 1, heads, kept] as places of the whole workspace, [rows, written]."""
    shape, commits = step.shape, step.views.commit
    lanes = torch.arange(shape.rows * shape.heads, device=chosen.device).mul_(shape.places)
    starts = lanes.view(shape.rows, shape.heads, 1)
    if shape.is_even:
        at = commits["at"].view(shape.rows, shape.heads, shape.kept)
        torch.add(chosen, starts, out=at)
        return commits["at"]
    torch.add(chosen, starts, out=commits["spread"])
    torch.index_select(
        commits["spread"].view(shape.rows, -1), 1, used(step, chosen.device), out=commits["at"]
    )
    return commits["at"]


def _old_records(step: Prepared, pages: Pages, ids: Tensor, at: Tensor) -> Tensor:
    """Records [2, rows, written, words] of those that were cached; anything for the others."""
    shape, commits = step.shape, step.views.commit
    place, was_cached, page = commits["old_slots"], commits["was_cached"], commits["old_pages"]
    torch.remainder(at, shape.places, out=place)
    torch.lt(place, shape.cached, out=was_cached)
    place.clamp_(max=shape.cached - 1)
    start = step.known.constant(
        at.device,
        "table start",
        lambda: np.repeat(np.arange(shape.heads) * shape.table, step.after),
    )
    where = commits["slots"]
    torch.div(place, shape.page_size, rounding_mode="floor", out=where).add_(start)
    torch.gather(ids.view(shape.rows, -1), 1, where, out=page)
    place.remainder_(shape.page_size).add_(page.mul_(shape.page_size))
    old = commits["old_records"]
    read(pages.keys, place, old[0])
    read(pages.values, place, old[1])
    return old
