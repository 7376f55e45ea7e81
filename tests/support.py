"""Policies and oracles that tests share."""

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

from policies import (
    AMSKV,
    POLICY_NAMES,
    Allocation,
    Centroid,
    Needs,
    Profile,
    ScaleKV,
    ScaleSchedule,
    Selection,
    make_policy,
)
from policies.recency import highest

sizes = st.one_of(
    st.integers(1, 4),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
)
schedules = st.one_of(  # short ones by themselves: most of hypothesis' lists would be
    st.lists(sizes, min_size=1, max_size=2), st.lists(sizes, min_size=3, max_size=6)
).map(ScaleSchedule.of)


@dataclass(frozen=True)
class RandomPolicy:
    """Keeps any number of any tokens, as the contract of policies allows. Without queries it
    chooses by token number; with them each row for itself. ``is_ragged`` heads keep different
    numbers, sometimes none. In every third seed all layers keep as many; every other one says by
    itself when each layer is quantised.
    """

    seed: int
    num_queries: int = 1
    is_ragged: bool = True
    name: str = "random"

    @property
    def needs(self):
        return Needs(queries=self.num_queries)

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
            return Selection(random_places(candidates, seed + candidates.layer))
        positions = candidates.positions
        numbers = np.random.default_rng(seed).random(
            (positions.shape[1], candidates.schedule.total)
        )
        ranks = torch.from_numpy(numbers).gather(1, positions[0].clamp(min=0))[None]
        return highest(ranks.masked_fill(positions < 0, -1.0), candidates.keep)


def random_places(candidates, seed):
    """Any places that are there, [rows, heads, m]; nonsense where a head keeps fewer."""
    rows, heads, count, _ = candidates.keys.shape
    scores = torch.rand(rows, heads, count, generator=torch.Generator().manual_seed(seed))
    if candidates.log_weights is not None:
        scores.masked_fill_(candidates.log_weights[:, :, 0].isneginf(), -1.0)
    keep = torch.from_numpy(candidates.keep)[:, None]
    most = int(keep.max())
    best = scores.topk(most, dim=-1).indices
    unused = torch.arange(most) >= keep  # [heads, m]
    return best.masked_fill(unused, 10**6).sort(dim=-1).values.masked_fill(unused, -7)


@dataclass(frozen=True)
class RandomFold(RandomPolicy):
    """The same, and what is not kept is folded into any kept token or dropped. Some seeds fit
    values, some log weights, some both.
    """

    name: str = "random fold"

    @property
    def needs(self):
        return Needs(queries=self.num_queries, weights=True)

    def select(self, candidates):
        seed = self.seed + candidates.scale * 100 + candidates.layer
        keep = random_places(candidates, seed)
        generator = torch.Generator().manual_seed(seed + 50)
        (rows, heads, most), (count, head_dim) = keep.shape, candidates.keys.shape[2:]
        held = torch.from_numpy(candidates.keep)[:, None]
        luck = torch.rand(rows, heads, count, generator=generator)
        into = (luck * (held + 1)).long().clamp(max=held) - 1
        for head, kept in enumerate(candidates.keep.tolist()):
            number = torch.arange(kept).expand(rows, kept)
            into[:, head].scatter_(1, keep[:, head, :kept], number)
        values = log_weights = None
        if self.seed % 4 in (1, 2):
            values = torch.randn(rows, heads, most, head_dim, generator=generator)
        if self.seed % 4 in (2, 3):
            log_weights = torch.randn(rows, heads, most, generator=generator)
        return Selection(keep, into, values, log_weights)


@dataclass(frozen=True)
class Choice:
    """A recorded call of ``select``, with tensors of its own."""

    scale: int
    keep: np.ndarray
    positions: np.ndarray  # [1, heads, candidates]; empty for policies that look at the content
    cached: int
    selection: Selection


@dataclass(frozen=True)
class Spy:
    """Any policy, with its choices written down: by content, those since ``chosen`` was cleared;
    by token number, all of them, since each is made once for all layers that are alike.
    """

    inner: object
    chosen: list = field(default_factory=list)
    known: list = field(default_factory=list)

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

    def select(self, candidates):
        selection = self.inner.select(candidates)
        parts = (selection.keep, selection.into, selection.values, selection.log_weights)
        own = Selection(*(None if part is None else part.clone() for part in parts))
        by_content = self.needs.content
        choice = Choice(
            candidates.scale,
            candidates.keep.copy(),
            candidates.positions.numpy().copy(),
            candidates.cached if by_content else 0,
            own,
        )
        (self.chosen if by_content else self.known).append(choice)
        return selection


@st.composite
def policies(draw, layers):
    """A policy, its roles drawn at random where it has any."""
    some_layers = st.frozensets(st.integers(0, layers - 1), max_size=layers)
    kinds = [*POLICY_NAMES, "roles", "demanding", "random", "random", "random", "fold", "fold"]
    kind = draw(st.sampled_from(kinds))
    if kind == "random":
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
        return Centroid(draw(st.integers(1, 2)), draw(st.sampled_from([0.3, 0.75, 1.0])))
    return ScaleKV(grid=2) if kind == "scalekv" else make_policy(kind)


def profile_of(schedule, layers, seed=0):
    """A well-formed profile with random statistics."""
    rng = np.random.default_rng(seed)

    def table():
        return rng.random((len(schedule), layers)).tolist()

    return Profile(
        version=1,
        model="test",
        sizes=schedule.sizes,
        pictures=1,
        selectivity=table(),
        similarity=table(),
        cached_mass=table(),
    )


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
