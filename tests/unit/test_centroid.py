"""Centroids: seeds and nearest seeds by hand and by brute force, and what folding keeps exact."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies import CacheGeometry, Candidates, Centroid, ScaleSchedule, StepSizes
from policies.scratch import lend
from tests.folds import evenly_spread
from tests.profiles import problem_of
from tests.unit.test_cache import draw, make

TINY = ScaleSchedule.of([(1, 3), (1, 2), 1])


def a_step(policy, keys, queries, keep, schedule=TINY, bias=None, scale=1, softmax_scale=1.0):
    """Candidates of one step, whose scratch holds anything at first."""
    rows, heads, count, dim = keys.shape
    fresh = queries.shape[1]
    dtype = str(keys.dtype).removeprefix("torch.")
    sizes = StepSizes(rows, heads, dim, dtype, count - fresh, fresh, max(keep))
    scratch = lend(policy.scratch(sizes), torch.device("cpu"))
    for part in scratch.values():
        part.fill_(torch.nan if part.is_floating_point() else 77)
    nothing = torch.empty(0, dtype=torch.int64)
    return Candidates(
        problem_of(schedule),
        scale,
        0,
        np.array(keep),
        nothing,
        queries,
        keys,
        torch.randn(keys.shape),
        bias,
        softmax_scale,
        scratch,
    )


def by_hand(policy, candidates, row, head):
    """Kept places and each candidate's, worked out in float64 without any trick."""
    keys = candidates.keys[row, head].double()
    fresh = candidates.queries.shape[1]
    q = candidates.queries[row, evenly_spread(policy.queries, fresh), head].double()
    if policy.query_means is not None:
        means, scale = policy.query_means[:, 0, head], candidates.scale
        ahead = [min(scale + 1 + place % 2, len(means) - 1) for place in range(len(q))]
        q = q + torch.from_numpy(means[ahead] - means[scale])
    q = q * candidates.softmax_scale
    logits = q @ keys.t()
    if candidates.log_weights is not None:
        every = candidates.log_weights.expand(*candidates.keys.shape[:2], 1, -1)
        logits = logits + every[row, head].double()
    is_there = ~logits.isneginf().all(0)
    scores = logits.softmax(-1).sum(0)
    count = int(candidates.keep[head])
    firsts = math.ceil(policy.first_share * count)
    seeds = scores.masked_fill(~is_there, -1).topk(firsts).indices.tolist()
    distance = (keys[:, None] - keys[seeds]).norm(dim=-1).amin(1)
    served = (scores * distance).masked_fill(~is_there, -1)
    served[seeds] = -2
    seeds = sorted([*seeds, *served.topk(count - firsts).indices.tolist()])
    nearest = (keys[:, None] - keys[seeds]).norm(dim=-1)
    return seeds, nearest, is_there


def check(policy, candidates, tolerance=1e-3):
    selection = policy.select(candidates)
    rows, heads, count, _ = candidates.keys.shape
    assert selection.keep.shape == (rows, heads, int(candidates.keep.max()))
    assert selection.into.shape == (rows, heads, count)
    for row in range(rows):
        for head in range(heads):
            seeds, distances, is_there = by_hand(policy, candidates, row, head)
            mine = selection.keep[row, head, : len(seeds)].tolist()
            assert mine == seeds
            into = selection.into[row, head]
            assert into[mine].tolist() == list(range(len(mine))), "a seed names itself"
            chosen = distances.gather(1, into[:, None])[:, 0]
            others = torch.ones(count, dtype=torch.bool)
            others[mine] = False
            error = (chosen - distances.amin(1))[is_there & others]
            assert (error <= tolerance).all(), "not the nearest seed"
    return selection


