"""Select: what the policy keeps, checked before anything is done with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvruntime.planning.demand import Plan
from kvruntime.step.prepare import Prepared
from kvruntime.step.read import Held
from policies import Candidates, Selection
from policies.scoring import beyond


def choose(plan: Plan, step: Prepared, held: Held, q: Tensor, softmax_scale: float) -> Selection:
    """The policy's selection, in the workspace's own tensors, heads that keep fewer padded with
    the number of candidates. Raises ValueError for one that is not as promised.
    """
    shape, base = step.shape, step.views.base
    candidates = Candidates(
        plan.schedule,
        step.scale,
        step.layer,
        step.after.copy(),  # a policy may write into what it gets
        torch.empty(0, dtype=torch.int64, device="cpu"),
        q,
        held.keys,
        held.values,
        held.log_weights,
        softmax_scale,
        step.views.select,
    )
    selection = plan.policy.select(candidates)
    name, count = plan.policy.name, shape.candidates
    if not isinstance(selection, Selection):
        raise ValueError(f"policy {name} must return a Selection, got {selection!r}")
    wanted = (shape.rows, shape.heads, shape.kept)
    _check_tensor(name, "keep", selection.keep, wanted, torch.int64)
    keep = base["chosen"].copy_(selection.keep)
    if not shape.is_even:
        keep.masked_fill_(beyond(tuple(step.after.tolist()), keep.device), count)
    into = None
    if selection.into is not None and not plan.policy.needs.weights:
        raise ValueError(f"policy {name} folds: its needs must name weights")
    if selection.into is not None:
        _check_tensor(name, "into", selection.into, (*wanted[:2], count), torch.int64)
        into = base["into"].copy_(selection.into)
        if selection.values is not None:
            shape4 = (*wanted, shape.head_dim)
            _check_tensor(name, "values", selection.values, shape4, None)
        if selection.log_weights is not None:
            _check_tensor(name, "log_weights", selection.log_weights, wanted, torch.float32)
    elif plan.policy.needs.weights:
        raise ValueError(f"policy {name} has weights and must say what it folds into what")
    elif selection.values is not None or selection.log_weights is not None:
        raise ValueError(f"policy {name} fits values or weights: its needs must name weights")
    _check_places(name, step, keep, into)
    return Selection(keep, into, selection.values, selection.log_weights)


def _check_tensor(
    name: str, what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None
) -> None:
    given, fits = type(tensor).__name__, False
    if isinstance(tensor, Tensor):
        given = f"{tensor.dtype} {tuple(tensor.shape)}"
        is_right = tensor.dtype == dtype if dtype else tensor.is_floating_point()
        fits = is_right and tuple(tensor.shape) == shape
    if not fits:
        raise ValueError(
            f"policy {name}: {what} must be {dtype or 'floating'} {shape}, got {given}"
        )


def _check_places(name: str, step: Prepared, keep: Tensor, into: Tensor | None) -> None:
    """Ascending, distinct, in range and of tokens that are there; what is folded names a kept
    place, and a kept one itself. On a GPU the device checks, and the host does not wait.
    """
    count, shape = step.shape.candidates, step.shape
    if keep.device.type not in ("cpu", "cuda"):
        return
    ascends = keep[..., 1:] > keep[..., :-1]
    if not shape.is_even:
        ascends |= keep[..., 1:] == count
    least, most = keep.aminmax()
    facts = {
        "ascending and distinct": ascends.all(),
        "in range": (least >= 0) & (most < count + (not shape.is_even)),
    }
    if shape.cached and shape.is_ragged:
        gone = step.known.constant(
            keep.device,
            "gone",
            lambda: np.pad(
                np.arange(shape.cached) >= step.before[:, None], ((0, 0), (0, shape.fresh + 1))
            ),
        )
        there = ~gone.expand(shape.rows, -1, -1).gather(2, keep.clamp(0, count))
        facts["of tokens that are there"] = there.all()
    if into is not None:
        facts["folded into kept places"] = (into.amin() >= -1) & (into.amax() < shape.kept)
        itself = into.gather(2, keep.clamp(0, count - 1))
        number = torch.arange(shape.kept, device=keep.device)
        facts["folded into themselves"] = ((itself == number) | (keep == count)).all()
    for what, holds in facts.items():
        if keep.device.type == "cuda":
            torch._assert_async(holds)
        elif not holds:
            raise ValueError(
                f"policy {name} must keep {step.after.tolist()} places, ascending, distinct and in "
                f"0..{count - 1}: those of scale {step.scale}, layer {step.layer} are not {what}"
            )
