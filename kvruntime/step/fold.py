"""Fold: kept tokens become the means of what is folded into them, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from kvruntime.planning.regions import FOLD_TOKENS
from kvruntime.step.commit import Write, pack_weights, used, write_numbers, write_weights
from kvruntime.step.prepare import Prepared
from kvruntime.step.read import Held
from kvruntime.storage.pages import Pages
from policies import Selection
from policies.scratch import part_of


def fold(step: Prepared, held: Held, selection: Selection) -> Write:
    """Means of keys and of values weighted by how many tokens each candidate stands for, and the
    logarithms of the sums of weights; or the values and log weights that the policy fitted.
    """
    shape, commits = step.shape, step.views.commit
    lanes = shape.rows * shape.heads
    into = selection.into
    assert into is not None
    shares = commits["shares"].view(shape.rows, shape.heads, shape.candidates)
    if held.log_weights is None:
        shares.fill_(1.0)
    else:
        torch.exp(held.log_weights.squeeze(2).expand_as(shares), out=shares)
    targets = commits["targets"].view_as(into)
    torch.clamp(into, min=0, out=targets)
    starts = torch.arange(lanes, device=into.device).mul_(shape.kept)
    targets.add_(starts.view(shape.rows, shape.heads, 1))
    shares.masked_fill_(into < 0, 0.0)
    counts = commits["counts"].zero_()
    counts.view(-1).index_add_(0, targets.view(-1), shares.view(-1))
    log_weights = selection.log_weights
    if log_weights is None:
        log_weights = torch.log(counts, out=commits["log_counts"])
    pack_weights(step, log_weights.view(shape.rows, shape.heads, shape.kept))

    def write_kept(pages: Pages, slots: Tensor) -> None:
        means = _means(step, held.keys)
        write_numbers(step, pages.keys, slots, _used_only(step, means))
        if selection.values is None:
            means = _means(step, held.values)
        else:
            means = commits["sums"].copy_(selection.values.flatten(0, 1))
        write_numbers(step, pages.values, slots, _used_only(step, means))
        write_weights(step, pages)

    return write_kept


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
    for start in range(0, shape.candidates, FOLD_TOKENS):
        end = min(start + FOLD_TOKENS, shape.candidates)
        block = part_of(commits["block"], lanes, end - start, dim)
        block.copy_(by_lane[:, start:end]).mul_(shares[:, start:end].unsqueeze(-1))
        targets = all_targets[:, start:end].reshape(-1)
        flat.index_add_(0, targets, block.view(-1, dim))
    return sums.div_(commits["counts"].unsqueeze(-1))


def _used_only(step: Prepared, means: Tensor) -> Tensor:
    """Means of the places that are used, [rows, written, head_dim]."""
    shape, commits = step.shape, step.views.commit
    by_row = means.view(shape.rows, -1, shape.head_dim)
    if shape.is_even:
        return by_row
    packed = commits["packed"].view(shape.rows, shape.written, shape.head_dim)
    torch.index_select(by_row, 1, used(step, means.device), out=packed)
    return packed
