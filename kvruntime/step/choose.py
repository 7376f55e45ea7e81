"""Select: what the policy keeps, checked before anything is done with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvruntime.planning.demand import Plan
from kvruntime.step.prepare import Prepared
from kvruntime.step.read import Held
from policies import Candidates, Lengths, Selection
from policies.base import Attending, Seen
from policies.scoring import beyond, take


def choose(plan: Plan, step: Prepared, held: Held, q: Tensor, softmax_scale: float) -> Selection:
    """The policy's selection, in the workspace's own tensors, heads that keep fewer padded with
    the number of candidates. Raises ValueError for one that is not as promised.
    """
    shape, base = step.shape, step.views.base
    selection = plan.policy.select(_candidates(plan, step, held, q, softmax_scale, step.after))
    name, count = plan.policy.name, shape.candidates
    if not isinstance(selection, Selection):
        raise ValueError(f"policy {name} must return a Selection, got {selection!r}")
    wanted = (shape.rows, shape.heads, shape.kept)
    _check_tensor(name, "keep", selection.keep, wanted, torch.int64)
    keep = base["chosen"].copy_(selection.keep)
    if not shape.is_even:
        keep.masked_fill_(beyond(tuple(step.after.tolist()), keep.device), count)
    into = None
    if selection.into is not None and not plan.policy.needs.folds:
        raise ValueError(f"policy {name} folds: its needs must say so")
    if selection.into is not None:
        _check_tensor(name, "into", selection.into, (*wanted[:2], count), torch.int64)
        into = base["into"].copy_(selection.into)
    elif plan.policy.needs.folds:
        raise ValueError(f"policy {name} folds and must say what it folds into what")
    _check_places(name, step, keep, into)
    if selection.scores is not None:
        if "score" not in shape.planes or held.planes is None:
            raise ValueError(f"policy {name} gives scores: its needs must name the plane score")
        _check_tensor(name, "scores", selection.scores, (*wanted[:2], count), None)
        held.planes[..., shape.planes.index("score")] = selection.scores
    if (selection.seen is None) == bool(shape.fitted):
        raise ValueError(f"policy {name}: seen goes with the refit of its needs")
    if selection.seen is not None:
        _check_seen(name, step, selection.seen)
    return Selection(keep, into, seen=selection.seen)


def _check_seen(name: str, step: Prepared, seen: Seen) -> None:
    shape = step.shape
    lanes = shape.rows * shape.heads
    for part, sizes in (
        ("queries", (shape.fitted, shape.head_dim)),
        ("normaliser", (shape.fitted, 1)),
        ("outputs", (shape.fitted, shape.head_dim)),
        ("received", (shape.candidates,)),
    ):
        _check_tensor(name, f"seen.{part}", getattr(seen, part), (lanes, *sizes), torch.float32)


def choose_attended(
    plan: Plan, step: Prepared, held: Held, q: Tensor, softmax_scale: float
) -> Held:
    """The candidates that the queries attend to, where the policy says which. Raises ValueError
    for anything but as many places as are asked for.
    """
    policy, shape, base = plan.policy, step.shape, step.views.base
    if not isinstance(policy, Attending):
        raise ValueError(f"policy {policy.name} attends to some candidates: it needs attend_to")
    counts = np.minimum(shape.attended, step.before + shape.fresh)
    places = policy.attend_to(_candidates(plan, step, held, q, softmax_scale, counts))
    wanted = (shape.rows, shape.heads, shape.attended)
    _check_tensor(policy.name, "attended places", places, wanted, torch.int64)
    places = base["attended"].copy_(places)
    log_weights = base["attended_weights"].zero_()
    unused = None
    if counts.min() < shape.attended:
        unused = beyond(tuple(counts.tolist()), places.device)
        places.masked_fill_(unused, 0)
    if held.log_weights is not None:
        every = held.log_weights.expand(shape.rows, -1, -1, -1)
        torch.gather(every, 3, places.unsqueeze(2), out=log_weights)
    if unused is not None:
        log_weights.squeeze(2).masked_fill_(unused, -torch.inf)
    by_lane, keys, values = places.flatten(0, 1), base["attended_keys"], base["attended_values"]
    for tokens, out in ((held.keys, keys), (held.values, values)):
        take(tokens.flatten(0, 1), by_lane, out.flatten(0, 1))
    return Held(keys, values, log_weights)


def _candidates(
    plan: Plan, step: Prepared, held: Held, q: Tensor, softmax_scale: float, keep: Lengths
) -> Candidates:
    return Candidates(
        plan.positions.problem,
        step.scale,
        step.layer,
        keep.copy(),  # a policy may write into what it gets
        torch.empty(0, dtype=torch.int64, device="cpu"),
        q,
        held.keys,
        held.values,
        held.log_weights,
        softmax_scale,
        step.views.select | step.views.kept,
        _planes(step, held),
    )


def _planes(step: Prepared, held: Held) -> dict[str, Tensor]:
    if held.planes is None:
        return {}
    return {name: held.planes[..., place] for place, name in enumerate(step.shape.planes)}


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
