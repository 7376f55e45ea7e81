"""Refit: folded tokens are given the log weights and values under which queries of the scale see
what they saw before.

Keys are the means as they will be read back. After Attention Matching (arXiv 2602.16284), but for
the solver: the ridge is solved for queries or for centroids, whichever are fewer.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvruntime.step.prepare import Prepared
from policies.base import Seen

RIDGE = 0.03  # of the mean squared attention that a centroid gets from all queries
ROUNDS = 2  # of fitting log weights
_LEAST = 1e-30  # mass, whose logarithm is still finite


def masses(step: Prepared, seen: Seen) -> Tensor:
    """Attention that the members of each centroid get from all queries, [lanes, kept]. "targets"
    must say where each candidate goes, "shares" be zero for those that go nowhere. Spoils
    ``seen.received``.
    """
    scratch = step.views.commit
    received = seen.received.masked_fill_(scratch["shares"] == 0, 0.0)
    sums = scratch["masses"].zero_()
    sums.view(-1).index_add_(0, scratch["targets"].view(-1), received.view(-1))
    return sums.clamp_(min=_LEAST)


def refit(step: Prepared, seen: Seen, keys: Tensor, log_weights: Tensor, values: Tensor) -> None:
    """Change log_weights [lanes, kept] and values [lanes, kept, head_dim] in place.

    First, ROUNDS times, each log weight moves by what the centroid's members got over what it gets
    under their normaliser, by 1 in all at most. Then values move, as little as a ridge lets them,
    to where the queries' outputs are as before. A log weight of -inf stays.
    """
    scratch, members = step.views.commit, masses(step, seen)
    logits, weights = scratch["logits_kept"], scratch["attention_kept"]
    torch.bmm(seen.queries, keys.transpose(1, 2), out=logits)
    relative = torch.sub(logits, seen.normaliser, out=weights).exp_()
    moved, got, factor = scratch["moved"].zero_(), scratch["got"], scratch["factor"]
    for _ in range(ROUNDS):
        torch.add(log_weights, moved, out=factor).exp_()
        torch.sum(relative, dim=1, out=got).mul_(factor).clamp_(min=_LEAST)
        moved.add_(torch.div(members, got, out=factor).log_()).clamp_(-1.0, 1.0)
    log_weights.add_(moved)
    logits.add_(log_weights.unsqueeze(1))
    torch.softmax(logits, dim=-1, out=weights)
    gap = torch.baddbmm(seen.outputs, weights, values, alpha=-1.0, out=scratch["gap"])
    if step.shape.fitted <= step.shape.kept:
        values.baddbmm_(weights.transpose(1, 2), _ridge(step, weights, gap, gap))
    else:
        turned = weights.transpose(1, 2)
        right = torch.bmm(turned, gap, out=scratch["right"])
        values.add_(_ridge(step, turned, right, right))


def _ridge(step: Prepared, weights: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """(W W^T + ridge)^-1 ``right`` into ``out``, for W [lanes, n, m] with n <= m or n centroids."""
    scratch = step.views.commit
    gram = torch.bmm(weights, weights.transpose(1, 2), out=scratch["gram"])
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal.sum(dim=1, keepdim=True).mul_(_ridge_shares(step, gram.device)))
    lower = scratch["triangle"].transpose(1, 2)  # else LAPACK's result is copied
    torch.linalg.cholesky_ex(gram, out=(lower, scratch["status"]))
    half = torch.linalg.solve_triangular(lower, right, upper=False, out=scratch["solved"])
    torch.linalg.solve_triangular(lower.transpose(1, 2), half, upper=True, out=out)
    return out


def _ridge_shares(step: Prepared, device: torch.device) -> Tensor:
    """RIDGE over the centroids of each lane, [lanes, 1]."""

    def shares() -> NDArray[np.float32]:
        each = RIDGE / np.maximum(step.after, 1)
        return np.tile(each.astype(np.float32), step.shape.rows)[:, None]

    return step.known.constant(device, "ridge", shares, step.shape.rows)
