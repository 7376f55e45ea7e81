"""ScaleKV against its source: published budgets, roles, selections worked out by hand; budgets
and schedules.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from policies import (
    AMSKV,
    POLICY_NAMES,
    CacheGeometry,
    Candidates,
    Problem,
    ScaleKV,
    ScaleSchedule,
    StepSizes,
    load_preset,
    make_policy,
)
from policies.budgets import split_budget
from policies.scalekv import drafters_from_selectivity
from policies.scoring import patch_centres
from policies.scratch import lend
from tests.profiles import problem_of, profile_of
from tests.support import schedules

INFINITY_1M = ScaleSchedule.of([1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64])
PUBLISHED = {
    "infinity-2b": [(920, 632), (1490, 594), (2510, 526), (4100, 420), (6385, 465)],
    "infinity-8b": [(909, 629), (1464, 584), (2463, 503), (4054, 374), (6348, 188)],
}


def tokens_of(policy, schedule, layers, budget):
    """Tokens of a lane, [scales, layers]; the same for all heads."""
    tokens = policy.allocate(Problem(CacheGeometry(layers, 2, 1), schedule, budget)).tokens
    assert (tokens == tokens[:, :, :1]).all() and not tokens[-1].any()
    return tokens[:, :, 0]


@pytest.mark.parametrize("name", ["infinity-2b", "infinity-8b"])
def test_the_rule_regenerates_the_published_budgets(name):
    """METHODS 1.2: nine pairs exactly; 8B's last one is shipped as 6200/200, the rule says
    6348/188.
    """
    preset = load_preset(name)
    by_rule = replace(make_policy("scalekv", None, preset), published=None)
    as_published = make_policy("scalekv", None, preset)
    for policy, wanted in (
        (by_rule, PUBLISHED[name]),
        (as_published, [*PUBLISHED[name][:4], preset.budgets[4]]),
    ):
        lengths = tokens_of(policy, INFINITY_1M, preset.layers, 650)
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
    tokens = tokens_of(policy, schedule, layers, budget)[:-1]
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
    for policy in (ScaleKV((frozenset({4}),)), AMSKV(frozenset({4}))):
        with pytest.raises(ValueError, match="not one of the 4 layers"):
            tokens_of(policy, INFINITY_1M, 4, 650)


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


def content_of(policy, schedule, scale, cached, keep, rows=2, dim=4, dtype="float32", bias=None):
    """Random candidates of a step, with the scratch that the policy declares."""
    heads, fresh = len(keep), schedule.tokens[scale]
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    q = torch.randn(rows, fresh, heads, dim, generator=generator).to(kind)
    keys, values = torch.randn(2, rows, heads, cached + fresh, dim, generator=generator).to(kind)
    sizes = StepSizes(rows, heads, dim, dtype, cached, fresh, max(keep))
    scratch = lend(policy.scratch(sizes), torch.device("cpu"))
    for part in scratch.values():
        part.fill_(torch.nan if part.is_floating_point() else 77)
    return Candidates(
        problem_of(schedule),
        scale,
        0,
        np.array(keep),
        torch.empty(0, dtype=torch.int64),
        q,
        keys,
        values,
        bias,
        0.5,
        scratch,
    )


@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", [(12, 12, 12), (12, 5, 9)])
def test_scalekv_selects_the_window_and_the_most_attended_others(pool, dtype, keep):
    schedule = ScaleSchedule.of([4, 4, 4])
    policy = ScaleKV(grid=2, pool=pool)
    candidates = content_of(policy, schedule, 1, 16, keep, dtype=dtype)
    selection = policy.select(candidates)
    assert selection.keep.shape == (2, 3, 12) and selection.into is None
    centres = patch_centres((4, 4), 2)
    window = [16 + centre for centre in centres]
    for row in range(2):
        for head in range(3):
            q = candidates.queries[row, centres, head].double()
            weights = (q @ candidates.keys[row, head].double().t() * 0.5).softmax(-1).sum(0)
            if pool == 3:
                padded = [weights[max(0, i - 1) : i + 2].mean() for i in range(32)]
                weights = torch.stack(padded)
            weights[window] = torch.inf
            wanted = sorted(weights.topk(keep[head]).indices.tolist())
            assert selection.keep[row, head, : keep[head]].tolist() == wanted


def test_log_weights_and_missing_candidates_count_in_scores():
    """A candidate that stands for many tokens gets their attention; one that is not there none."""
    schedule = ScaleSchedule.of([4, 4, 4])
    policy = ScaleKV(grid=2)
    bias = torch.zeros(2, 1, 1, 32)
    bias[:, :, :, 3] = 9.0
    bias[:, :, :, 10:16] = -torch.inf
    candidates = content_of(policy, schedule, 1, 16, (6,), bias=bias)
    kept = policy.select(candidates).keep
    assert (kept == 3).any(-1).all()
    everything = content_of(policy, schedule, 1, 16, (26,), bias=bias)
    kept = policy.select(everything).keep
    assert kept[0, 0].tolist() == kept[1, 0].tolist() == [*range(10), *range(16, 32)]


def test_scalekv_parameters():
    with pytest.raises(ValueError, match="grid must be positive, got 0"):
        ScaleKV(grid=0)
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="refiner_share must be in"):
            ScaleKV(refiner_share=share)
    for pool in (0, 2, -1):
        with pytest.raises(ValueError, match=f"pool must be odd and positive, got {pool}"):
            ScaleKV(pool=pool)


def test_budgets_below_the_window_or_of_nothing():
    for name, budget, message in (
        ("scalekv", 15, "budget 15 is below the window of 16 tokens"),
        ("centroid", 0, "a budget of 0 tokens of 6425 of history keeps none"),
        ("sliding_window", -1, "a budget of -1 tokens of 6425 of history keeps none"),
        ("streaming_llm", 4, "budget 4 leaves nothing beside 4 sinks"),
    ):
        with pytest.raises(ValueError, match=message):
            tokens_of(make_policy(name), INFINITY_1M, 2, budget)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_needs(name):
    policy = make_policy(name, profile_of(ScaleSchedule.of([1, 2, 3, 4, 5]), 1, heads=1))
    assert policy.name == name
    by_number = {"full", "ams_kv", "sliding_window", "streaming_llm", "heatkv"}
    ours, planes = ("centroid", "centroid_by_head"), {"h2o": ("score",), "hackpp": ("scale",)}
    assert policy.needs.content == (name not in by_number)
    assert policy.needs.planes == (("log_weight",) if name in ours else planes.get(name, ()))
    assert policy.needs.folds == (name in (*ours, "hack"))
    scratch = policy.scratch(StepSizes(1, 1, 4, "float32", 3, 2, 4))
    assert bool(scratch) == policy.needs.content
    with pytest.raises(ValueError, match=f"unknown policy 'lru'; there are .*{name}"):
        make_policy("lru")


def test_numpy_sides_make_a_schedule():
    assert ScaleSchedule.of(np.array([1, 2])) == ScaleSchedule.of([1, (2, 2)])


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


@given(schedule=schedules, share=st.floats(0.0001, 1.0), count=st.integers(1, 200))
def test_budgets_resolve_to_tokens(schedule, share, count):
    """A fraction of the history rounds down, to none where it is so small; counts are capped."""
    tokens = schedule.resolve(share)
    assert share * schedule.history - 1 < tokens <= share * schedule.history + 1e-6
    assert schedule.resolve(1.0) == schedule.history
    assert schedule.resolve(count) == min(count, schedule.total)


def test_fractions_that_are_just_whole():
    """0.29 x 100 is 28.999999999999996 in binary."""
    assert ScaleSchedule.of([10, 1]).resolve(0.29) == 29
    assert INFINITY_1M.resolve(0.10) == 642
