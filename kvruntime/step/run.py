"""A step from its first word to its last: prepare, read, attend, select, commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from allocator import BlockTable
from kvruntime.attention.base import Backend, Lanes
from kvruntime.coding import Coding
from kvruntime.planning.demand import Plan
from kvruntime.planning.shapes import Kind
from kvruntime.planning.workspace import Workspace
from kvruntime.step.choose import choose, choose_attended
from kvruntime.step.commit import Write, commit
from kvruntime.step.fold import fold
from kvruntime.step.keep import keep
from kvruntime.step.prepare import Prepared, prepare
from kvruntime.step.read import Held, page_ids, read_held
from kvruntime.step.shift import shift
from kvruntime.storage.pages import Pages
from kvruntime.storage.pool import Pool
from kvruntime.storage.transfer import upload
from kvruntime.tracing import phase
from policies import Selection

Observer = Callable[[int, int, int, Tensor, Tensor, Tensor], None]
"""Called after each step's attention with scale, layer, first row, queries [rows, n, heads,
head_dim], keys and values [rows, heads, cached + n, head_dim], once for each chunk of rows. These
two are views of the workspace: copy what you keep."""


@dataclass(frozen=True, slots=True, eq=False)
class Runner:
    """What the steps of a generation have in common."""

    plan: Plan
    pool: Pool
    backend: Backend
    softmax_scale: float
    observer: Observer | None
    coding: Coding | None = None

    def pages(self, scale: int, layer: int) -> Pages:
        """The pool's pages as this layer has them after this scale."""
        held = self.plan.format_after(scale, layer)
        return self.pool.view(self.plan.layout(held, self.pool.page_bytes))


@contextmanager
def plainly(device: str) -> Iterator[None]:
    """A pool that autograd watches would hold every generation; autocast would round scores."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device):
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    else:  # entering these takes as long as a small step's attention
        yield


def run_steps(
    runner: Runner,
    workspace: Workspace,
    table: BlockTable,
    scale: int,
    layer: int,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor | None, int, int]:
    """``run_step`` for all rows, in chunks: attention, the chunks, and how many of them read the
    pages.
    """
    total, step = k.shape[0], runner.plan.chunk_rows
    out: Tensor | None = None
    chunks = all_from_pages = 0
    for start in range(0, total, step):
        rows = slice(start, min(start + step, total))
        queries = None if q is None else q[rows]
        part, from_pages = run_step(
            runner, workspace, table, scale, layer, rows, queries, k[rows], v[rows]
        )
        chunks, all_from_pages = chunks + 1, all_from_pages + from_pages
        if q is None or part is None:
            continue
        if step >= total:
            return part, chunks, all_from_pages
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        out[rows] = part
        del part
    return out, chunks, all_from_pages


def run_step(
    runner: Runner,
    workspace: Workspace,
    table: BlockTable,
    scale: int,
    layer: int,
    rows: slice,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor | None, bool]:
    """Attention [rows, n, heads, head_dim] of these rows, and whether it read the pages
    themselves; then their lanes hold what the plan says. Without q nobody attends, nor observes.
    """
    plan, pool = runner.plan, runner.pool
    coding = runner.coding
    transforms = coding.layer(layer, pool.device) if coding else None
    with phase("prepare"):
        step = prepare(plan, pool, table, scale, layer, rows, workspace, transforms)
    with phase("read"):
        pages, ids, from_pages, held = _read(runner, step, q, k, v)
    out = None
    if q is not None:
        with phase("attend"):
            seen = held
            if step.shape.attended:
                seen = choose_attended(plan, step, held, q, runner.softmax_scale)
            out = _attend(runner, step, q, k, v, seen, pages, ids, from_pages)
        if runner.observer is not None:
            runner.observer(scale, layer, rows.start, q, held.keys, held.values)

    selection = None
    if step.shape.kind in (Kind.CHOOSE, Kind.FOLD):
        assert q is not None, "Generation.append refuses those"
        with phase("select"):
            selection = choose(plan, step, held, q, runner.softmax_scale)
    with phase("commit"):
        writes = _writes(step, pages, ids, held, selection, k, v)
        commit(step, pool, table, runner.pages(scale, layer), writes, ids)
    return out, from_pages


def _attend(
    runner: Runner,
    step: Prepared,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Held,
    pages: Pages | None,
    ids: Tensor | None,
    from_pages: bool,
) -> Tensor:
    """Over the pages themselves, or over what was gathered."""
    backend, softmax_scale = runner.backend, runner.softmax_scale
    if from_pages:
        assert pages is not None and ids is not None
        return backend.attend_pages(q, k, v, _lanes(runner, step, pages, ids), softmax_scale)
    return backend.attend(q, held.keys, held.values, held.log_weights, softmax_scale)


class _Read(NamedTuple):
    """pages: of the cached tokens, None where there are none. from_pages: whether attention reads
    them by itself.
    """

    pages: Pages | None
    ids: Tensor | None
    from_pages: bool
    held: Held


def _read(runner: Runner, step: Prepared, q: Tensor | None, k: Tensor, v: Tensor) -> _Read:
    """Gathered candidates where anything looks at them; else the fresh ones as they came."""
    shape, pages, ids = step.shape, None, None
    if shape.cached:
        pages = runner.pages(step.scale - 1, step.layer)
        ids = page_ids(step, upload(k.device, [step.ids])[0])
    from_pages = (
        q is not None
        and not shape.attended
        and pages is not None
        and runner.backend.reads_pages(
            pages, q.shape[1], shape.is_ragged and not shape.needs_candidates
        )
    )
    is_observed = q is not None and runner.observer is not None
    is_needed = is_observed or shape.needs_candidates or (q is not None and not from_pages)
    if shape.gathers and is_needed:
        held = read_held(step, pages, ids, k, v)
    else:
        held = Held(k.transpose(1, 2), v.transpose(1, 2), None)
    return _Read(pages, ids, from_pages, held)


def _lanes(runner: Runner, step: Prepared, pages: Pages, ids: Tensor) -> Lanes:
    """What a back end that reads pages needs: tables of one width for all steps."""
    shape = step.shape
    width = runner.plan.longest_table(runner.plan.format_after(step.scale - 1, step.layer))
    tables = ids.new_zeros(shape.rows * shape.heads, width)
    tables[:, : shape.table] = ids.flatten(0, 1)
    lengths = step.known.constant(
        ids.device, "lengths", lambda: np.tile(step.before, shape.rows), shape.rows
    )
    return Lanes(pages, tables, lengths, shape.cached, shape.weighted)


def _writes(
    step: Prepared,
    pages: Pages | None,
    ids: Tensor | None,
    held: Held,
    selection: Selection | None,
    k: Tensor,
    v: Tensor,
) -> Write:
    """How the step stores what it keeps; whatever of that lies in pages is read now."""
    if step.shape.kind is Kind.NOTHING:
        return lambda pages, slots: None
    if step.shape.kind is Kind.SHIFT:
        return shift(step, pages, ids, k, v)
    if step.shape.kind is Kind.FOLD:
        assert selection is not None
        return fold(step, held, selection)
    return keep(step, pages, ids, held, selection)
