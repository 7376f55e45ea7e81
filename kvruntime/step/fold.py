"""Fold: kept tokens become the means of what is folded into them, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from kvruntime.step.commit import Write, pack_plane, used, write_numbers, write_planes
from kvruntime.step.encode import read_back
from kvruntime.step.prepare import Prepared
from kvruntime.step.read import Held
from kvruntime.step.refit import refit
from kvruntime.storage.coding import KEYS, VALUES
from kvruntime.storage.pages import Pages
from policies import Selection
from policies.scoring import BLOCK
from policies.scratch import part_of

_LEAST = 1e-30  # weight of a place that no head uses


def fold(step: Prepared, held: Held, selection: Selection) -> Write:
    """Means of keys and of values weighted by how many tokens each candidate stands for, and the
    logarithms of the sums of weights; fitted, if the policy wants that, to what queries see.
    """
    shape, commits = step.shape, step.views.commit
    into, seen = selection.into, selection.seen
    assert into is not None
    _weigh(step, held, into)

    def write_kept(pages: Pages, slots: Tensor) -> None:
        means, log_weights = _means(step, held.keys), commits["log_counts"]
        numbers = _used_only(step, means)
        write_numbers(step, KEYS, pages, slots, numbers)
        keys = _as_stored(step, numbers) if seen else None
        values = _means(step, held.values)
        if seen is not None and keys is not None:
            refit(step, seen, keys, log_weights, values)
        write_numbers(step, VALUES, pages, slots, _used_only(step, values))
        if shape.planes:
            _pack_planes(step, held, log_weights)
            write_planes(step, pages)

    return write_kept


def _weigh(step: Prepared, held: Held, into: Tensor) -> None:
    """How much each candidate weighs, and where it goes: "shares" and "targets"; the weights of
    what is kept, their sums: "counts", and "log_counts", -inf for a place that no head uses.
    """
    shape, commits = step.shape, step.views.commit
    shares = commits["shares"].view(shape.rows, shape.heads, shape.candidates)
    if held.log_weights is None:
        shares.fill_(1.0)
    else:
        torch.exp(held.log_weights.squeeze(2).expand_as(shares), out=shares)
    targets = commits["targets"].view_as(into)
    torch.clamp(into, min=0, out=targets)
    starts = torch.arange(shape.rows * shape.heads, device=into.device).mul_(shape.kept)
    targets.add_(starts.view(shape.rows, shape.heads, 1))
    shares.masked_fill_(into < 0, 0.0)
    counts = commits["counts"].zero_()
    counts.view(-1).index_add_(0, targets.view(-1), shares.view(-1))
    torch.log(counts, out=commits["log_counts"])
    counts.clamp_(min=_LEAST)


def _pack_planes(step: Prepared, held: Held, log_weights: Tensor) -> None:
    """Log weights as they are, other planes as weighted means."""
    commits = step.views.commit
    assert held.planes is not None
    for place, plane in enumerate(step.shape.planes):
        if plane == "log_weight":
            pack_plane(step, plane, log_weights)
            continue
        weighed, sums = commits["weighed"], commits["plane_sums"].zero_()
        weighed.copy_(held.planes[..., place].flatten(0, 1)).mul_(commits["shares"])
        sums.view(-1).index_add_(0, commits["targets"].view(-1), weighed.view(-1))
        pack_plane(step, plane, sums.div_(commits["counts"]))


def _means(step: Prepared, tokens: Tensor) -> Tensor:
    """Weighted means [lanes, kept, head_dim] of tokens [rows, heads, candidates, head_dim], which
    are spoilt where they can be weighted in place.
    """
    commits, shape = step.views.commit, step.shape
    lanes, dim, shares = shape.rows * shape.heads, shape.head_dim, commits["shares"]
    sums, by_lane = commits["sums"].zero_(), tokens.flatten(0, 1)
    flat, all_targets = sums.view(-1, dim), commits["targets"]
    if shape.weighs_in_place:
        by_lane.mul_(shares.unsqueeze(-1))
        flat.index_add_(0, all_targets.view(-1), by_lane.view(-1, dim))
        return sums.div_(commits["counts"].unsqueeze(-1))
    for start in range(0, shape.candidates, BLOCK):
        end = min(start + BLOCK, shape.candidates)
        block = part_of(commits["block"], lanes, end - start, dim)
        block.copy_(by_lane[:, start:end]).mul_(shares[:, start:end].unsqueeze(-1))
        targets = all_targets[:, start:end].reshape(-1)
        flat.index_add_(0, targets, block.view(-1, dim))
    return sums.div_(commits["counts"].unsqueeze(-1))


def _as_stored(step: Prepared, numbers: Tensor) -> Tensor:
    """What ``write_numbers`` has just written, as it will be read back: [lanes, kept, head_dim],
    zero in places that no head uses.
    """
    shape, commits = step.shape, step.views.commit
    if shape.writes is not None:
        read_back(step, KEYS, commits["read_back"].view_as(numbers))
        if shape.dtype != "float32":
            commits["read_back"].copy_(commits["rounded"].copy_(commits["read_back"]))
    elif shape.dtype != "float32":
        commits["read_back"].copy_(commits["staged"])
    if shape.writes is not None or shape.dtype != "float32":
        numbers = commits["read_back"].view_as(numbers)
    keys = commits["kept_keys"]
    if shape.is_even:
        return keys.copy_(numbers.view_as(keys))
    by_row = keys.zero_().view(shape.rows, -1, shape.head_dim)
    by_row.index_copy_(1, used(step, keys.device), numbers)
    return keys


def _used_only(step: Prepared, means: Tensor) -> Tensor:
    """Means of the places that are used, [rows, written, head_dim]."""
    shape, commits = step.shape, step.views.commit
    by_row = means.view(shape.rows, -1, shape.head_dim)
    if shape.is_even:
        return by_row
    packed = commits["packed"].view(shape.rows, shape.written, shape.head_dim)
    torch.index_select(by_row, 1, used(step, means.device), out=packed)
    return packed
