"""Policies and oracles that tests share."""

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

from policies import POLICY_NAMES, Profile, ScaleSchedule, make_policy
from policies.ams_kv import AMSKV
from policies.scalekv import ScaleKV

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
    """Keeps any number of any tokens, as the contract of policies allows. Without queries all
    lanes keep the same; with them each its own, and ``is_ragged`` heads different numbers.
    """

    seed: int
    num_queries: int = 1
    is_ragged: bool = True
    name: str = "random"

    def lengths(self, schedule, geometry, budget):
        rng = np.random.default_rng(self.seed)
        lengths = np.zeros((len(schedule), geometry.layers, geometry.heads), dtype=np.int64)
        held = np.zeros((geometry.layers, geometry.heads if self.is_ragged else 1), dtype=np.int64)
        for scale, fresh in enumerate(schedule.tokens[:-1]):
            held = rng.integers(1, held + fresh + 1)
            lengths[scale] = held
        return lengths

    def select(self, step):
        seed = self.seed + step.scale * 100 + step.layer
        if self.num_queries == 0:
            rng = np.random.default_rng(seed)
            return np.sort(rng.permutation(step.tokens.size)[: step.keep[0]])
        rows, _, heads, _ = step.queries.shape
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(rows, heads, step.keys.shape[2], generator=generator)
        if step.bias is not None:
            scores = scores + step.bias[:, 0].float()
        return scores.topk(int(step.keep.max()), dim=-1).indices


@dataclass(frozen=True)
class Spy:
    """Any policy, with its choices written down."""

    inner: object
    chosen: list = field(default_factory=list)

    @property
    def name(self):
        return self.inner.name

    @property
    def num_queries(self):
        return self.inner.num_queries

    def lengths(self, schedule, geometry, budget):
        return self.inner.lengths(schedule, geometry, budget)

    def select(self, step):
        places = self.inner.select(step)
        self.chosen.append((step, places))
        return places


@st.composite
def policies(draw, layers):
    """A policy, its roles drawn at random where it has any."""
    some_layers = st.frozensets(st.integers(0, layers - 1), max_size=layers)
    kind = draw(st.sampled_from([*POLICY_NAMES, "roles", "demanding", "random", "random"]))
    if kind == "random":
        num_queries, is_ragged = draw(st.sampled_from([(0, False), (1, False), (1, True)]))
        return RandomPolicy(draw(st.integers(0, 1000)), num_queries, is_ragged)
    if kind == "roles":
        roles = tuple(draw(st.lists(some_layers, min_size=1, max_size=6)))
        return ScaleKV(roles, grid=draw(st.integers(1, 2)), pool=draw(st.sampled_from([1, 3])))
    if kind == "demanding":
        return AMSKV(
            draw(some_layers), draw(st.floats(0.1, 1.0)), condensed=draw(st.integers(1, 2))
        )
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


def dense_attention(q, k, v, scale):
    """Float64 softmax attention: q [n, dim], k and v [tokens, dim]."""
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.t() * scale).softmax(-1) @ v


def every_attribute(model):
    """All instance attributes of all modules, by identity."""
    return {
        (name, key): id(value)
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
        if not isinstance(value, dict)
    }
