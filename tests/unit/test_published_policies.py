"""Published policies against their sources: choices, by naive references."""

import numpy as np
import pytest
import torch

from policies import (
    H2O,
    CacheGeometry,
    Candidates,
    Hack,
    HackPP,
    Problem,
    Random,
    ScaleSchedule,
    SnapKV,
    StepSizes,
)
from policies.hack import contextual_heads
from policies.scratch import lend
from tests.profiles import profile_of


def a_step(policy, schedule, at, cached, keep, seed=0, heads=2, dtype=torch.float32, **planes):
    """Candidates of one step over random tokens, in scratch that holds nonsense."""
    generator = torch.Generator().manual_seed(seed)
    fresh, dim = schedule.tokens[at], 8
    count = cached + fresh
    keys, values = torch.randn(2, 3, heads, count, dim, generator=generator).to(dtype)
    queries = torch.randn(3, fresh, heads, dim, generator=generator).to(dtype)
    name = str(dtype).removeprefix("torch.")
    scratch = lend(
        policy.scratch(StepSizes(3, heads, dim, name, cached, fresh, max(keep))),
        torch.device("cpu"),
    )
    for part in scratch.values():
        part.fill_(torch.nan if part.is_floating_point() else 99)
    problem = Problem(CacheGeometry(2, heads, dim), schedule, int(max(keep)))
    return Candidates(
        problem,
        at,
        0,
        np.array(keep),
        torch.empty(0, dtype=torch.int64),
        queries,
        keys,
        values,
        None,
        0.7,
        scratch,
        {name: plane.to(torch.float16) for name, plane in planes.items()},
    )


def attention(candidates, which):
    """Softmax attention of these queries, float64 [rows, heads, queries, candidates]."""
    q = candidates.queries[:, which].transpose(1, 2).double()
    logits = q @ candidates.keys.double().transpose(2, 3) * candidates.softmax_scale
    return logits.softmax(-1)


def ranked(scores, count):
    return scores.topk(count, dim=-1).indices.sort(-1).values


SCHEDULE = ScaleSchedule.of([1, 2, 3, 5, (6, 13), 9])


@pytest.mark.parametrize("recent_share", [0.0, 0.5])
@pytest.mark.parametrize("scale", [2, 4])
def test_h2o_by_a_naive_reference(scale, recent_share):
    """Sums over all queries of all scales: more than one block of them at scale 4."""
    policy = H2O(recent_share)
    cached, fresh = 7, SCHEDULE.tokens[scale]
    old = torch.rand(3, 2, cached + fresh) * 5
    old[:, :, cached:] = 0
    candidates = a_step(policy, SCHEDULE, scale, cached, [6, 6], score=old)
    sums = old.half().double() + attention(candidates, range(fresh)).sum(2)
    selection = policy.select(candidates)
    assert (selection.scores.double() - sums).abs().max() < 1e-4
    newest = int(recent_share * 6)
    wanted = sums.clone()
    wanted[:, :, cached + fresh - newest :] = 1e9
    assert torch.equal(selection.keep, ranked(wanted, 6))


def test_h2o_adds_up_where_nothing_is_dropped():
    assert H2O().needs.every_scale
    candidates = a_step(H2O(), SCHEDULE, 1, 1, [5, 5], score=torch.zeros(3, 2, 5))
    selection = H2O().select(candidates)
    assert selection.keep.tolist() == [[[0, 1, 2, 3, 4]] * 2] * 3
    assert torch.allclose(selection.scores.sum(-1), torch.full((3, 2), 4.0))


