"""Policies and oracles that tests share."""

import os
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from hypothesis import strategies as st

from policies import (
    AMSKV,
    H2O,
    POLICY_NAMES,
    Allocation,
    Centroid,
    Needs,
    ScaleKV,
    ScaleSchedule,
    Selection,
    SnapKV,
    make_policy,
)
from policies.heatkv import heatkv_from
from policies.recency import highest
from policies.scoring import evenly_spread, look, pick_queries, seen_scratch
from tests.profiles import profile_of

DEVICE = os.environ.get("KVRUNTIME_TEST_DEVICE", "cpu")
"""Where generations of property tests run; what they are compared with is computed on the CPU."""

sizes = st.one_of(
    st.integers(1, 4),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
)
schedules = st.one_of(  # short ones by themselves: most of hypothesis' lists would be
    st.lists(sizes, min_size=1, max_size=2), st.lists(sizes, min_size=3, max_size=6)
).map(ScaleSchedule.of)


NEED_PROFILES = ("hackpp", "heatkv", "centroid_by_head")
PLAIN_POLICIES = tuple(name for name in POLICY_NAMES if name not in NEED_PROFILES)
"""Those that need no profile."""


@dataclass(frozen=True)
class RandomPolicy:
    """Keeps any number of any tokens, as the contract of policies allows. Without queries it
    chooses by token number; with them each row for itself, and adds up scores in some seeds.
    ``is_ragged`` heads keep different numbers, sometimes none. In every third seed all layers keep
    as many; every other one says by itself when each layer is quantised.
    """

    seed: int
    num_queries: int = 1
    is_ragged: bool = True
    name: str = "random"

    @property
    def needs(self):
        adds_up = self.num_queries and self.seed % 5 < 2
        return Needs(content=bool(self.num_queries), planes=("score",) if adds_up else ())

    def allocate(self, problem):
        rng = np.random.default_rng(self.seed)
        scales, geometry = len(problem.schedule), problem.geometry
        tokens = np.zeros((scales, geometry.layers, geometry.heads), dtype=np.int64)
        layers, heads = geometry.layers if self.seed % 3 else 1, geometry.heads
        held = np.zeros((layers, heads if self.is_ragged else 1), dtype=np.int64)
        for scale, fresh in enumerate(problem.schedule.tokens[:-1]):
            room, luck = held + fresh, rng.random(held.shape)
            held = np.where(luck < 0.2, room, rng.integers(0, room + 1)) * (luck < 0.9)
            tokens[scale] = held
        starts = rng.integers(0, scales + 1, geometry.layers)
        quantised = np.arange(scales)[:, None] >= starts
        return Allocation(tokens, quantised if self.seed % 2 else None)

    def scratch(self, sizes):
        return []

    def select(self, candidates):
        seed = self.seed + candidates.scale * 100
        if self.num_queries:
            keep = random_places(candidates, seed + candidates.layer).to(candidates.keys.device)
            return Selection(keep, scores=self._scores(candidates, seed))
        positions = candidates.positions
        numbers = np.random.default_rng(seed).random(
            (positions.shape[1], candidates.schedule.total)
        )
        ranks = torch.from_numpy(numbers).gather(1, positions[0].clamp(min=0))[None]
        return highest(ranks.masked_fill(positions < 0, -1.0), candidates.keep)

    def _scores(self, candidates, seed):
        """A random number more for each candidate; in some seeds nothing."""
        if "score" not in self.needs.planes or self.seed % 3 == 0:
            return None
        old = candidates.planes["score"].float()
        more = torch.rand(old.shape, generator=torch.Generator().manual_seed(seed))
        return old + more.to(old.device)


def random_places(candidates, seed):
    """Any places that are there, [rows, heads, m]; nonsense where a head keeps fewer."""
    rows, heads, count, _ = candidates.keys.shape
    scores = torch.rand(rows, heads, count, generator=torch.Generator().manual_seed(seed))
    if candidates.log_weights is not None:
        scores.masked_fill_(candidates.log_weights[:, :, 0].cpu().isneginf(), -1.0)
    keep = torch.from_numpy(candidates.keep)[:, None]
    most = int(keep.max())
    best = scores.topk(most, dim=-1).indices
    unused = torch.arange(most) >= keep  # [heads, m]
    return best.masked_fill(unused, 10**6).sort(dim=-1).values.masked_fill(unused, -7)