def test_a_lane_by_hand():
    """Five keys on a line; the query likes the right end. Of three seeds two are the most attended
    ones, the third is where attention times distance is largest.
    """
    keys = torch.tensor([0.0, 1.0, 4.0, 9.0, 10.0]).view(1, 1, 5, 1)
    policy = Centroid(queries=1, first_share=0.5)
    candidates = a_step(policy, keys, torch.full((1, 2, 1, 1), 0.5), [3])
    # attention e^(key / 2): 10 and 9 come first; times the distance from 9: e^2 x 5 for 4,
    # e^0.5 x 8 for 1, 9 for 0
    selection = check(policy, candidates)
    assert selection.keep.tolist() == [[[2, 3, 4]]]
    assert selection.into.tolist() == [[[0, 0, 0, 1, 2]]]
    # one seed: everything goes there
    selection = check(policy, a_step(policy, keys, torch.full((1, 2, 1, 1), 0.5), [1]))
    assert (selection.keep.tolist(), selection.into.tolist()) == ([[[4]]], [[[0] * 5]])
    # 8 stands for e^5 tokens: it is attended most although the query likes it less
    bias = torch.zeros(1, 1, 1, 5)
    bias[..., 1] = 5.0
    biased = a_step(policy, keys, torch.full((1, 2, 1, 1), 0.5), [1], bias=bias)
    assert check(policy, biased).keep.tolist() == [[[1]]]