@pytest.mark.parametrize("pool", [1, 5])
@pytest.mark.parametrize("window", [3, 64])
def test_snapkv_by_a_naive_reference(window, pool):
    policy = SnapKV(window, pool)
    candidates = a_step(policy, SCHEDULE, 4, 7, [12, 12])
    fresh, count = 78, 85
    newest = min(window, 6)  # half the budget at most
    scores = attention(candidates, range(fresh - newest, fresh)).sum(2)
    padded = torch.nn.functional.pad(scores, (pool // 2, pool // 2))
    scores = torch.stack([padded[..., i : i + count] for i in range(pool)]).mean(0)
    scores[..., count - newest :] = 1e9
    assert torch.equal(policy.select(candidates).keep, ranked(scores, 12))


def test_random_depends_on_its_seed_alone():
    first, again, other = (
        Random(seed).select(a_step(Random(seed), SCHEDULE, 4, 7, [9, 4], seed=noise)).keep
        for seed, noise in ((3, 0), (3, 1), (4, 0))
    )
    assert torch.equal(first[:, 0], again[:, 0]) and not torch.equal(first, other)
    assert torch.equal(first[0], first[2]), "alike in all rows, however they are chunked"
    assert (first[:, 0, 1:] > first[:, 0, :-1]).all() and first[:, 0].max() < 85


KINDS = (frozenset({1}), frozenset())


@pytest.mark.parametrize("scale", [3, 4])
def test_hack_by_a_naive_reference(scale):
    """Head 1 is contextual: what 32 spread queries attend to, and at the last compaction others
    merged into the most similar key. Head 0: first scales, newest scale, then the others.
    """
    policy = Hack(KINDS)
    fresh = SCHEDULE.tokens[scale]
    candidates = a_step(policy, SCHEDULE, scale, 12, [fresh + 7 if fresh < 50 else 20, 9])
    which = [int((i + 0.5) * fresh / min(32, fresh)) for i in range(min(32, fresh))]
    scores = attention(candidates, which).sum(2)
    structural = scores[:, 0].clone()
    structural[:, 12:] += 1e3
    structural[:, :5] += 1e6
    selection = policy.select(candidates)
    first, second = candidates.keep.tolist()
    assert torch.equal(selection.keep[:, 0, :first], ranked(structural, first))
    kept = ranked(scores[:, 1], second)
    assert torch.equal(selection.keep[:, 1, :second], kept)
    into = selection.into
    dropped = torch.ones(3, 12 + fresh, dtype=torch.bool).scatter_(
        1, selection.keep[:, 0, :first], False
    )
    assert (into[:, 0][dropped] == -1).all(), "structural heads drop"
    if scale == 3:
        mine = torch.zeros(3, 12 + fresh, dtype=torch.bool).scatter_(1, kept, True)
        assert (into[:, 1][~mine] == -1).all(), "only the last compaction merges"
        return
    unit = torch.nn.functional.normalize(candidates.keys[:, 1].double(), dim=-1)
    likeness = unit @ unit.gather(1, kept.unsqueeze(-1).expand(-1, -1, 8)).transpose(1, 2)
    chosen = likeness.gather(2, into[:, 1].unsqueeze(-1)).squeeze(-1)
    assert (likeness.amax(-1) - chosen).abs().max() < 1e-5
    number = torch.arange(second).expand(3, -1)
    assert torch.equal(into[:, 1].gather(1, kept), number)


def test_hack_takes_the_heads_that_vary_least():
    profile = profile_of(SCHEDULE, 2, heads=3)
    variance = np.array(profile.column_variance)
    chosen = contextual_heads(profile, 0.5, "hack")
    least = np.sort(variance.ravel())[:3]
    assert sorted(variance[layer, head] for layer, mine in enumerate(chosen) for head in mine) == (
        sorted(least)
    )


def test_hackpp_by_a_naive_reference():
    profile = profile_of(SCHEDULE, 2, heads=2)
    mass, _ = profile.per_head("hackpp")
    policy = HackPP(KINDS, mass, pool=3)
    source = torch.tensor([0] + [1] * 4 + [2] * 5 + [4] * 78).expand(3, 2, -1)
    candidates = a_step(policy, SCHEDULE, 4, 10, [20, 11], scale=source)
    which = [int((i + 0.5) * 78 / 32) for i in range(32)]
    scores = attention(candidates, which).sum(2)
    padded = torch.nn.functional.pad(scores, (1, 1))
    pooled = torch.stack([padded[..., i : i + 88] for i in range(3)]).amax(0)
    prior = torch.from_numpy(mass[4, :, 0, 0] / np.array(SCHEDULE.tokens))
    norms = prior[source[:, 0]] * candidates.values[:, 0].double().norm(dim=-1)
    selection = policy.select(candidates)
    assert torch.equal(selection.keep[:, 0], ranked(norms, 20))
    kept = pooled[:, 1].gather(1, selection.keep[:, 1, :11])  # neighbours have equal maxima
    assert torch.allclose(kept.sort(-1, descending=True).values, pooled[:, 1].topk(11).values)
    assert torch.equal(policy.attend_to(candidates), selection.keep)
