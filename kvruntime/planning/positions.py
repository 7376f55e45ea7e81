"""What is known of a generation's tokens before it runs: which places are kept where the content
does not decide, and where they go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from policies import Candidates, Policy, Problem, Selection
from policies.scratch import lasting

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Shift:
    """A step that leaves most tokens where they are, alike in all lanes of a layer.

    sources: candidates that are written, ascending, the first ``moved`` of them cached; the rest
    are of the new scale. targets: the places of the lane that they go to.
    """

    sources: Places
    targets: Places
    moved: int

    @property
    def fresh_is_slice(self) -> bool:
        """Whether those of the new scale are neighbours."""
        fresh = self.sources[self.moved :]
        return fresh.size == 0 or int(fresh[-1] - fresh[0]) == fresh.size - 1


@dataclass(frozen=True, slots=True, eq=False)
class KnownStep:
    """What the host knows of a step.

    keep: kept candidates of each head, [heads, m], m the most that a head keeps, in the order in
        which they lie afterwards; a head that keeps fewer uses its first ones. None: the policy
        decides by content.
    shift: the same as a shift, where all lanes of the layer are alike and keep their format.
    on_device: what steps derive from it and send to the device.
    """

    keep: Places | None
    shift: Shift | None
    on_device: dict[tuple[object, ...], torch.Tensor] = field(default_factory=dict)

    def constant(
        self, device: torch.device, name: str, make: Callable[[], NDArray[Any]], *key: object
    ) -> torch.Tensor:
        """What ``make()`` gives, as a tensor on the device; copied there once."""
        place = (device, name, *key)
        if place not in self.on_device:
            self.on_device[place] = lasting(np.array(make()), device)
        return self.on_device[place]

    def written_pages(self, page_size: int) -> NDArray[np.bool_] | None:
        """Pages of a lane that a shift writes into, bool [1, pages]; None for all of them."""
        if self.shift is None or self.keep is None:
            return None
        written = np.zeros((1, -(-self.keep.shape[1] // page_size)), dtype=bool)
        written[0, self.shift.targets // page_size] = True
        return written


class Positions:
    """The known steps of a generation, each worked out once, in whatever order they are asked for.

    For policies without content it follows which token number lies where, [heads, tokens].
    """

    def __init__(
        self,
        policy: Policy,
        problem: Problem,
        tokens: Places,
        stage: Places,
    ) -> None:
        self._policy = policy
        self.problem = problem
        self._tokens = tokens
        self._stage = stage
        self._steps: dict[tuple[object, ...], tuple[KnownStep, Places]] = {}
        self._resolved: dict[tuple[int, int], tuple[KnownStep, Places]] = {}
        self._empty = torch.empty(0, device="cpu")

    def step(self, scale: int, layer: int) -> KnownStep:
        """What is known of this step. The first call of a policy costs one ``select``."""
        return self._resolve(scale, layer)[0]

    def _resolve(self, scale: int, layer: int) -> tuple[KnownStep, Places]:
        """The step, and the numbers of the tokens afterwards where the content does not decide."""
        if (scale, layer) in self._resolved:
            return self._resolved[scale, layer]
        after = self._tokens[scale, layer]
        before = self._tokens[scale - 1, layer] if scale else np.zeros_like(after)
        numbers = np.empty((1, 0), dtype=np.int64)
        if scale and not self._policy.needs.content:
            numbers = self._resolve(scale - 1, layer)[1]
        was = int(self._stage[scale - 1, layer]) if scale else 0
        becomes = int(self._stage[scale, layer])
        handed_over = becomes != was and bool(before.any())
        mine = layer if self._policy.needs.by_lane else None
        key = (scale, mine, before.tobytes(), after.tobytes(), was, becomes, numbers.tobytes())
        if key not in self._steps:  # layers that are alike share what is worked out
            self._steps[key] = self._work_out(scale, layer, before, after, handed_over, numbers)
        self._resolved[scale, layer] = self._steps[key]
        return self._steps[key]

    def _work_out(
        self,
        scale: int,
        layer: int,
        before: Places,
        after: Places,
        handed_over: bool,
        numbers: Places,
    ) -> tuple[KnownStep, Places]:
        schedule = self.problem.schedule
        start, end = schedule.span(scale)
        cached, fresh, most = int(before.max()), end - start, int(after.max())
        is_even = bool((before == cached).all() and (after == most).all())
        drops = bool((after < before + fresh).any())
        candidates = _with_fresh(numbers, start, end)
        if most == 0:
            return KnownStep(np.empty((after.size, 0), dtype=np.int64), None), numbers[:, :0]
        if not drops and not self._policy.needs.every_scale:
            keep = _append(before[:1] if is_even else before, fresh)
        elif self._policy.needs.content:
            return KnownStep(None, None), numbers
        else:
            keep = self._select(scale, layer, candidates, after, is_even)
        alike = bool((keep == keep[:1]).all()) and is_even
        shift = _shift(keep[0], cached) if alike and not handed_over else None
        if shift is not None:
            order = np.arange(most)
            order[shift.targets] = shift.sources
            keep = order[None]
        lines = np.broadcast_to(keep, (after.size, most))
        if self._policy.needs.content:
            return KnownStep(lines, shift), numbers
        padded = np.concatenate([candidates, np.full_like(candidates[:, :1], -1)], axis=1)
        which = np.minimum(keep, padded.shape[1] - 1)
        moved = np.take_along_axis(
            np.broadcast_to(padded, (max(len(padded), len(which)), padded.shape[1])),
            np.broadcast_to(which, (max(len(padded), len(which)), most)),
            axis=1,
        )
        return KnownStep(lines, shift), moved

    def _select(
        self,
        scale: int,
        layer: int,
        candidates: Places,
        after: Places,
        is_even: bool,
    ) -> Places:
        """The policy's choice by token numbers, checked: [heads, m], or [1, m] for all alike."""
        is_shared = is_even and len(candidates) == 1 and not self._policy.needs.by_lane
        heads = 1 if is_shared else after.size
        keep = after[:heads]
        positions = np.broadcast_to(candidates, (heads, candidates.shape[1]))
        empty = self._empty
        chosen = self._policy.select(
            Candidates(
                self.problem,
                scale,
                layer,
                keep.copy(),  # a policy may write into what it gets
                torch.from_numpy(positions.copy())[None],
                empty,
                empty,
                empty,
                None,
                1.0,
                {},
            )
        )
        places = checked_on_host(chosen, keep, positions, self._policy.name)
        return places


