"""The planner against the published tables (METHODS 0.3), and its refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest

from kvruntime import Allocation, CacheOptions, WillNeverFit, plan
from kvruntime.catalogue import (
    ASPECT_RATIOS,
    MODEL_NAMES,
    RESOLUTIONS,
    find_model,
    infinity_schedule,
)
from kvruntime.planning import choose_policy, make_plan, max_rows, require
from kvruntime.planning.fit import default_page_size
from kvruntime.planning.rows import MAX_ROWS
from policies import CacheGeometry, Full, ScaleKV, ScaleSchedule, load_preset
from tests.profiles import profile_of

MIB = 2**20
SLIM = CacheGeometry(1, 1, 1)


def made_of(geometry, schedule, policy, budget=1, rows=1, **options):
    """A plan without a catalogue."""
    return make_plan(geometry, schedule, policy, CacheOptions(policy, budget, **options), rows)


def published(name):
    return find_model(name).with_dtypes("float32", "bfloat16")


@pytest.mark.parametrize(
    ("name", "budget", "mib"),
    [
        ("infinity-8b", "full", 84_328),
        ("infinity-8b", 1300, 17_062),
        ("infinity-8b", 650, 8_531),
        ("infinity-8b", 265, 3_478),
        ("infinity-2b", "full", 38_550),
        ("infinity-2b", 1300, 7_800),
        ("infinity-2b", 650, 3_900),
        ("infinity-2b", 265, 1_590),
    ],
)
def test_scalekv_table_1(name, budget, mib):
    if budget == "full":
        made = plan(published(name), 8, "full")
        assert made.baseline_bytes()["history_bytes"] == made.token_bytes
    else:
        made = plan(published(name), 8, budget=budget)
    assert made.token_bytes // MIB == mib


def test_hackpp_counts_the_last_scale():
    total = plan(published("infinity-8b"), 1, "full").baseline_bytes()["all_scales_bytes"]
    assert round(total / 2**30, 2) == 16.86


def test_bf16():
    assert round(plan("infinity-8b", 8, "full").token_bytes / MIB) == 56_219
    assert math.ceil(plan("infinity-8b", 8, budget=650).token_bytes / MIB) == 5_688


def test_torch_cat_holds_one_layers_history_twice():
    made = plan("infinity-2b", 1, "full")
    base = made.baseline_bytes()
    one_layer_v = 6425 * 2048 * 2 * 2
    assert base["with_cat_copy_bytes"] == base["all_scales_bytes"] + one_layer_v
    mixed = plan(published("infinity-2b"), 1, "full").baseline_bytes()
    k_copy = 6425 * 2048 * 4 * 2 - 4096 * 2048 * 2 * 2
    assert mixed["with_cat_copy_bytes"] == mixed["all_scales_bytes"] + k_copy


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_model_of_the_catalogue_plans(name):
    made = plan(name, 2, "full")
    assert made.rows == 4
    assert made.budget_tokens == int(0.1 * made.schedule.history)
    assert made.tokens.max() == made.schedule.history


def test_the_catalogue_has_the_published_geometries():
    geometry = {name: find_model(name).geometry for name in MODEL_NAMES}
    for depth in (16, 20, 24, 30, 36):
        model = geometry[f"var-d{depth}"]
        assert (model.layers, model.heads, model.head_dim) == (depth, depth, 64)
    assert geometry["infinity-125m"].heads * geometry["infinity-125m"].head_dim == 768
    assert find_model("var-d30").schedule.total == 680
    assert (find_model("var-d36").schedule.total, find_model("var-d36").schedule.history) == (
        2240,
        1216,
    )
    assert find_model("Infinity-8B").schedule.history == 6425


def test_infinity_schedules():
    assert len(ASPECT_RATIOS) == 15
    for resolution, scales in RESOLUTIONS.items():
        for aspect in ASPECT_RATIOS:
            schedule = infinity_schedule(resolution, aspect)
            assert len(schedule) == scales
            height, width = schedule.sizes[-1]
            assert abs(height / width - float(aspect)) < 0.011
    assert infinity_schedule("1M", "1.500").sizes[-1] == (78, 52)
    assert infinity_schedule("1M", "0.667").sizes[-1] == (52, 78)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_model("gpt-2"), "unknown model 'gpt-2'"),
        (lambda: find_model("var-d16", resolution="1M"), "has one schedule"),
        (lambda: find_model("var-d16", aspect="1.500"), "has one schedule"),
        (lambda: infinity_schedule("2M"), "resolution '2M' is not one of"),
        (lambda: infinity_schedule("1M", "9"), "aspect ratio '9' is not one of"),
        (lambda: plan("var-d16", 0), "batch must be a positive integer, got 0"),
        (lambda: plan("var-d16", True), "batch must be a positive integer, got True"),
        (lambda: plan("var-d16", 1.5), "batch must be a positive integer, got 1.5"),
        (
            lambda: plan("var-d16", page_size=0),
            r"page_size must be a positive integer up to 2\^30, got 0",
        ),
        (lambda: plan("var-d16", page_size=True), "page_size must be a positive integer"),
        (lambda: plan("var-d16", budget=math.nan), "got nan"),
        (lambda: plan("var-d16", budget=-0.5), "got -0.5"),
        (lambda: plan("var-d16", budget=1.5), "got 1.5"),
        (lambda: plan("var-d16", budget=math.inf), "got inf"),
        (lambda: plan("var-d16", budget=0), "must be positive, got 0"),
        (lambda: plan("var-d16", budget=True), "must be a number, got True"),
        (lambda: plan("var-d16", budget="0.1"), "a budget in bytes is a share .* got '0.1'"),
        (lambda: plan("var-d16", 1, "centroid", 0.001), "keeps none"),
        (lambda: plan("var-d16", budget=0.001), "budget 0 is below the window of 16"),
        (lambda: plan("var-d16", budget=15), "budget 15 is below the window of 16"),
        (lambda: plan("var-d16", policy="lru"), "unknown policy 'lru'"),
        (lambda: plan("var-d16", policy="streaming_llm", budget=4), "leaves nothing beside 4"),
        (lambda: plan("var-d16", policy="ams_kv", budget=4), "first 2 scales need 5"),
        (
            lambda: plan("var-d16", profile=profile_of(ScaleSchedule.of([1, 2]), 3)),
            "the profile has 3 layers, the model 16",
        ),
        (lambda: plan("var-d16", workspace=0), "workspace must be a positive number of bytes"),
        (lambda: plan("var-d16", batch=2**30), r"rows must be a positive integer up to 2\^30"),
        (lambda: made_of(SLIM, ScaleSchedule.of([1]), Full(), rows=-1), r"2\^30, got -1"),
        (lambda: made_of(SLIM, ScaleSchedule.of([1]), Full(), page_size=2**31), r"page_size must"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_default_page_sizes():
    assert default_page_size(find_model("var-d30").schedule) == 16
    assert default_page_size(find_model("infinity-2b").schedule) == 64
    assert default_page_size(ScaleSchedule.of([32, 1])) == 64
    assert default_page_size(ScaleSchedule.of([(1023, 1), 1])) == 16


def test_one_picture_by_default():
    assert plan("var-d16").rows == 2


def test_memory_is_required_before_anything_is_made():
    fits = max_rows(plan("infinity-8b", 8, memory="80GiB"), 80 * 2**30)
    with pytest.raises(WillNeverFit) as caught:
        plan("infinity-8b", fits // 2 + 1, memory=80 * 2**30)
    assert caught.value.total == 80 * 2**30 < caught.value.needed
    assert f"{fits} of" in str(caught.value)
    with pytest.raises(
        WillNeverFit,
        match=r": not one row fits: lower the budget, the resolution or the workspace$",
    ):
        plan("infinity-8b", 1, memory=10 * MIB)
    with pytest.raises(WillNeverFit):
        plan("infinity-8b", 8, memory=80 * 2**30, reserved=79 * 2**30)


def test_a_plan_that_fits_exactly():
    made = plan("var-d16", 1)
    require(made, made.total_bytes)
    require(made, made.total_bytes + 5, reserved=5)
    with pytest.raises(WillNeverFit):
        require(made, made.total_bytes - 1)
    with pytest.raises(WillNeverFit):
        require(made, made.total_bytes + 4, reserved=5)


def test_max_rows_reserves_nothing_by_default_and_stops_somewhere():
    made = plan("var-d16", 1)
    assert max_rows(made, made.total_bytes) == 2
    assert max_rows(made, made.total_bytes - 1) == 1
    assert max_rows(made, made.total_bytes, reserved=1) == 1
    assert max_rows(made, 0) == 0
    # a single scale returns one number for each row, and caches nothing
    one_scale = made_of(SLIM, ScaleSchedule.of([1]), Full())
    assert max_rows(one_scale, 2**30) == MAX_ROWS == 2**20


def test_the_largest_and_the_least():
    made = made_of(SLIM, ScaleSchedule.of([1, 2]), Full(), 1, 2**30, page_size=2**30, workspace=1)
    assert made.peak_pages == 2**30 and made.chunk_rows == 1


def roles_of(policy, name, **options):
    known = find_model(name)
    return choose_policy(CacheOptions(policy, **options), known.geometry, known.schedule)


def test_presets_serve_their_model_only():
    policy, note = roles_of("scalekv", "infinity-8b")
    assert policy.published == load_preset("infinity-8b") is not None
    assert note == "published preset of infinity-8b"
    assert plan("infinity-8b").policy == policy
    policy, note = roles_of("scalekv", "infinity-125m")
    assert policy.published is None and note == "none: all layers alike"
    # another number format is the same model, another schedule of its own is not
    known = find_model("infinity-8b").with_dtypes("float32", "float16")
    assert plan(known).policy.published is not None
    wide = replace(known, schedule=ScaleSchedule.of([1, 2, 3]))
    assert plan(wide, budget=1.0, page_size=1, policy="full").policy == Full()
    assert choose_policy(CacheOptions(), wide.geometry, wide.schedule)[0] == ScaleKV()
    full = Full()
    assert roles_of(full, "infinity-8b") == (full, "the policy object's own")


def test_the_bundled_models_profile_is_used():
    policy, note = roles_of("scalekv", "emoji64")
    assert policy.drafters and note == "profile of emoji64"
    assert plan("emoji64").policy == policy
    assert not plan("emoji64", policy=ScaleKV()).policy.drafters


def test_profiles_by_object_or_file(tmp_path):
    known = find_model("var-d16")
    profile = profile_of(known.schedule, 16)
    profile.save(tmp_path / "profile.json")
    other = profile_of(ScaleSchedule.of([1, 2]), 16)
    for given in (profile, tmp_path / "profile.json", str(tmp_path / "profile.json")):
        policy, note = roles_of("scalekv", "var-d16", profile=given)
        assert policy.drafters and policy.published is None and note == "given"
        assert plan("var-d16", profile=given).policy == policy
    assert roles_of("scalekv", "var-d16", profile=other)[1] == "given, made for another schedule"


def test_allocations_are_checked():
    geometry, schedule = CacheGeometry(2, 3, 1), ScaleSchedule.of([1, 2, 2])
    right = np.array([1, 5, 0])[:, None, None].repeat(2, 1).repeat(3, 2)

    def planned(tokens, quantised=None):
        class Fixed(Full):
            def allocate(self, problem):
                return Allocation(tokens, quantised)

        return made_of(geometry, schedule, Fixed())

    assert planned(right).tokens is right
    with pytest.raises(ValueError, match=r"tokens must be int64 \(3, 2, 3\), got float64"):
        planned(right.astype(float))
    with pytest.raises(
        ValueError, match=r"tokens must be int64 \(3, 2, 3\), got int64 \(3, 2, 1\)"
    ):
        planned(right[:, :, :1])
    for place, tokens in (((0, 1, 2), 2), ((1, 0, 0), 6), ((1, 1, 1), -1), ((2, 0, 1), 1)):
        wrong = right.copy()
        wrong[place] = tokens
        with pytest.raises(ValueError, match="fewer than none, more than it has, or some after"):
            planned(wrong)
    with pytest.raises(ValueError, match=r"quantised must be bool \(3, 2\), got bool \(2, 3\)"):
        planned(right, np.zeros((2, 3), dtype=bool))
    for scale in (0, 1):
        again = np.zeros((3, 2), dtype=bool)
        again[scale, 0] = True
        with pytest.raises(ValueError, match="quantised tokens cannot become exact again"):
            planned(right, again)
    ragged = right.copy()
    ragged[1, 0] = (0, 5, 2)
    made = planned(ragged)
    assert made.peak_pages == max(made.row_pages.ravel()) == 6
