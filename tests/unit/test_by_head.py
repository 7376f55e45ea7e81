"""Budgets of heads by the error that folding makes in each."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvruntime.calibration
import kvruntime.fold_errors
from kvruntime import CacheOptions
from kvruntime.calibration import calibrate
from kvruntime.tuning import attend_all, record
from policies import (
    CacheGeometry,
    Centroid,
    CentroidByHead,
    Problem,
    ScaleSchedule,
    check_allocation,
    make_policy,
)
from policies.by_head import FoldErrors, unit_of
from tests.codecs import coding_of
from tests.generations import TOLERANCE, Case, check_generation
from tests.profiles import profile_of
from tests.support import Spy

SCHEDULE = ScaleSchedule.of([1, 4, (5, 8), (8, 8), (9, 9), 3])
HEADS = 3


def falling(rng, heads=HEADS, layers=2, schedule=SCHEDULE):
    """Errors that are a power of the budget, another one for each head."""
    tokens = (4, 16, 64)
    size = (len(schedule), layers, heads)
    scales, powers = rng.uniform(0.1, 10.0, size), rng.uniform(0.2, 3.0, size)
    return FoldErrors(tokens, scales * np.array(tokens)[:, None, None, None] ** -powers)


def policy_of(errors):
    return CentroidByHead(errors=errors)


def allocate(policy, budget, layers=2, heads=HEADS, schedule=SCHEDULE):
    problem = Problem(CacheGeometry(layers, heads, 32), schedule, budget)
    allocation = policy.allocate(problem)
    check_allocation(allocation, problem)
    return allocation.tokens


def test_units_are_whole_pages_and_at_most_a_fifth_of_the_budget():
    budgets = (1, 39, 40, 79, 80, 159, 160, 319, 320, 6000)
    assert [unit_of(budget) for budget in budgets] == [0, 0, 8, 8, 16, 16, 32, 32, 64, 64]


def test_errors_follow_a_power_law_between_budgets_and_beyond():
    errors = falling(np.random.default_rng(0))
    measured = errors.at(np.array(errors.tokens), 2)
    assert np.allclose(measured, np.moveaxis(errors.errors[:, 2], 0, -1))
    lower, upper = measured[..., 0], measured[..., 2]
    power = np.log(lower / upper) / np.log(64 / 4)
    for tokens in (2, 9, 30, 200):
        found = errors.at(np.array([tokens]), 2)[..., 0]
        assert np.allclose(found, lower * (tokens / 4) ** -power)


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_heads_without_a_difference_get_the_same(error):
    """Where they fold without loss, or more tokens are of no use."""
    errors = FoldErrors((4, 16), np.full((2, 6, 2, HEADS), error))
    assert np.isfinite(errors.at(np.array([1, 8, 100]), 3)).all()
    assert (allocate(policy_of(errors), 40)[2:5] == 40).all()


def test_errors_are_read_as_convex_and_falling():
    """One budget that was measured worse than a smaller one, or hardly better, decides nothing."""
    measured = np.zeros((3, 6, 2, 2))
    measured[..., 0] = np.array([0.1, 0.1001, 0.01])[:, None, None]
    measured[..., 1] = np.array([0.1, 0.099, 0.098])[:, None, None]
    errors = FoldErrors((8, 16, 64), measured)
    between = 10 ** (-1 - np.log(2) / np.log(8))
    assert errors.at(np.array([8, 16, 64]), 3)[0, 0] == pytest.approx([0.1, between, 0.01])
    assert allocate(policy_of(errors), 40, heads=2)[4].tolist() == [[72, 8]] * 2
    steep = FoldErrors((1000, 1001), np.array([1.0, 0.0])[:, None, None, None] + measured[:1])
    assert np.isfinite(steep.at(np.array([1, 10, 100]), 3)).all()


def test_a_first_scale_that_is_large_is_shared_too():
    schedule = ScaleSchedule.of([16, 16])
    errors = falling(np.random.default_rng(1), schedule=schedule)
    tokens = allocate(policy_of(errors), 40, schedule=schedule)
    assert (tokens[0].sum(1) == 120).all() and np.ptp(tokens[0], axis=1).all()


@given(seed=st.integers(0, 1000), budget=st.integers(1, 130))
def test_a_layer_keeps_its_budget_in_units(seed, budget):
    tokens = allocate(policy_of(falling(np.random.default_rng(seed))), budget)
    unit, even = unit_of(budget), allocate(Centroid(), budget)
    assert (tokens.sum(2) <= even.sum(2)).all()
    for scale in range(len(SCHEDULE) - 1):
        if SCHEDULE.seen[scale] <= budget or not unit:
            assert (tokens[scale] == even[scale]).all()
            continue
        assert (tokens[scale] % unit == 0).all() and (tokens[scale] >= unit).all()
        before = tokens[scale - 1]
        full = (tokens[scale] == (before + SCHEDULE.tokens[scale]) // unit * unit).all(axis=1)
        assert (full | (tokens[scale].sum(1) == HEADS * budget // unit * unit)).all()


def test_no_other_share_of_the_units_has_less_error():
    rng = np.random.default_rng(3)
    for budget in (40, 55):
        kinks = np.exp(rng.normal(scale=0.5, size=(3, 6, 2, HEADS)))
        errors = FoldErrors((4, 16, 64), falling(rng).errors * kinks)
        tokens, unit = allocate(policy_of(errors), budget), unit_of(budget)
        count = HEADS * budget // unit
        for layer in range(2):
            scale = 3  # the first without a head that is full already
            room = (tokens[scale - 1, layer] + SCHEDULE.tokens[scale]) // unit
            at = [errors.at(np.arange(1, count + 1) * unit, scale + 1)[layer, h] for h in range(3)]
            best = min(
                sum(at[h][n - 1] for h, n in enumerate(split))
                for split in product(range(1, count + 1), repeat=HEADS)
                if sum(split) == count and (np.array(split) <= room).all()
            )
            ours = sum(at[h][n // unit - 1] for h, n in enumerate(tokens[scale, layer]))
            assert ours == pytest.approx(best)


def test_heads_that_are_alike_get_the_same():
    errors = FoldErrors((4, 16), np.broadcast_to([[[[0.4]]], [[[0.1]]]], (2, 6, 2, 2)))
    tokens = allocate(policy_of(errors), 48, heads=2)
    assert (tokens[3:5] == 48).all()


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int4"}, {"kv_dtype": "coded3"}])
@pytest.mark.parametrize("workspace", [1, 2**28])
def test_a_generation_of_heads_of_different_length(options, workspace):
    geometry = CacheGeometry(2, HEADS, 32, "float32", "float32")
    policy = policy_of(falling(np.random.default_rng(5)))
    assert np.ptp(allocate(policy, 40)[3], axis=1).all()
    if "coded3" in options.values():
        options = options | {"coding": coding_of(geometry)}
    case = Case(geometry, SCHEDULE, Spy(policy), 40, 16, 2, workspace, options)
    check_generation(case, case.cache(), TOLERANCE["float32"])


def test_what_does_not_fit_is_refused():
    errors = falling(np.random.default_rng(0))
    with pytest.raises(
        ValueError, match=r"errors of \(6, 2, 3\) scales, layers and heads, .* \(6, 2, 4\)"
    ):
        allocate(policy_of(errors), 40, heads=4)
    with pytest.raises(ValueError, match="keeps none"):
        allocate(policy_of(errors), 0)
    for tokens in ((4,), (16, 4, 64), (4, 4, 16)):
        with pytest.raises(ValueError, match="two budgets or more, ascending"):
            FoldErrors(tokens, errors.errors[: len(tokens)])
    with pytest.raises(ValueError, match=r"errors must be \[2, scales, layers, heads\], got \[3"):
        FoldErrors((4, 16), errors.errors)
    for profile in (None, profile_of(SCHEDULE, 2)):
        with pytest.raises(ValueError, match="needs a profile with the errors of folding"):
            make_policy("centroid_by_head", profile)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fold_tokens": (4, 4, 9)}, "ascending"),
        ({"fold_tokens": (4,)}, "two budgets or more"),
        ({"fold_tokens": (1, 4)}, "fold_errors must be of 2 budgets"),
        ({"fold_errors": ()}, "fold_errors must be of 3 budgets, 6 scales, 2 layers of 3 heads"),
        (
            {"version": 1, "mass": (), "column_variance": (), "query_means": (), "fold_errors": ()},
            "1",
        ),
        ({"version": 1, "mass": (), "column_variance": (), "query_means": ()}, "version 1"),
    ],
)
def test_errors_of_a_wrong_shape_are_refused(change, message):
    profile = profile_of(SCHEDULE, 2, HEADS)
    content = profile.model_dump() | change
    with pytest.raises(ValueError, match=message):
        type(profile).model_validate(content)


def test_negative_errors_are_refused():
    content = profile_of(SCHEDULE, 2, HEADS).model_dump()
    content["fold_errors"] = (np.array(content["fold_errors"]) - 2).tolist()
    with pytest.raises(ValueError, match="negative"):
        type(profile_of(SCHEDULE, 2)).model_validate(content)


def test_calibration_measures_what_folding_costs(tiny_model, monkeypatch):
    """Of the first rows of the first whole drawing, beside the recorded steps of the same one."""
    monkeypatch.setattr(kvruntime.fold_errors, "ROWS", 2)
    labels = torch.tensor([0, 2])

    def draw():
        tiny_model.generate(labels, seed=5)

    def give_up(scale, logits):
        if scale == 7:
            raise KeyboardInterrupt
        return logits.argmax(-1)

    def several():
        with pytest.raises(KeyboardInterrupt):
            tiny_model.draw(labels, give_up, 0.0)
        draw()
        tiny_model.generate(labels, seed=6)

    profile = calibrate(tiny_model, several, 4, "tiny")
    steps = record(tiny_model, draw, 2)
    scale = 1.0
    _, wanted = attend_all(steps, CacheOptions("full", 1.0), scale)
    assert profile.fold_tokens == (7, 17, 42, 106)  # of 424
    for budget, measured in zip(profile.fold_tokens, profile.fold_errors, strict=True):
        _, found = attend_all(steps, CacheOptions(Centroid(), budget), scale)
        for place, ours, whole in zip(sorted(steps.parts), found, wanted, strict=True):
            errors = (ours - whole).double().square().sum(dim=(0, 1, 3))
            errors /= whole.double().square().sum()
            table = torch.tensor(measured[place[0]][place[1]], dtype=torch.float64)
            assert torch.allclose(errors, table, rtol=1e-2, atol=1e-9)


def test_a_drawing_that_fails_leaves_no_generation(tiny_model, monkeypatch):
    closed = []
    close = kvruntime.fold_errors.FoldMeasurement.close

    def watched(folds):
        closed.extend(folds._open)
        close(folds)

    monkeypatch.setattr(kvruntime.fold_errors.FoldMeasurement, "close", watched)

    def draw():
        attention = tiny_model.blocks[1].attention
        monkeypatch.setattr(attention, "qkv", None)
        tiny_model.generate(torch.tensor([0]))

    with pytest.raises(TypeError):
        calibrate(tiny_model, draw, 1, "tiny")
    assert len(closed) == 4 and not any(generation.is_open for generation in closed)