def checked_on_host(chosen: Selection, keep: Places, positions: Places, name: str) -> Places:
    """The kept places of a choice by token numbers, [heads, m]. Raises ValueError unless they are
    as promised: so many, ascending, distinct, of tokens that are there.
    """
    if not isinstance(chosen, Selection):
        raise ValueError(f"policy {name} must return a Selection, got {chosen!r}")
    wanted = (1, keep.size, int(keep.max()))
    if tuple(chosen.keep.shape) != wanted or chosen.keep.dtype != torch.int64:
        raise ValueError(
            f"policy {name} must keep int64 {wanted} places, got {chosen.keep.dtype} "
            f"{tuple(chosen.keep.shape)}"
        )
    if chosen.into is not None:
        raise ValueError(f"policy {name} folds, but looks at no content")
    places: Places = chosen.keep[0].cpu().numpy().copy()
    for head, count in enumerate(keep.tolist()):
        mine = places[head, :count]
        there = count == 0 or (mine.min() >= 0 and mine.max() < positions.shape[1])
        if not there or (np.diff(mine) <= 0).any() or (positions[head, mine] < 0).any():
            raise ValueError(
                f"policy {name} must keep {count} places of head {head}, ascending, distinct and "
                f"of tokens that are there, got {mine.tolist()[:20]}"
            )
        places[head, count:] = positions.shape[1]
    return places


def _append(before: Places, fresh: int) -> Places:
    """Places of everything: each head's own cached tokens, then the new scale, [heads, m]."""
    cached = int(before.max())
    place = np.arange(cached + fresh)
    mine = np.where(place < before[:, None], place, place - before[:, None] + cached)
    return np.where(place < before[:, None] + fresh, mine, cached + fresh)


def _with_fresh(numbers: Places, start: int, end: int) -> Places:
    """Token numbers of all candidates, [1 or heads, cached + fresh]."""
    fresh = np.broadcast_to(np.arange(start, end), (len(numbers), end - start))
    return np.concatenate([numbers, fresh], axis=1)


def _shift(keep: Places, cached: int) -> Shift:
    """Kept places that lie within the new length stay; the others fill the holes."""
    kept = keep[keep < min(keep.size, cached)]
    sources = np.setdiff1d(keep, kept)
    is_hole = np.ones(keep.size, dtype=bool)
    is_hole[kept] = False
    return Shift(sources, np.flatnonzero(is_hole), int(np.searchsorted(sources, cached)))
