"""Pages that a generation holds at every step, also while rows share them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from allocator import BlockTable, Change, PageAllocator

SIMULATED = 2**21  # ids of a layer that are gone through, no more
Counts = NDArray[np.int64]
Propose = Callable[[BlockTable, int, int, slice], Change]
"""What a step of (scale, layer) makes of these rows of its layer's table."""


@dataclass(frozen=True, slots=True, eq=False)
class Occupancy:
    """Pages of all layers together, each counted once however many rows share it; int64 [scales,
    layers].

    within: the most that are held while a step runs. after: held after it.
    at_start: held when a scale begins, rows gone or repeated already; int64 [scales].
    """

    within: Counts
    after: Counts
    at_start: Counts


def occupancy(rows: Sequence[int], row_pages: Counts) -> Occupancy:
    """Where no row is ever repeated. rows: of each scale. row_pages: of one row, after each step of
    a layer, [scales, layers].
    """
    count = np.array(rows)[:, None]
    after = count * row_pages
    start = count * np.concatenate([np.zeros_like(row_pages[:1]), row_pages[:-1]])
    return _together(start, np.maximum(start, after), after)


def repeated_occupancy(
    rows: Sequence[int],
    row_pages: Counts,
    chunk_rows: int,
    propose: Propose,
    heads: int,
    alike: Sequence[Hashable],
) -> Occupancy:
    """Where rows are repeated: the changes of all block tables, made on an allocator that has no
    pages to hand out but numbers. alike: layers of the same key go through the same changes. Where
    that would be more than SIMULATED ids: as if nothing was shared, which is never less.
    O(steps * pages) for each sort of layer.
    """
    most = rows * row_pages.max(axis=1, initial=0)
    if most.max() > SIMULATED:
        return occupancy(rows, row_pages)
    found: dict[Hashable, Counts] = {}
    for layer, kind in enumerate(alike):
        if kind not in found:
            table = BlockTable(PageAllocator(max(1, 2 * int(most.max()))), rows[0], heads)
            found[kind] = _layer(table, 0, rows, chunk_rows, propose, layer)
    return _of_layers([found[kind] for kind in alike])


def occupancy_from(
    tables: Sequence[BlockTable],
    scale: int,
    rows: Sequence[int],
    chunk_rows: int,
    propose: Propose,
) -> Occupancy:
    """From that scale on, of tables that hold what was stored before (``BlockTable.rehearsal``),
    which are changed. rows: of each scale from there on.
    """
    layers = [
        _layer(table, scale, rows, chunk_rows, propose, layer) for layer, table in enumerate(tables)
    ]
    return _of_layers(layers)


def _layer(
    table: BlockTable,
    scale: int,
    rows: Sequence[int],
    chunk_rows: int,
    propose: Propose,
    layer: int,
) -> Counts:
    """Pages of a layer at the start of each scale, within and after it, [scales, 3]."""
    held = [
        _scale(table, count, chunk_rows, partial(propose, table, scale + after, layer))
        for after, count in enumerate(rows)
    ]
    return np.array(held).reshape(-1, 3)


def _of_layers(layers: Sequence[Counts]) -> Occupancy:
    start, within, after = np.stack(layers, axis=2).transpose(1, 0, 2)
    return _together(start, within, after)


def _scale(
    table: BlockTable, rows: int, chunk_rows: int, propose: Callable[[slice], Change]
) -> tuple[int, int, int]:
    """Pages of the table when the scale begins, the most while it goes on, and afterwards."""
    there = table.lengths.shape[0]
    if rows > there:
        table.repeat_rows(rows // there)
    elif rows < there:
        table.keep_rows(np.arange(rows))
    start = table.most_owned = table.num_owned
    for first in range(0, rows, chunk_rows):
        table.commit(propose(slice(first, min(first + chunk_rows, rows))))
    return start, table.most_owned, table.num_owned


def _together(start: Counts, within: Counts, after: Counts) -> Occupancy:
    """Of all layers, one of which is in its step, from figures of each."""
    done, to_come = after.cumsum(axis=1), start.sum(axis=1)[:, None] - start.cumsum(axis=1)
    held = done + to_come
    return Occupancy(held - after + within, held, start.sum(axis=1))
