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
from kvruntime.planning.regions import Kind
from kvruntime.step.prepare import Prepared
from kvruntime.step.read import Held
from kvruntime.storage.pool import Pages, Pool, read, write
from kvruntime.storage.records import quantize
from kvruntime.storage.transfer import upload, wide
from policies import Selection
from policies.scratch import part_of

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
        pool.wait_for_reads()
        old, new = table.commit(change)
        if old.size and step.shape.kind is Kind.SHIFT:  # else their pages are written whole
            pool.copy_pages(*(part.long() for part in upload(device, [old, new])))
        pool.note_reads()
    if step.shape.kind is Kind.NOTHING:
        return
    commits = step.views.commit
    if ids is not None and change.num_taken == 0 and step.shape.new_table == step.shape.table:
        new_ids = ids
    else:
        pages = np.ascontiguousarray(table.pages[step.rows, :, : step.shape.new_table])
        new_ids = commits["new_ids"].copy_(upload(device, [pages])[0])
    rows, written = step.shape.rows, step.shape.written
    page, offset = _written_places(step, device)
    slots = commits["slots"]
    torch.index_select(new_ids.view(rows, -1), 1, page, out=slots)
    if step.shape.weighted:
        assert new_pages.weights is not None
        weight_slots = commits["weight_slots"].view(rows, written)
        torch.mul(slots, new_pages.weights.shape[1], out=weight_slots).add_(offset)
    slots.mul_(step.shape.new_page_size).add_(offset)
    write_kept(new_pages, slots)
    pool.note_reads()


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
        if shape.weighted:
            assert pages.weights is not None
            at = part_of(commits["weight_slots"], *slots.shape)
            torch.mul(slots, pages.weights.shape[1], out=at).add_(offset)
            kept = commits["log_kept"].view(rows, shape.heads, -1)
            kept[:, :, : shape.moved] = pages.weights.view(-1)[at].view(rows, shape.heads, -1)
        slots.mul_(shape.page_size).add_(offset)
        moved = commits["moved"].view(2, *slots.shape, -1)
        read(pages.keys, slots, moved[0])
        read(pages.values, slots, moved[1])

    def write_kept(new_pages: Pages, slots: Tensor) -> None:
        by_lane = slots.view(rows, shape.heads, -1)
        for index, (target, fresh) in enumerate(((new_pages.keys, k), (new_pages.values, v))):
            if moved is not None:
                part = moved[index].view(rows, shape.heads, shape.moved, -1)
                write(target, by_lane[:, :, : shape.moved], part)
            if shape.sources > shape.moved:
                write(target, by_lane[:, :, shape.moved :], _fresh(step, fresh))
        if shape.weighted:
            commits["log_kept"].view(rows, shape.heads, -1)[:, :, shape.moved :].zero_()
            write_weights(step, new_pages)

    return write_kept


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


def _fresh(step: Prepared, fresh: Tensor) -> Tensor:
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
    encoded = quantize(commits["staged"], shape.writes, commits["encoded"], commits)
    return encoded.view(*lanes, -1)


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
    if shape.weighted:
        _carry_weights(step, held, chosen)
    staged = commits["staged"].view(shape.rows, shape.written, -1)

    def write_kept(new_pages: Pages, slots: Tensor) -> None:
        bases = step.views.base["keys"], step.views.base["values"]
        for index, (target, base) in enumerate(
            zip((new_pages.keys, new_pages.values), bases, strict=True)
        ):
            source, into = wide(base, staged)
            torch.ops.aten.index.Tensor_out(source.flatten(0, 2), [at], out=into)
            stored = staged
            if shape.writes is not None:
                encoded = quantize(commits["staged"], shape.writes, commits["encoded"], commits)
                stored = encoded.view(shape.rows, shape.written, -1)
                if old is not None:
                    was_cached = commits["was_cached"].unsqueeze(-1)
                    torch.where(was_cached, old[index], stored, out=stored)
            write(target, slots, stored)
        if shape.weighted:
            write_weights(step, new_pages)

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


def used(step: Prepared, device: torch.device) -> Tensor:
    """Which of a row's heads * kept places are used where heads differ, int64 [written]."""
    return step.known.constant(
        device,
        "used",
        lambda: np.flatnonzero(np.arange(step.shape.kept) < step.after[:, None]),
    )


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


def _carry_weights(step: Prepared, held: Held, chosen: Tensor) -> None:
    """Log weights of what is kept, into "log_kept"; zero where no candidate has one."""
    shape, commits = step.shape, step.views.commit
    if held.log_weights is None:
        commits["log_kept"].zero_()
        return
    spread = commits["log_spread"]
    places = chosen.clamp(max=shape.candidates - 1).expand(shape.rows, -1, -1)
    torch.gather(held.log_weights.squeeze(2), 2, places, out=spread)
    pack_weights(step, spread)


def pack_weights(step: Prepared, log_weights: Tensor) -> None:
    """Log weights [rows, heads, kept] into "log_kept" [rows, written]."""
    flat, kept = log_weights.reshape(step.shape.rows, -1), step.views.commit["log_kept"]
    if not step.shape.is_even:
        flat = flat.index_select(1, used(step, flat.device))
    kept.copy_(flat)


def write_numbers(step: Prepared, target: Tensor, slots: Tensor, numbers: Tensor) -> None:
    """Write float32 numbers [rows, written, head_dim] as the pages ``target`` store tokens."""
    shape, commits = step.shape, step.views.commit
    if shape.writes is not None:
        flat = numbers.view(-1, shape.head_dim)
        encoded = quantize(flat, shape.writes, commits["encoded"], commits)
        stored = encoded.view(shape.rows, shape.written, -1)
    elif shape.dtype == "float32":
        stored = numbers
    else:
        stored = commits["staged"].view_as(numbers).copy_(numbers)
    write(target, slots, stored)


def write_weights(step: Prepared, pages: Pages) -> None:
    """Write "log_kept" beside the tokens."""
    assert pages.weights is not None
    commits = step.views.commit
    pages.weights.view(-1)[commits["weight_slots"]] = commits["log_kept"]
