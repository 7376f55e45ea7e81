"""Each policy against its source: published budgets, selections worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from policies import (
    AMSKV,
    CacheGeometry,
    ScaleKV,
    ScaleSchedule,
    SlidingWindow,
    Step,
    StreamingLLM,
    load_preset,
    make_policy,
)
from policies.ams_kv import ams_kv_from
from policies.scalekv import drafters_from_selectivity, patch_centres, split_budget
from tests.support import profile_of, schedules

INFINITY_1M = ScaleSchedule.of([1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64])
PUBLISHED = {
    "infinity-2b": [(920, 632), (1490, 594), (2510, 526), (4100, 420), (6385, 465)],
    "infinity-8b": [(909, 629), (1464, 584), (2463, 503), (4054, 374), (6348, 188)],
}


@pytest.mark.parametrize("name", ["infinity-2b", "infinity-8b"])
def test_the_rule_regenerates_the_published_budgets(name):
    """METHODS 1.2: nine pairs exactly; 8B's last one is shipped as 6200/200, the rule says
    6348/188.
    """
    preset = load_preset(name)
    geometry = CacheGeometry(preset.layers, 1, 1)
    by_rule = replace(make_policy("scalekv", None, preset), published=None)
    as_published = make_policy("scalekv", None, preset)
    for policy, wanted in (
        (by_rule, PUBLISHED[name]),
        (as_published, [*PUBLISHED[name][:4], preset.budgets[4]]),
    ):
        lengths = policy.lengths(INFINITY_1M, geometry, 650)[:, :, 0]
        for index, (drafter, refiner) in enumerate(wanted):
            layers = set(preset.drafters[index])
            for layer in range(preset.layers):
                assert lengths[7 + index, layer] == (drafter if layer in layers else refiner)
            assert lengths[7 + index].mean() == 650
    assert preset.budgets[4] == ((6385, 465) if name == "infinity-2b" else (6200, 200))
    assert (lengths[:7] == np.array(INFINITY_1M.seen)[:7, None]).all(), "dropped too early"


@given(schedule=schedules, budget=st.integers(4, 60), layers=st.integers(1, 6), data=st.data())
def test_scalekv_budgets(schedule, budget, layers, data):
    """Mean at most the budget, refiners never below the window, drafters never below refiners."""
    roles = data.draw(
        st.lists(st.frozensets(st.integers(0, layers - 1)), min_size=1, max_size=len(schedule))
    )
    policy = ScaleKV(tuple(roles), grid=2)
    tokens = policy.lengths(schedule, CacheGeometry(layers, 1, 1), budget)[:-1, :, 0]
    held = np.zeros(layers, dtype=np.int64)
    for scale, line in enumerate(tokens):
        held = held + schedule.tokens[scale]
        if schedule.seen[scale] <= budget:
            assert (line == held).all()
        else:
            assert line.sum() <= budget * layers
            assert (line >= np.minimum(held, 4)).all()
            drafters = roles[min(scale + 1, len(roles) - 1)]
            refiners = [int(line[i]) for i in range(layers) if i not in drafters]
            for layer in drafters:
                assert line[layer] == held[layer] or line[layer] >= max(refiners, default=0)
        held = line


@given(
    room=st.lists(st.integers(30, 200), min_size=2, max_size=8),
    budget=st.integers(5, 30),
    floor=st.integers(1, 5),
    data=st.data(),
)
def test_the_mean_is_exact_where_all_have_room(room, budget, floor, data):
    layers = len(room)
    drafters = data.draw(st.frozensets(st.integers(0, layers - 1)))
    assume(0 < len(drafters) < layers)
    tokens = split_budget(np.array(room), drafters, budget, floor)
    assert tokens.sum() == budget * layers
    share = tokens[[i for i in range(layers) if i not in drafters]]
    assert (share == share[0]).all() and share[0] >= floor
    # no larger drafters' share works
    most = max(tokens[list(drafters)])
    for larger in range(int(most) + 1, max(room[i] for i in drafters) + 1):
        rest = budget * layers - sum(min(room[i], larger) for i in drafters)
        refiners = layers - len(drafters)
        assert rest < floor * refiners or rest % refiners


def test_drafters_are_the_pairs_with_the_smallest_z_score():
    schedule = ScaleSchedule.of([1, 2, 3])
    profile = profile_of(schedule, 4).model_copy(
        update={"selectivity": ((0.0,) * 4, (0.1, 0.5, 0.5, 0.5), (0.5, 0.5, 0.4, 0.41))}
    )
    assert drafters_from_selectivity(profile, 1 / 8) == (
        frozenset(),
        frozenset({0}),
        frozenset(),
    )
    assert drafters_from_selectivity(profile, 3 / 8) == (
        frozenset(),
        frozenset({0}),
        frozenset({2, 3}),
    )
    assert sum(map(len, drafters_from_selectivity(profile, 1e-6))) == 1


def test_drafter_layers_must_exist():
    with pytest.raises(ValueError, match="not one of the 4 layers"):
        ScaleKV((frozenset({4}),)).lengths(INFINITY_1M, CacheGeometry(4, 1, 1), 650)
    with pytest.raises(ValueError, match="not one of the 4 layers"):
        AMSKV(frozenset({4})).lengths(INFINITY_1M, CacheGeometry(4, 1, 1), 650)


@pytest.mark.parametrize(
    ("size", "centres"),
    [
        ((16, 16), [i * 16 + j for i in (1, 5, 9, 13) for j in (1, 5, 9, 13)]),
        ((20, 20), [i * 20 + j for i in (2, 7, 12, 17) for j in (2, 7, 12, 17)]),
        ((4, 4), list(range(16))),
        ((1, 1), [0]),
        ((8, 4), [i * 4 + j for i in (0, 2, 4, 6) for j in range(4)]),
        ((2, 4, 4), [i * 4 + j for i in (0, 2, 4, 6) for j in range(4)]),
    ],
)
def test_patch_centres(size, centres):
    assert patch_centres(size, 4).tolist() == centres


@given(schedule=schedules, grid=st.integers(1, 5))
def test_patch_centres_are_tokens_of_the_scale(schedule, grid):
    for size, tokens in zip(schedule.sizes, schedule.tokens, strict=True):
        centres = patch_centres(size, grid)
        assert 1 <= centres.size <= grid * grid and np.unique(centres).size == centres.size
        assert centres.min() >= 0 and centres.max() < tokens


def a_step(schedule, scale, cached, keep, rows=1, heads=1, dim=4, **changes):
    fresh = schedule.tokens[scale]
    generator = torch.Generator().manual_seed(0)
    step = Step(
        schedule,
        scale,
        0,
        np.full(heads, keep),
        np.concatenate([cached, np.arange(*schedule.span(scale))]),
        torch.randn(rows, fresh, heads, dim, generator=generator),
        torch.randn(rows, heads, len(cached) + fresh, dim, generator=generator),
        None,
        0.5,
    )
    return replace(step, **changes)


@pytest.mark.parametrize("pool", [1, 3])
def test_scalekv_selects_the_window_and_the_most_attended_others(pool):
    schedule = ScaleSchedule.of([4, 4])
    step = a_step(schedule, 1, np.arange(16), 12, rows=2, heads=3)
    step = replace(step, schedule=ScaleSchedule.of([4, 4, 4]))
    places = ScaleKV(grid=2, pool=pool).select(step)
    assert places.shape == (2, 3, 12)
    window = [16 + centre for centre in patch_centres((4, 4), 2)]
    for row in range(2):
        for head in range(3):
            q = step.queries[row, patch_centres((4, 4), 2), head].double()
            weights = (q @ step.keys[row, head].double().t() * 0.5).softmax(-1).sum(0)
            if pool == 3:
                padded = [weights[max(0, i - 1) : i + 2].mean() for i in range(32)]
                weights = torch.stack(padded)
            weights[window] = torch.inf
            wanted = sorted(weights.topk(12).indices.tolist())
            assert places[row, head].tolist() == wanted


def test_scalekv_parameters():
    with pytest.raises(ValueError, match="grid must be positive, got 0"):
        ScaleKV(grid=0)
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="refiner_share must be in"):
            ScaleKV(refiner_share=share)
    for pool in (0, 2, -1):
        with pytest.raises(ValueError, match=f"pool must be odd and positive, got {pool}"):
            ScaleKV(pool=pool)


def kept_tokens(policy, step):
    return step.tokens[policy.select(step)].tolist()


def test_sliding_window_keeps_the_newest_wherever_they_lie():
    schedule = ScaleSchedule.of([1, 2, 3, 4])
    step = a_step(schedule, 2, np.array([4, 0, 2]), 11)
    assert sorted(kept_tokens(SlidingWindow(), step)) == [2, 4, *range(5, 14)][-11:]


def test_streaming_llm_keeps_sinks_and_the_newest():
    schedule = ScaleSchedule.of([1, 2, 3, 4])
    step = a_step(schedule, 2, np.array([4, 0, 2, 1, 3]), 7)
    assert sorted(kept_tokens(StreamingLLM(2), step)) == [0, 1, 9, 10, 11, 12, 13]
    with pytest.raises(ValueError, match="sinks must be positive, got 0"):
        StreamingLLM(0)


def test_ams_kv_keeps_condensed_and_newest_scales():
    schedule = ScaleSchedule.of([1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
    geometry = CacheGeometry(2, 1, 1)
    # C_min = 60, C_max = 140: layer 0 demands
    policy = AMSKV(frozenset({0}), min_share=0.6)
    assert policy.capacities(2, 100).tolist() == [140, 60]
    lengths = policy.lengths(schedule, geometry, 100)[:, :, 0]
    assert lengths[5].tolist() == [91, 91], "nothing is dropped while the history fits"
    # scale 6 (64 tokens): layer 0 keeps 1 + 4, 36, 64 and 25; layer 1 cannot cache 64, keeps 36
    assert lengths[6].tolist() == [5 + 25 + 36 + 64, 5 + 36]
    # scale 7 (100 tokens): layer 0 keeps 5 + 100; layer 1 keeps what it has
    assert lengths[7].tolist() == [105, 41]
    assert lengths[8].tolist() == [105, 41], "169 tokens fit in neither"
    step = a_step(schedule, 6, np.arange(91), 130)
    assert sorted(kept_tokens(policy, step)) == [*range(5), *range(30, 155)]
    step = a_step(schedule, 6, np.arange(91), 41, layer=1)
    assert sorted(kept_tokens(policy, step)) == [*range(5), *range(55, 91)]


@given(schedule=schedules, budget=st.integers(1, 60), layers=st.integers(1, 4), data=st.data())
def test_ams_kv_holds_whole_scales_within_the_budget(schedule, budget, layers, data):
    policy = AMSKV(
        data.draw(st.frozensets(st.integers(0, layers - 1))),
        data.draw(st.floats(0.05, 1.0)),
        data.draw(st.integers(1, 2)),
    )
    try:
        lengths = policy.lengths(schedule, CacheGeometry(layers, 1, 1), budget)[:, :, 0]
    except ValueError:
        assume(False)
    capacities = policy.capacities(layers, budget)
    assert capacities.sum() <= budget * layers
    for layer in range(layers):
        held = np.empty(0, dtype=np.int64)
        for scale in range(len(schedule) - 1):
            keep = int(lengths[scale, layer])
            step = a_step(schedule, scale, held, keep, layer=layer)
            held = step.tokens[policy.select(step)]
            if scale >= policy.condensed and schedule.seen[scale] > budget:
                assert held.size <= capacities[layer]
            whole = {s for s in range(scale + 1) if schedule.span(s)[0] in held}
            wanted = [token for s in whole for token in range(*schedule.span(s))]
            assert sorted(held.tolist()) == sorted(wanted)
            pinned = set(range(min(policy.condensed, scale + 1)))
            assert pinned <= whole
            rest = sorted(whole - pinned)
            assert rest == list(range(rest[0], rest[-1] + 1)) if rest else True


@pytest.mark.parametrize(("sizes", "condensed"), [([4, 8], 2), ([4, 8, 9], 3)])
def test_ams_kv_refuses_pinned_scales_beyond_the_budget(sizes, condensed):
    with pytest.raises(ValueError, match="budget 5 gives a layer 5 tokens"):
        AMSKV(condensed=condensed).lengths(ScaleSchedule.of(sizes), CacheGeometry(1, 1, 1), 5)


def test_numpy_sides_make_a_schedule():
    assert ScaleSchedule.of(np.array([1, 2])) == ScaleSchedule.of([1, (2, 2)])


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


@pytest.mark.parametrize(
    "sizes", [[], [0], [(1, 0)], [(1,)], [(1, 2, 3, 4)], [(1, -2)], [(1, 1.5)], [1.5], [None]]
)
def test_schedules_are_validated(sizes):
    with pytest.raises(ValueError, match="a sc"):
        ScaleSchedule.of(sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1), "layers must be a positive integer, got 0"),
        ((1, -1, 1), "heads must be a positive integer, got -1"),
        ((1, 1, 0), "head_dim must be a positive integer, got 0"),
        ((2.0, 1, 1), r"layers must be a positive integer, got 2\.0"),
        ((1, 1, 1, "int3"), "dtype 'int3' is not one of"),
    ],
)
def test_geometry_is_validated(arguments, message):
    with pytest.raises(ValueError, match=message):
        CacheGeometry(*arguments)


@given(schedule=schedules, share=st.floats(0.0001, 1.0))
def test_a_fraction_never_keeps_more_than_it_says_nor_nothing(schedule, share):
    if schedule.history and share * schedule.history < 1 - 1e-6:
        with pytest.raises(ValueError, match="keeps none"):
            schedule.resolve(share)
    elif schedule.history:
        tokens = schedule.resolve(share)
        assert 1 <= tokens <= share * schedule.history + 1e-6
        assert tokens > share * schedule.history - 1
