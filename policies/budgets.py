"""Arithmetic of budgets that policies share, and what every allocation must keep to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from policies.base import Allocation, Problem
from policies.schedule import Lengths


def uniform(problem: Problem, tokens: NDArray[np.int64]) -> Lengths:
    """Lengths [scales, layers, heads] from [scales, layers] tokens: the same for all heads, last
    scale 0.
    """
    lengths = np.repeat(tokens[:, :, None], problem.geometry.heads, axis=2).astype(np.int64)
    lengths[-1] = 0
    return lengths


def capped(problem: Problem) -> Allocation:
    """Every lane holds ``budget_tokens`` once that many have been seen. Raises ValueError for a
    budget of no tokens.
    """
    if problem.budget_tokens <= 0:
        raise ValueError(
            f"a budget of {problem.budget_tokens} tokens of {problem.schedule.history} of history "
            "keeps none"
        )
    seen = np.minimum(np.array(problem.schedule.seen), problem.budget_tokens)[:, None]
    return Allocation(uniform(problem, np.repeat(seen, problem.geometry.layers, axis=1)))


def check_allocation(allocation: Allocation, problem: Problem) -> None:
    """Raise ValueError unless ``allocation`` keeps what its docstring says."""
    geometry, schedule = problem.geometry, problem.schedule
    tokens, quantised = allocation.tokens, allocation.quantised
    shape = (len(schedule), geometry.layers, geometry.heads)
    if tokens.shape != shape or tokens.dtype != np.int64:
        raise ValueError(f"tokens must be int64 {shape}, got {tokens.dtype} {tokens.shape}")
    before = np.concatenate([np.zeros_like(tokens[:1]), tokens[:-1]])
    room = before + np.array(schedule.tokens)[:, None, None]
    if (tokens < 0).any() or tokens[-1].any() or (tokens > room).any():
        raise ValueError("a lane keeps fewer than none, more than it has, or some after the last")
    attended = allocation.attended
    if attended is not None and (
        attended.shape != shape[:1] or attended.dtype != np.int64 or (attended <= 0).any()
    ):
        raise ValueError(f"attended must be positive int64 {shape[:1]}, got {attended}")
    if quantised is None:
        return
    if quantised.shape != shape[:2] or quantised.dtype != np.bool_:
        raise ValueError(
            f"quantised must be bool {shape[:2]}, got {quantised.dtype} {quantised.shape}"
        )
    if (quantised[:-1] & ~quantised[1:]).any():
        raise ValueError("quantised tokens cannot become exact again")


def proportional(
    weights: NDArray[np.float64], room: NDArray[np.int64], total: int
) -> NDArray[np.int64]:
    """Tokens of each lane in proportion to its weight, none above its room; what some have no room
    for the others get. They sum to ``total``, less what rounding down loses (below one a lane), or
    fill all the room there is.
    """
    tokens, left = np.zeros_like(room), float(total)
    is_open = np.ones(room.shape, dtype=bool)
    weights = np.maximum(weights, 1e-12)
    while is_open.any():
        each = left * weights / weights[is_open].sum()
        is_full = is_open & (each >= room)
        if not is_full.any():
            tokens[is_open] = np.floor(each[is_open] + 1e-9).astype(np.int64)
            break
        tokens[is_full] = room[is_full]
        left -= float(room[is_full].sum())
        is_open &= ~is_full
    return tokens


def split_budget(
    room: NDArray[np.int64], drafters: frozenset[int], budget: int, floor: int
) -> NDArray[np.int64]:
    """Tokens per layer, [layers]: mean ``budget``, drafters as much as they can hold, refiners
    alike.

    room: what each layer holds before it drops anything. The drafters' share is the largest one
    that leaves the refiners a whole number of tokens, not below ``floor`` (this regenerates the
    budgets that ScaleKV publishes).
    """
    layers = room.size
    refiners = layers - len(drafters)
    if not drafters or not refiners:
        return np.minimum(room, budget)
    limits = [int(room[layer]) for layer in drafters]
    most, rest = budget, budget * refiners
    for most in range(max(limits), budget - 1, -1):
        rest = budget * layers - sum(min(limit, most) for limit in limits)
        if rest >= floor * refiners and rest % refiners == 0:
            break
    tokens = np.full(layers, rest // refiners, dtype=np.int64)
    tokens[list(drafters)] = most
    return np.minimum(tokens, room)