@dataclass(frozen=True)
class RandomFold(RandomPolicy):
    """The same, and what is not kept is folded into any kept token or dropped. Some seeds without
    log weights, some fitted to queries, some with scores and origins.
    """

    name: str = "random fold"

    def scratch(self, sizes):
        refit = min(self.needs.refit, sizes.fresh)
        return seen_scratch(sizes, refit) if refit else []

    @property
    def needs(self):
        planes = ("log_weight",) if self.seed % 4 else ()
        planes += ("score", "line") if self.seed % 5 < 2 else ()
        refit = (0, 0, 1, 5)[self.seed % 4]
        return Needs(content=True, folds=True, planes=planes, refit=refit)

    def select(self, candidates):
        seed = self.seed + candidates.scale * 100 + candidates.layer
        keep = random_places(candidates, seed)
        generator = torch.Generator().manual_seed(seed + 50)
        rows, heads, count, _ = candidates.keys.shape
        held = torch.from_numpy(candidates.keep)[:, None]
        luck = torch.rand(rows, heads, count, generator=generator)
        into = (luck * (held + 1)).long().clamp(max=held) - 1
        for head, kept in enumerate(candidates.keep.tolist()):
            number = torch.arange(kept).expand(rows, kept)
            into[:, head].scatter_(1, keep[:, head, :kept], number)
        scores, seen, device = self._scores(candidates, seed), None, candidates.keys.device
        if self.needs.refit:
            fresh = candidates.queries.shape[1]
            which = evenly_spread(min(self.needs.refit, fresh), fresh, device)
            window = pick_queries(candidates.queries, which, candidates.scratch)
            seen = look(candidates, window.mul_(candidates.softmax_scale))
        return Selection(keep.to(device), into.to(device), scores, seen)


def own(tensor):
    """A copy on the CPU."""
    return tensor.to("cpu", copy=True)


@dataclass(frozen=True)
class Choice:
    """A recorded call of ``select``, with tensors of its own."""

    scale: int
    keep: np.ndarray
    positions: np.ndarray  # [1, heads, candidates]; empty for policies that look at the content
    cached: int
    selection: Selection
    seen_by: torch.Tensor | None


@dataclass(frozen=True)
class Spy:
    """Any policy, with its choices written down: by content, those since ``chosen`` was cleared,
    and what its queries attended to since ``attended`` was; by token number, all of them, since
    each is made once for all layers that are alike.
    """

    inner: object
    chosen: list = field(default_factory=list)
    known: list = field(default_factory=list)
    attended: list = field(default_factory=list)

    @property
    def name(self):
        return self.inner.name

    @property
    def needs(self):
        return self.inner.needs

    def allocate(self, problem):
        return self.inner.allocate(problem)

    def scratch(self, sizes):
        return self.inner.scratch(sizes)

    def attend_to(self, candidates):
        places = self.inner.attend_to(candidates)
        self.attended.append((candidates.keep.copy(), own(places)))
        return places

    def select(self, candidates):
        selection = self.inner.select(candidates)
        parts = (selection.keep, selection.into, selection.scores)
        by_content = self.needs.content
        choice = Choice(
            candidates.scale,
            candidates.keep.copy(),
            candidates.positions.numpy().copy(),
            candidates.cached if by_content else 0,
            Selection(*(None if part is None else own(part) for part in parts)),
            None if selection.seen is None else own(selection.seen.queries),
        )
        (self.chosen if by_content else self.known).append(choice)
        return selection


@st.composite
def policies(draw, layers, heads, schedule):
    """A policy, its roles drawn at random where it has any."""
    some_layers = st.frozensets(st.integers(0, layers - 1), max_size=layers)
    kinds = [*POLICY_NAMES, "roles", "demanding", "any", "any", "any", "fold", "fold"]
    kind = draw(st.sampled_from(kinds))
    if kind == "any":
        return RandomPolicy(
            draw(st.integers(0, 1000)), draw(st.integers(0, 1)), draw(st.booleans())
        )
    if kind == "fold":
        return RandomFold(draw(st.integers(0, 1000)), is_ragged=draw(st.booleans()))
    if kind == "roles":
        roles = tuple(draw(st.lists(some_layers, min_size=1, max_size=6)))
        return ScaleKV(roles, grid=draw(st.integers(1, 2)), pool=draw(st.sampled_from([1, 3])))
    if kind == "demanding":
        return AMSKV(
            draw(some_layers), draw(st.floats(0.1, 1.0)), condensed=draw(st.integers(1, 2))
        )
    if kind == "centroid":
        share = draw(st.sampled_from([0.3, 0.75, 1.0]))
        some = draw(st.sampled_from([1, 3, 64]))
        return Centroid(some, share, draw(st.booleans()))
    if kind == "h2o":
        return H2O(draw(st.sampled_from([0.0, 0.5])))
    if kind == "snapkv":
        return SnapKV(draw(st.integers(1, 4)), draw(st.sampled_from([1, 5])))
    if kind in ("hack", *NEED_PROFILES):
        profile = profile_of(schedule, layers, heads, draw(st.integers(0, 9)))
        if kind == "heatkv":
            return heatkv_from(profile, draw(st.integers(1, 3)), draw(st.booleans()))
        policy = make_policy(kind, profile)
        ratio = draw(st.sampled_from([1.0, 1.5, 3.0]))
        return replace(policy, attend_ratio=ratio) if kind == "hackpp" else policy
    return ScaleKV(grid=2) if kind == "scalekv" else make_policy(kind)


def dense_attention(q, k, v, scale, log_weights=None):
    """Float64 softmax attention: q [n, dim], k and v [tokens, dim], log_weights [tokens]."""
    q, k, v = q.double(), k.double(), v.double()
    logits = q @ k.t() * scale
    if log_weights is not None:
        logits = logits + log_weights.double()
    return logits.softmax(-1) @ v


def every_attribute(model):
    """All instance attributes of all modules, by identity."""
    return {
        (name, key): id(value)
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
        if not isinstance(value, dict)
    }
