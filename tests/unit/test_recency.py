"""Policies that choose by age: selections worked out by hand, and by brute force."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from policies import (
    AMSKV,
    CacheGeometry,
    Candidates,
    Full,
    ScaleSchedule,
    SlidingWindow,
    StreamingLLM,
    check_allocation,
    make_policy,
)
from policies.ams_kv import ams_kv_from
from policies.base import Problem
from policies.recency import highest
from policies.scalekv import drafters_from_selectivity
from tests.profiles import problem_of, profile_of
from tests.support import schedules
from tests.unit.test_policies import tokens_of


def kept_tokens(policy, schedule, scale, cached, keep, layer=0):
    """Numbers of the tokens that one head keeps, in order; cached: numbers, -1 for none."""
    numbers = np.concatenate([cached, np.arange(*schedule.span(scale))]).astype(np.int64)
    empty = torch.empty(0)
    positions = torch.from_numpy(numbers)[None, None]
    chosen = policy.select(
        Candidates(
            problem_of(schedule),
            scale,
            layer,
            np.array([keep]),
            positions,
            empty,
            empty,
            empty,
            None,
            1.0,
            {},
        )
    )
    assert chosen.keep.shape == (1, 1, keep) and chosen.into is None
    places = chosen.keep[0, 0].numpy()
    assert (np.diff(places) > 0).all()
    return numbers[places].tolist()


def test_highest():
    """Per head, equal ranks to the earlier place, shorter heads' own places first."""
    ranks = torch.tensor([[[3, 9, 9, 1, 5], [7, 7, 7, 7, 8]]])
    assert highest(ranks, np.array([3, 2])).keep.tolist() == [[[1, 2, 4], [0, 4, 5]]]
    assert highest(ranks, np.array([0, 5])).keep.tolist() == [[[5] * 5, [0, 1, 2, 3, 4]]]


def test_full_keeps_the_first_where_it_must_drop():
    """It never is asked to, since every lane holds everything."""
    assert kept_tokens(Full(), ScaleSchedule.of([2, 2, 2]), 1, np.arange(4), 5) == [0, 1, 2, 3, 4]


def test_sliding_window_keeps_the_newest_wherever_they_lie():
    schedule = ScaleSchedule.of([1, 2, 3, 4])
    kept = kept_tokens(SlidingWindow(), schedule, 2, np.array([4, 0, 2]), 11)
    assert kept == [4, 2, *range(5, 14)]
    kept = kept_tokens(SlidingWindow(), schedule, 2, np.array([4, -1, -1]), 10)
    assert kept == [4, *range(5, 14)]


def test_streaming_llm_keeps_sinks_and_the_newest():
    schedule = ScaleSchedule.of([1, 2, 3, 4])
    kept = kept_tokens(StreamingLLM(2), schedule, 2, np.array([4, 0, 2, 1, 3]), 7)
    assert kept == [0, 1, 9, 10, 11, 12, 13]
    kept = kept_tokens(StreamingLLM(2), schedule, 2, np.array([4, 0, -1]), 3)
    assert kept == [0, 12, 13], "a place without a token is no sink"
    with pytest.raises(ValueError, match="sinks must be positive, got 0"):
        StreamingLLM(0)


