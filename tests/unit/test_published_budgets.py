"""Published policies against their sources: budgets, in golden figures."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kvruntime.catalogue import VAR_256, infinity_schedule
from policies import (
    AMSKV,
    CacheGeometry,
    Candidates,
    HackPP,
    HeatKV,
    Problem,
    PyramidKV,
    ScaleSchedule,
    load_heatkv_orders,
    make_policy,
)
from policies.budgets import check_allocation, proportional
from policies.hack import budgets_by_kind
from policies.heatkv import heads_removed, sources_kept
from tests.profiles import profile_of

INFINITY = infinity_schedule()
X_T = {  # METHODS 5.2: model's heads, budget, x_t at t = 5..12
    (512, 0.20): (0, 0, 0, 0, 74, 254, 355, 411),
    (512, 0.10): (0, 0, 0, 159, 297, 385, 435, 463),
    (512, 0.05): (0, 0, 205, 342, 408, 451, 475, 488),
    (512, 0.01): (291, 422, 468, 488, 497, 504, 507, 509),
    (1120, 0.10): (0, 0, 0, 347, 649, 842, 951, 1012),
    (1120, 0.05): (0, 0, 448, 747, 893, 986, 1038, 1068),
}


@pytest.mark.parametrize(("lanes", "budget"), X_T)
def test_heatkv_removes_as_many_heads_as_published(lanes, budget):
    removed = heads_removed(INFINITY, lanes, budget * INFINITY.history)
    assert tuple(removed[5:]) == X_T[lanes, budget]
    assert not removed[:5].any()


def orders_at_random(scales, layers, heads, sinks=3, seed=0):
    rng = np.random.default_rng(seed)
    places = [(layer, head) for layer in range(layers) for head in range(heads)]
    return tuple(
        tuple(places[i] for i in rng.permutation(len(places))) for _ in range(sinks, scales - 1)
    )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("budget", [0.05, 0.10, 0.20])
def test_heatkv_keeps_to_its_budget(budget, strict):
    """Between scales on average, and, where it is strict, after every layer's write."""
    layers, heads = 32, 16
    tokens = budget * INFINITY.history
    orders = orders_at_random(13, layers, heads)
    kept = sources_kept(orders, INFINITY, (layers, heads), tokens, 3, strict)
    sizes = np.array(INFINITY.tokens)[:, None, None]
    held = (kept * sizes).sum(axis=1).sum(axis=2)  # [scales, layers]
    assert (held.sum(axis=1) <= tokens * layers * heads).all()
    assert kept[:-1, :3].transpose(1, 0, 2, 3)[0].all(), "the first scales stay"
    running = [
        held[scale, : layer + 1].sum() + held[scale - 1, layer + 1 :].sum()
        for scale in range(1, 12)
        for layer in range(layers)
    ]
    assert (max(running) <= tokens * layers * heads) == strict
    removed = heads_removed(INFINITY, layers * heads, tokens)
    for scale in range(3, 12):
        lost = layers * heads - kept[scale, 3 : scale + 1].sum(axis=(1, 2))
        if strict:
            assert (lost >= removed[scale + 1]).all()
        else:
            assert (lost == removed[scale + 1]).all()


@pytest.mark.skipif("KVRUNTIME_HEATKV" not in os.environ, reason="KVRUNTIME_HEATKV=its checkout")
def test_heatkv_strict_on_the_published_orders():
    """METHODS 5.2: atoms that go early at scales 8 to 11, Infinity-2B, 10 %; mean tokens a head."""
    orders = load_heatkv_orders(Path(os.environ["KVRUNTIME_HEATKV"]) / "orders/2b.json").orders
    budget = 0.1 * INFINITY.history
    late, early = (
        sources_kept(orders, INFINITY, (32, 16), budget, 3, strict) for strict in (False, True)
    )
    gone = (late & ~early).sum(axis=(1, 2, 3))
    assert gone[7:11].tolist() == [99, 67, 28, 43]
    means = (early * np.array(INFINITY.tokens)[:, None, None]).sum(axis=1).mean(axis=(1, 2))
    assert means[7:12].round().tolist() == [606, 604, 615, 575, 634]


def test_heatkv_drops_whole_scales_of_the_heads_that_matter_least():
    """By hand: two layers of one head; the first one gives up each source scale first."""
    schedule = ScaleSchedule.of([1, 2, 3, 4, 5])
    orders = (((0, 0), (1, 0)), ((1, 0), (0, 0)))
    policy = HeatKV(orders, sinks=2)
    problem = Problem(CacheGeometry(2, 1, 4), schedule, 20)
    allocation = policy.allocate(problem)
    check_allocation(allocation, problem)
    # what scale 4 reads: 30 tokens of 20; x = ceil(2 (30 - 20) / (30 - 5)) = 1 of 2 heads
    assert allocation.tokens[:, :, 0].tolist() == [[1, 1], [5, 5], [14, 14], [21, 14], [0, 0]]
    positions = torch.arange(30).view(1, 1, 30)
    for layer, wanted in ((0, [*range(5), *range(14, 30)]), (1, range(14))):
        keep = allocation.tokens[3, layer]
        nothing = torch.empty(0)
        selection = policy.select(
            Candidates(problem, 3, layer, keep, positions, nothing, nothing, nothing, None, 1.0, {})
        )
        assert selection.keep.tolist() == [[list(wanted)]]