@given(
    rows=st.integers(1, 2),
    cached=st.integers(0, 12),
    keep=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    share=st.sampled_from([0.01, 0.5, 0.75, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150)
def test_lanes_by_brute_force(rows, cached, keep, share, dtype, seed):
    """Heads that keep different numbers; log weights, and places without a token."""
    generator = torch.Generator().manual_seed(seed)
    schedule = ScaleSchedule.of([(1, 12), (2, 4), 1, 1][: 3 + seed % 4 // 2])
    heads, count = len(keep), cached + 8
    keys = torch.randn(rows, heads, count, 4, generator=generator).to(dtype)
    queries = torch.randn(rows, 8, heads, 4, generator=generator).to(dtype)
    bias = torch.randn(rows, heads, 1, count, generator=generator)
    there = torch.randint(0, cached + 1, (heads,), generator=generator)
    gone = (torch.arange(count) >= there[:, None]) & (torch.arange(count) < cached)
    bias.masked_fill_(gone[:, None], -torch.inf)
    keys.masked_fill_(gone[..., None], 0.0)
    means = None
    if seed % 2:
        means = torch.randn(len(schedule), 2, heads, 4, generator=generator).numpy()
    policy = Centroid(4, share, query_means=means)
    candidates = a_step(policy, keys, queries, keep, schedule, bias, softmax_scale=0.5)
    selection = check(policy, candidates)
    for head, number in enumerate(keep):
        mine = selection.keep[:, head, :number]
        assert not ((mine >= there[head]) & (mine < cached)).any()


@pytest.mark.parametrize("keep", [(1024, 700), (1025, 1100)])
def test_many_seeds(keep):
    """Up to 1024 the seed's number lies in the product's lowest bits; beyond, it does not."""
    generator = torch.Generator().manual_seed(0)
    schedule = ScaleSchedule.of([30, 20, 1])
    keys = torch.randn(1, 2, 1300, 5, generator=generator) @ torch.randn(5, 8, generator=generator)
    queries = torch.randn(1, 400, 2, 8, generator=generator)
    policy = Centroid()
    candidates = a_step(policy, keys, queries, keep, schedule, softmax_scale=0.3)
    selection = policy.select(candidates)
    for head, count in enumerate(keep):
        mine = selection.keep[0, head, :count]
        assert (mine.diff() > 0).all() and mine.max() < 1300
        into = selection.into[0, head]
        assert (into[mine] == torch.arange(count)).all()
        distances = torch.cdist(keys[0, head].double(), keys[0, head, mine].double())
        chosen = distances.gather(1, into[:, None])[:, 0]
        near = (chosen**2 - distances.amin(1) ** 2).max()
        assert near < (0.05 if max(keep) <= 1024 else 1e-4)
        assert (chosen <= distances.amin(1) + 1e-3).double().mean() > 0.97


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_equal_keys_name_themselves(value):
    keys = torch.full((2, 2, 11, 4), value)
    policy = Centroid(queries=4)
    schedule = ScaleSchedule.of([(1, 7), 2, 1])
    candidates = a_step(policy, keys, torch.randn(2, 4, 2, 4), (6, 3), schedule)
    selection = policy.select(candidates)
    for head, count in enumerate((6, 3)):
        for row in range(2):
            mine = selection.keep[row, head, :count]
            assert (mine.diff() > 0).all() and mine.max() < 11
            assert selection.into[row, head, mine].tolist() == list(range(count))
            assert selection.into[row, head].max() < count


def test_a_place_without_a_token_is_never_a_seed():
    """Where all real keys equal the zeros that stand there, or get no attention at all."""
    schedule = ScaleSchedule.of([(1, 7), 2, 1])
    policy = Centroid(queries=4)
    bias = torch.zeros(1, 1, 1, 11)
    bias[..., 2:7] = -torch.inf
    for queries in (torch.zeros(2, 4, 1, 4), torch.full((2, 4, 1, 4), 300.0)):
        for values in (torch.zeros(11), torch.tensor([0.0] * 10 + [300.0])):
            keys = values[None, None, :, None].expand(2, 1, 11, 4).contiguous()
            candidates = a_step(policy, keys, queries, (6,), schedule, bias)
            assert policy.select(candidates).keep.tolist() == [[[0, 1, 7, 8, 9, 10]]] * 2


def test_folding_equal_keys_is_exact():
    """softmax over n equal keys is softmax over one with log n, and values average."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 8, generator=generator).double()
    counts = torch.tensor([4, 1, 7])
    many = keys.repeat_interleave(counts, 0)
    values = torch.randn(12, 8, generator=generator).double()
    means = torch.stack([part.mean(0) for part in values.split(counts.tolist())])
    q = torch.randn(5, 8, generator=generator).double()
    plain = (q @ many.t()).softmax(-1) @ values
    folded = (q @ keys.t() + counts.double().log()).softmax(-1) @ means
    torch.testing.assert_close(folded, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_duplicates_cost_nothing(dtype):
    """Two different keys in every lane: a quarter of the tokens draws what all of them draw, but
    for the rounding of log weights to float16.
    """
    geometry = CacheGeometry(2, 3, 16, dtype, dtype)
    schedule = ScaleSchedule.of([1, 2, 3, 4, 5, 6])
    generator = torch.Generator().manual_seed(1)
    two = torch.randn(2, 1, 2, 3, 16, generator=generator)

    def outs(policy, budget):
        outputs = []
        cache = make(policy, budget, geometry, schedule)
        source = torch.Generator().manual_seed(2)
        with cache.open(2) as generation:
            for n in schedule.tokens:
                for layer in range(2):
                    q = torch.randn(2, n, 3, 16, generator=source)
                    which = torch.randint(0, 2, (2, n, 3, 1), generator=source)
                    k = torch.where(which == 0, two[:, :, 0], two[:, :, 1])
                    v = torch.randn(2, n, 3, 16, generator=source)
                    qkv = (part.to(getattr(torch, dtype)) for part in (q, k, v))
                    outputs.append(generation.attend(layer, *qkv).float())
        return outputs

    tolerance = 2e-3 if dtype == "float32" else 4e-2
    for ours, full in zip(outs("centroid", 14), outs("full", 1.0), strict=True):
        torch.testing.assert_close(ours, full, rtol=0, atol=tolerance)
    worse = [
        float((ours - full).abs().max())
        for ours, full in zip(outs("sliding_window", 14), outs("full", 1.0), strict=True)
    ]
    assert max(worse) > 10 * tolerance, "dropping as many is not exact"


def test_a_budget_of_everything_folds_nothing():
    ours, full = draw(make("centroid", 1.0).open(2)), draw(make("full").open(2))
    for a, b in zip(ours, full, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_parameters():
    with pytest.raises(ValueError, match="queries must be positive, got 0"):
        Centroid(queries=0)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"first_share must be in \(0, 1\], got"):
            Centroid(first_share=share)
    assert Centroid(9).needs.refit == 9 and Centroid(is_fitted=False).needs.refit == 0