def test_ams_kv_keeps_condensed_and_newest_scales():
    schedule = ScaleSchedule.of([1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
    # C_min = 60, C_max = 140: layer 0 demands
    policy = AMSKV(frozenset({0}), min_share=0.6)
    assert policy.capacities(2, 100).tolist() == [140, 60]
    tokens = tokens_of(policy, schedule, 2, 100)
    assert tokens[5].tolist() == [91, 91], "nothing is dropped while the history fits"
    # scale 6 (64 tokens): layer 0 keeps 1 + 4, 36, 64 and 25; layer 1 cannot cache 64, keeps 36
    assert tokens[6].tolist() == [5 + 25 + 36 + 64, 5 + 36]
    # scale 7 (100 tokens): layer 0 keeps 5 + 100; layer 1 keeps what it has
    assert tokens[7].tolist() == [105, 41]
    assert tokens[8].tolist() == [105, 41], "169 tokens fit in neither"
    kept = kept_tokens(policy, schedule, 6, np.arange(91), 130)
    assert kept == [*range(5), *range(30, 155)]
    kept = kept_tokens(policy, schedule, 6, np.arange(91), 41, layer=1)
    assert kept == [*range(5), *range(55, 91)]


@given(schedule=schedules, budget=st.integers(1, 60), layers=st.integers(1, 4), data=st.data())
def test_ams_kv_holds_whole_scales_within_the_budget(schedule, budget, layers, data):
    policy = AMSKV(
        data.draw(st.frozensets(st.integers(0, layers - 1))),
        data.draw(st.floats(0.05, 1.0)),
        data.draw(st.integers(1, 2)),
    )
    try:
        tokens = tokens_of(policy, schedule, layers, budget)
    except ValueError:
        assume(False)
    capacities = policy.capacities(layers, budget)
    assert capacities.sum() <= budget * layers
    for layer in range(layers):
        held = np.empty(0, dtype=np.int64)
        for scale in range(len(schedule) - 1):
            keep = int(tokens[scale, layer])
            held = np.array(kept_tokens(policy, schedule, scale, held, keep, layer), dtype=np.int64)
            if scale >= policy.condensed and schedule.seen[scale] > budget:
                assert held.size <= capacities[layer]
            whole = {s for s in range(scale + 1) if schedule.span(s)[0] in held}
            wanted = [token for s in whole for token in range(*schedule.span(s))]
            assert sorted(held.tolist()) == sorted(wanted)
            pinned = set(range(min(policy.condensed, scale + 1)))
            assert pinned <= whole
            rest = sorted(whole - pinned)
            room = int(capacities[layer]) - sum(schedule.tokens[:-1][: policy.condensed])
            for s in range(rest[0], scale + 1) if rest else ():
                too_large = schedule.tokens[s] > room and schedule.seen[s] > budget
                assert (s in rest) != (too_large and s >= policy.condensed)


@pytest.mark.parametrize(("sizes", "condensed"), [([4, 8], 2), ([4, 8, 9], 3)])
def test_ams_kv_refuses_pinned_scales_beyond_the_budget(sizes, condensed):
    with pytest.raises(ValueError, match="budget 5 gives a layer 5 tokens"):
        tokens_of(AMSKV(condensed=condensed), ScaleSchedule.of(sizes), 1, 5)


def test_a_profile_of_one_scale_gives_no_roles():
    profile = profile_of(ScaleSchedule.of([3]), 4)
    assert drafters_from_selectivity(profile, 0.5) == ()
    assert len(ams_kv_from(profile).demanding) == 1


def test_ams_kv_parameters():
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="min_share must be in"):
            AMSKV(min_share=share)
    with pytest.raises(ValueError, match="condensed must be positive, got 0"):
        AMSKV(condensed=0)


def test_ams_kv_takes_the_layers_whose_keys_change_most():
    schedule = ScaleSchedule.of([1, 2, 3])
    profile = profile_of(schedule, 4).model_copy(
        update={"similarity": ((0.0,) * 4, (-0.1, -0.9, -0.2, -0.8), (-0.1, -0.9, -0.2, -0.8))}
    )
    assert ams_kv_from(profile, share=0.5).demanding == {1, 3}
    assert ams_kv_from(profile, share=0.01).demanding == {1}
    assert ams_kv_from(None) == AMSKV()


@pytest.mark.parametrize("name", ["sliding_window", "streaming_llm", "centroid"])
@given(schedule=schedules, budget=st.integers(5, 40))
def test_lanes_grow_to_the_budget_and_stay(name, schedule, budget):
    tokens = tokens_of(make_policy(name), schedule, 2, budget)[:-1]
    assert (tokens == np.minimum(schedule.seen[:-1], budget)[:, None]).all()


@pytest.mark.parametrize("name", ["full", "scalekv", "ams_kv", "centroid"])
@given(schedule=schedules, budget=st.integers(1, 60), layers=st.integers(1, 4))
def test_allocations_keep_to_their_contract(name, schedule, budget, layers):
    problem = Problem(CacheGeometry(layers, 2, 4), schedule, budget)
    try:
        made = make_policy(name).allocate(problem)
    except ValueError:
        assume(False)
    check_allocation(made, problem)
    if name == "full":
        assert (made.tokens[:-1, 0, 0] == schedule.seen[:-1]).all()
    else:
        assert made.tokens.mean(axis=(1, 2)).max() <= budget