def test_heatkv_refuses_orders_of_another_model():
    orders = orders_at_random(5, 2, 2)
    for geometry, sizes, message in (
        (CacheGeometry(2, 3, 4), [1, 2, 3, 4, 5], "does not name each of 2 x 3 heads"),
        (CacheGeometry(2, 2, 4), [1, 2, 3, 4], "orders must be of 0 source scales"),
    ):
        problem = Problem(geometry, ScaleSchedule.of(sizes), 20)
        with pytest.raises(ValueError, match=message):
            HeatKV(orders).allocate(problem)
    with pytest.raises(ValueError, match="does not hold the 14 tokens of the sink scales"):
        HeatKV(orders).allocate(Problem(CacheGeometry(2, 2, 4), ScaleSchedule.of(range(1, 6)), 13))
    with pytest.raises(ValueError, match="each head of every layer once"):
        HeatKV((((0, 0), (0, 0)),))


@pytest.mark.parametrize("layers", [1, 2, 8, 32])
@pytest.mark.parametrize("budget", [10, 42, 650])
def test_pyramidkv_budgets_fall_in_a_straight_line(layers, budget):
    budgets = PyramidKV().budgets(layers, budget)
    least = budget / 20
    if layers > 1:
        wanted = [
            2 * budget - least - (2 * budget - 2 * least) * layer / (layers - 1)
            for layer in range(layers)
        ]
    else:
        wanted = [budget]
    assert (np.abs(budgets - np.maximum(1, np.floor(np.array(wanted) + 1e-9))) == 0).all()
    assert budget - 1 <= budgets.mean() <= budget + 1 / 20


SCHEDULE = ScaleSchedule.of([1, 2, 3, 5, (6, 13), 9])


def test_hack_budgets_meet_their_mean():
    for ratio, budget, few in ((0.5, 42, 12), (0.25, 650, 30), (1.0, 5, 3), (0.1, 100, 47)):
        kinds = np.zeros((8, 6), dtype=bool)
        kinds.ravel()[:few] = True
        structural, contextual = budgets_by_kind(kinds, ratio, budget)
        mean = (few * contextual + (48 - few) * structural) / 48
        assert budget - 1 < mean <= budget
        assert abs(contextual - ratio * structural) <= ratio + 48 / few
    assert budgets_by_kind(np.ones((2, 2), dtype=bool), 0.5, 7) == (7, 7)


def test_proportional():
    rng = np.random.default_rng(0)
    for _ in range(300):
        weights, room = rng.random(7), rng.integers(0, 30, 7)
        total = int(rng.integers(0, 120))
        tokens = proportional(weights, room, total)
        assert (tokens <= room).all() and (tokens >= 0).all()
        assert total - 7 < tokens.sum() <= total or (tokens == room).all()
        is_open = tokens < room
        if is_open.sum() > 1:  # what has room left has its share
            ratio = tokens[is_open] / weights[is_open]
            assert (np.abs(np.subtract.outer(ratio, ratio)) <= 1 / weights[is_open].min()).all()


def test_hackpp_budgets_follow_reliance_and_meet_their_mean():
    profile = profile_of(SCHEDULE, 2, heads=3)
    mass, _ = profile.per_head("hackpp")
    policy = HackPP((frozenset({0, 1}), frozenset()), mass, tau=1.0)
    problem = Problem(CacheGeometry(2, 3, 8), SCHEDULE, 12)
    allocation = policy.allocate(problem)
    check_allocation(allocation, problem)
    assert (allocation.attended == 36).all()
    for scale, seen in enumerate(SCHEDULE.seen[:-1]):
        total = allocation.tokens[scale].sum()
        assert total == 6 * seen if seen <= 12 else 12 * 6 - 6 < total <= 12 * 6
    gamma = policy.reliance(problem)
    by_hand = sum(
        mass[later, :later, 0, :2].sum(axis=0).mean() / SCHEDULE.seen[later - 1]
        for later in range(4, 6)
    )
    assert gamma[3, 0, 0] == gamma[3, 0, 1] == pytest.approx(by_hand)
    assert not gamma[-1].any()
    held = allocation.tokens[4]  # all have room there
    assert np.abs(held / held.sum() - gamma[4] / gamma[4].sum()).max() < 0.05


@pytest.mark.parametrize("name", ["hackpp", "heatkv"])
def test_policies_that_need_a_profile_say_so(name):
    with pytest.raises(ValueError, match=f"{name} needs a profile of the model: calibrate"):
        make_policy(name)
    old = profile_of(SCHEDULE, 2)
    assert old.version == 1
    with pytest.raises(ValueError, match=f"{name} needs statistics per head"):
        make_policy(name, old)


def test_ams_kv_keeps_these_scales_of_var_256():
    """By hand, 10 % of 424 tokens are 42: 1 and 4 stay, beside them the newest scales that fit.
    Scale 5 has 36, 41 in all; scale 6 has 64 and is not cached.
    """
    tokens = AMSKV().allocate(Problem(CacheGeometry(1, 1, 1), VAR_256, 42)).tokens[:, 0, 0]
    assert tokens.tolist() == [1, 5, 14, 30, 30, 41, 41, 41, 41, 0]


def test_ams_kv_keeps_these_scales_of_infinity():
    """650 tokens at 1 Mpx: nothing goes up to 521; 921 are too many, scale 7 (400) and the pinned 5
    leave 245 for scale 6's 256: out; scale 8 has 576 and fits with the pinned 5; the ones after it
    are too large, so that it stays.
    """
    tokens = AMSKV().allocate(Problem(CacheGeometry(1, 1, 1), INFINITY, 650)).tokens[:, 0, 0]
    assert tokens.tolist() == [1, 5, 21, 57, 121, 265, 521, 405, 581, 581, 581, 581, 0]
