"""Commit: tables change, pages go back, and what is kept is written.

Everything that is read from pages is read before a page changes its owner.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from allocator import BlockTable
from kvruntime.planning.shapes import Kind
from kvruntime.step.encode import encode
from kvruntime.step.prepare import Prepared
from kvruntime.storage.coding import VALUES
from kvruntime.storage.pages import Pages, copy_pages, write
from kvruntime.storage.pool import Pool
from kvruntime.storage.transfer import upload

Write = Callable[[Pages, Tensor], None]
"""Writes what a step keeps to slots [rows, written] of pages."""


def commit(
    step: Prepared,
    pool: Pool,
    table: BlockTable,
    new_pages: Pages,
    write_kept: Write,
    ids: Tensor | None,
) -> None:
    """Change the table and give pages back, as one change; then write.

    ids: the pages before the step, on the device, which serve again where none changed.
    """
    change, device = step.change, pool.device
    with pool.changing():
        pool.follow()
        old, new = table.commit(change)
        if old.size and step.shape.kind is Kind.SHIFT:  # else their pages are written whole
            gone, replacing = (ids.long() for ids in upload(device, [old, new]))
            scratch = step.views.base["keys"].view(-1).view(torch.uint8)  # read by now
            copy_pages((pool.keys, pool.values, pool.planes), gone, replacing, scratch)
        pool.note_use()
    if step.shape.kind is Kind.NOTHING:
        return
    commits = step.views.commit
    if ids is not None and change.num_taken == 0 and step.shape.new_table == step.shape.table:
        new_ids = ids
    else:
        pages = np.ascontiguousarray(table.pages[step.rows, :, : step.shape.new_table])
        new_ids = commits["new_ids"].copy_(upload(device, [pages])[0])
    rows = step.shape.rows
    page, offset = _written_places(step, device)
    slots = commits["slots"]
    torch.index_select(new_ids.view(rows, -1), 1, page, out=slots)
    if step.shape.planes:
        commits["plane_pages"].copy_(slots)
    slots.mul_(step.shape.new_page_size).add_(offset)
    write_kept(new_pages, slots)
    pool.note_use()


def _written_places(step: Prepared, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every token that is written, head by head: which of a row's heads * new_table pages it
    goes to, and which place there, int64 [written].
    """
    size, table = step.shape.new_page_size, step.shape.new_table

    def pairs() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        shift = step.known.shift
        if shift is None:
            heads, places = np.nonzero(np.arange(step.shape.kept) < step.after[:, None])
            return heads.astype(np.int64), places.astype(np.int64)
        heads = np.arange(step.shape.heads)
        return np.repeat(heads, shift.targets.size), np.tile(shift.targets, heads.size)

    def page() -> NDArray[np.int64]:
        heads, places = pairs()
        return heads * table + places // size

    return (
        step.known.constant(device, "written page", page),
        step.known.constant(device, "written offset", lambda: pairs()[1] % size),
    )


def used(step: Prepared, device: torch.device) -> Tensor:
    """Which of a row's heads * kept places are used where heads differ, int64 [written]."""
    return step.known.constant(
        device,
        "used",
        lambda: np.flatnonzero(np.arange(step.shape.kept) < step.after[:, None]),
    )


def pack_plane(step: Prepared, plane: str, numbers: Tensor) -> None:
    """One plane of all places, [lanes, kept], into "kept_planes"."""
    flat, kept = numbers.reshape(step.shape.rows, -1), step.views.commit["kept_planes"]
    if not step.shape.is_even:
        flat = flat.index_select(1, used(step, flat.device))
    kept[:, :, step.shape.planes.index(plane)] = flat


def write_numbers(step: Prepared, part: int, pages: Pages, slots: Tensor, numbers: Tensor) -> None:
    """Write float32 numbers [rows, written, head_dim] as the pages store tokens. part: KEYS or
    VALUES.
    """
    shape, commits = step.shape, step.views.commit
    if shape.writes is not None:
        stored = encode(step, part, numbers)
    elif shape.dtype == "float32":
        stored = numbers
    else:
        stored = commits["staged"].view_as(numbers).copy_(numbers)
    write(pages.values if part == VALUES else pages.keys, slots, stored)


def write_planes(step: Prepared, pages: Pages) -> None:
    """Write "kept_planes" beside the tokens."""
    assert pages.planes is not None
    commits = step.views.commit
    offset = _written_places(step, commits["kept_planes"].device)[1]
    pages.planes.index_put_((commits["plane_pages"], offset), commits["kept_planes"])
