"""One step of one layer for a chunk of rows: read, attend, choose, store."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvruntime.attention import Backend
from kvruntime.plan import SLICE_TOKENS, Plan
from kvruntime.pool import TORCH_DTYPES, Lanes, Pages, Pool, read, upload, write
from kvruntime.quantize import quantize
from kvruntime.scheduler import Move, Scheduler
from policies import Step

Observer = Callable[[int, int, int, Tensor, Tensor], None]
"""Called after each step with scale, layer, first row, queries [rows, n, heads, head_dim] and keys
[rows, heads, cached + n, head_dim], once for each chunk of rows. Keys are a view of the workspace:
copy what you keep."""


class Executor:
    """The tensors of a generation: the pool, and the workspace that one chunk of rows is read into.

    page_steps, gather_steps: how often attention read the pages themselves, and a gathered copy.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        softmax_scale: float,
        device: torch.device,
        observer: Observer | None,
    ) -> None:
        geometry = plan.geometry
        self.pool = Pool(max(1, plan.peak_pages), plan.page_size, geometry, device, plan.row)
        self.page_steps = self.gather_steps = 0
        self._plan = plan
        self._backend = backend
        self._softmax_scale = softmax_scale
        self._observer = observer
        size = plan.chunk_rows * geometry.heads * plan.workspace_row_tokens * geometry.head_dim
        dtype = TORCH_DTYPES[geometry.key_dtype]
        self._workspace = [torch.empty(size, dtype=dtype, device=device) for _ in "kv"]

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held from one generation to the next: the pool's pages and the workspace."""
        return [*self.pool.whole, *self._workspace]

    def start(self) -> None:
        """Begin to count for another generation."""
        self.pool.allocator.reset_high_water()
        self.page_steps = self.gather_steps = 0

    def step(self, run: Scheduler, chunk: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [rows, n, heads, head_dim] of this chunk's rows; then their lanes hold what
        the plan says. The host decides first, the device follows after one upload.
        """
        move = run.move(chunk)
        stored, n, longest = self._pages(move.is_quantised), q.shape[1], move.pages.shape[2]
        from_pages = move.cached > 0 and self._backend.reads_pages(stored, n, move.is_ragged)
        reads = move.needs_candidates or self._observer is not None or not from_pages
        gathers = move.cached > 0 and reads
        width = self._plan.longest_table(move.is_quantised) if from_pages else longest
        pages = np.zeros((*move.pages.shape[:2], width), dtype=np.int64)
        pages[:, :, :longest] = move.pages
        known = [pages, np.tile(move.before, q.shape[0]), move.moving, move.slots]
        taken = _taken(move, 0 if gathers else move.cached)
        known += [move.heads, move.places] if taken is None else [taken[1]]
        ids, lengths, moving, slots, *rest = upload(q.device, known)

        keys, values, bias = k.transpose(1, 2), v.transpose(1, 2), None
        if gathers:
            keys, values = self._gather(move, stored, ids[:, :, :longest], keys, values)
            if move.is_ragged:
                bias = _hide_short_heads(lengths, move.cached, keys, values)
        if from_pages:
            lanes = Lanes(stored, ids.flatten(0, 1), lengths, move.cached)
            out = self._backend.attend_pages(q, k, v, lanes, self._softmax_scale)
        else:
            out = self._backend.attend(q, keys, values, bias, self._softmax_scale)
        self.page_steps += from_pages
        self.gather_steps += not from_pages
        if self._observer is not None:
            self._observer(run.scale, run.layer, run.chunks[chunk].start, q, keys)
        if taken is not None:
            self._store_known(move, moving, slots, taken[0] or rest[0], keys, values)
            return out
        plan, nothing = self._plan, np.empty(0, dtype=np.int64)
        step = Step(
            plan.schedule,
            run.scale,
            run.layer,
            move.after,
            nothing,
            q,
            keys,
            bias,
            self._softmax_scale,
        )
        chosen = plan.policy.select(step)
        assert isinstance(chosen, Tensor)
        self._store_chosen(move, ids, slots, chosen, rest, keys, values)
        return out

    def _pages(self, is_quantised: bool) -> Pages:
        pages = self.pool.quantised if is_quantised else self.pool.exact
        assert pages is not None
        return pages

    def _gather(
        self, move: Move, stored: Pages, ids: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cached ++ fresh keys and values [rows, heads, cached + n, head_dim] in the workspace."""
        rows, heads, n, head_dim = k.shape
        cached, count = move.cached, move.cached + n
        places = count if move.is_quantised else max(count, ids.shape[2] * stored.page_size)
        keys, values = (
            part[: rows * heads * places * head_dim].view(rows, heads, places, head_dim)
            for part in self._workspace
        )
        stored.gather(ids, cached, keys, values)
        keys[:, :, cached:count] = k
        values[:, :, cached:count] = v
        return keys[:, :, :count], values[:, :, :count]

    def _store_known(
        self,
        move: Move,
        moving: Tensor,
        slots: Tensor,
        index: slice | Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Write the same places of all lanes: cached ones as they are stored, from slot to slot,
        and those that ``index`` names among keys and values.
        """
        pages, count = self._pages(move.becomes_quantised), moving.shape[2]
        for target, candidates in ((pages.keys, keys), (pages.values, values)):
            if count:
                write(target, slots[:, :, :count], read(target, moving))
            if slots.shape[2] > count:
                rows = _stored(pages, candidates, index, slots.shape[2] - count)
                write(target, slots[:, :, count:], rows)
                del rows  # K's go before V's come

    def _store_chosen(
        self,
        move: Move,
        ids: Tensor,
        slots: Tensor,
        chosen: Tensor,
        ragged: list[Tensor],
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Write the candidates ``chosen`` [rows, heads, m] from the start of each lane. Those that
        are quantised already are copied as they are.
        """
        pages, heads, places = self._pages(move.becomes_quantised), *ragged
        again = move.is_quantised
        if again:
            was_cached = (chosen < move.cached).unsqueeze(-1)
            place = chosen.clamp(max=move.cached - 1)
            old = ids.gather(2, place // pages.page_size)
            old.mul_(pages.page_size).add_(place.remainder_(pages.page_size))
        for target, candidates in ((pages.keys, keys), (pages.values, values)):
            rows = _stored(pages, candidates, chosen, chosen.shape[2])
            if again:
                rows = torch.where(was_cached, read(target, old), rows)
            if heads.numel():
                rows = rows[:, heads, places]
            write(target, slots, rows)
            del rows


def _taken(move: Move, first: int) -> tuple[slice | None, NDArray[np.int64]] | None:
    """Which of the tensors that begin with candidate ``first`` are written, beside those that
    move: a slice where they are neighbours, else numbers to upload. None if the policy chooses.
    """
    if move.kept is None:
        return None
    kept = move.kept[move.moving.shape[2] :] - first
    if kept.size and kept[-1] - kept[0] == kept.size - 1:
        return slice(int(kept[0]), int(kept[-1]) + 1), kept[:0]
    return None, kept


def _select(candidates: Tensor, index: slice | Tensor, part: slice) -> Tensor:
    """Candidates [rows, heads, m, head_dim] by a slice, or by numbers [m] or [rows, heads, m]; of
    those the ``part``.
    """
    if isinstance(index, slice):
        return candidates[:, :, index][:, :, part]
    if index.ndim == 1:
        return candidates[:, :, index[part]]
    index = index[:, :, part].unsqueeze(-1)
    return candidates.gather(2, index.expand(-1, -1, -1, candidates.shape[3]))


def _stored(pages: Pages, candidates: Tensor, index: slice | Tensor, count: int) -> Tensor:
    """The ``count`` candidates as pages store them, [rows, heads, count, width]; quantised a slice
    at a time, which bounds the scratch.
    """
    if pages.row is None:
        return _select(candidates, index, slice(None))
    shape = (*candidates.shape[:2], count, pages.keys.shape[2])
    rows = torch.empty(shape, dtype=pages.keys.dtype, device=candidates.device)
    for start in range(0, count, SLICE_TOKENS):
        part = slice(start, min(count, start + SLICE_TOKENS))
        rows[:, :, part] = quantize(_select(candidates, index, part), pages.row)
    return rows


def _hide_short_heads(lengths: Tensor, cached: int, keys: Tensor, values: Tensor) -> Tensor:
    """A bias [heads, 1, tokens] for heads that hold fewer than ``cached`` tokens.

    What the gather brought past their end is zeroed too: stale bits may be NaN, and 0 x NaN is NaN.
    """
    heads, count = keys.shape[1:3]
    place = torch.arange(count, device=keys.device)
    hidden = (place >= lengths[:heads].unsqueeze(1)) & (place < cached)  # [heads, tokens]
    for part in (keys, values):
        part.masked_fill_(hidden.unsqueeze(-1), 0.0)
    bias = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device)
    return bias.masked_fill_(hidden, -torch.inf).unsqueeze(1)
