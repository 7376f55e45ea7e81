"""The planner against the published tables (METHODS 0.3), and its refusals."""

import math

import numpy as np
import pytest

from kvruntime import WillNeverFit, plan
from kvruntime.catalogue import (
    ASPECT_RATIOS,
    MODEL_NAMES,
    RESOLUTIONS,
    find_model,
    infinity_schedule,
)
from kvruntime.plan import MAX_ROWS, choose_policy, default_page_size, plan_generation, profile_note
from policies import CacheGeometry, Full, ScaleKV, ScaleSchedule, SlidingWindow, load_preset
from tests.support import RandomPolicy, profile_of

MIB = 2**20


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
    assert made.lengths.max() == made.schedule.history


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
        (lambda: plan("var-d16", budget="0.1"), "must be a number, got '0.1'"),
        (lambda: plan("var-d16", budget=0.001), "keeps none"),
        (lambda: plan("var-d16", budget=15), "budget 15 is below the window of 16"),
        (lambda: plan("var-d16", policy="lru"), "unknown policy 'lru'"),
        (lambda: plan("var-d16", policy="streaming_llm", budget=4), "leaves nothing beside 4"),
        (lambda: plan("var-d16", policy="ams_kv", budget=4), "first 2 scales need 5"),
        (
            lambda: plan("var-d16", profile=profile_of(ScaleSchedule.of([1, 2]), 3)),
            "the profile has 3 layers, the model 16",
        ),
        (
            lambda: plan_generation(
                CacheGeometry(1, 1, 1), ScaleSchedule.of([1]), Full(), 1, 1, workspace_limit=0
            ),
            "workspace_limit must be positive, got 0",
        ),
        (
            lambda: plan_generation(CacheGeometry(1, 1, 1), ScaleSchedule.of([1]), Full(), 1, -1),
            r"rows must be a positive integer up to 2\^30, got -1",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_policies_without_queries_keep_the_same_in_all_heads():
    schedule = ScaleSchedule.of([1, 3, 4])
    with pytest.raises(ValueError, match="random has no queries, so all heads"):
        odd = RandomPolicy(0, num_queries=0, is_ragged=True)
        plan_generation(CacheGeometry(2, 4, 2), schedule, odd, 5, 1)


def test_memory_is_required_before_anything_is_made():
    fits = plan("infinity-8b", 8, memory=80 * 2**30).max_rows(80 * 2**30)
    with pytest.raises(WillNeverFit) as caught:
        plan("infinity-8b", fits // 2 + 1, memory=80 * 2**30)
    assert caught.value.total == 80 * 2**30 < caught.value.needed
    assert f"{fits} of" in str(caught.value)
    with pytest.raises(
        WillNeverFit, match=r": not one row fits: lower the budget or the resolution$"
    ):
        plan("infinity-8b", 1, memory=10 * MIB)
    with pytest.raises(WillNeverFit):
        plan("infinity-8b", 8, memory=80 * 2**30, reserved=79 * 2**30)


def test_a_plan_that_fits_exactly():
    made = plan("var-d16", 1)
    made.require(made.total_bytes)
    made.require(made.total_bytes + 5, reserved=5)
    with pytest.raises(WillNeverFit):
        made.require(made.total_bytes - 1)


def test_default_page_sizes():
    assert default_page_size(find_model("var-d30").schedule) == 16
    assert default_page_size(find_model("infinity-2b").schedule) == 64
    assert default_page_size(ScaleSchedule.of([32, 1])) == 64
    assert default_page_size(ScaleSchedule.of([(1023, 1), 1])) == 16


def test_presets_serve_their_model_only():
    assert choose_policy("scalekv", None, 40, "infinity-8b").published is not None
    assert choose_policy("scalekv", None, 40).published is None
    assert plan("infinity-8b").policy.published == load_preset("infinity-8b")
    assert plan("infinity-125m").policy.published is None
    full = Full()
    assert choose_policy(full, None, 40) is full


def test_scratch_of_a_policy_with_queries():
    """Byte by byte: 2 scales before the last, one layer, one head of 4 numbers in float32."""
    schedule = ScaleSchedule.of([4, 4, 4])
    made = plan_generation(CacheGeometry(1, 1, 4, "float32", "float32"), schedule, Full(), 1, 1, 16)
    # at scale 1 (16 cached) 8 bytes each for a page id, a length and 16 slots; 48 tokens gathered
    assert made.workspace_row_tokens == 48
    assert made.workspace_bytes == 48 * 4 * 8 + (1 + 1 + 16) * 8
    scored = plan("var-d16", 1, budget=42)
    rows, heads, dim = 2, 16, 64
    gather = max(42 + 256, 48) * heads * dim * 4
    candidates = 42 + 169
    score = candidates * (16 * (2 + 4) + 4)  # bfloat16 products, float32 weights
    queries = 2 * 16 * dim * 2
    ids = (3 + 1 + 42) * 8  # pages of 16, a length, slots
    assert scored.workspace_bytes == rows * (gather + heads * (score + queries + ids))


def test_scratch_where_choosing_and_moving_weigh_more_than_scoring():
    """One query, one head of 64 numbers: survivors in float32, K or V, outweigh the scores."""
    schedule = ScaleSchedule.of([8, 8, 1])
    policy = ScaleKV(grid=1)
    geometry = CacheGeometry(1, 1, 64, "float32", "float32")
    made = plan_generation(geometry, schedule, policy, 100, 1, 16)
    gather = 128 * 64 * 8
    ids = (4 + 1 + 100) * 8
    # 128 candidates, 100 kept: K or V, and the chosen places
    assert made.workspace_bytes == gather + 100 * (64 * 4 + 8) + ids
    slim = CacheGeometry(1, 1, 1, "float32", "float32")
    made = plan_generation(slim, schedule, policy, 100, 1, 16)
    # scores of 4 bytes, then values, places, and both sorted
    assert made.workspace_bytes == 128 * 8 + 128 * 4 + 100 * (4 + 24) + ids
    wide = plan_generation(slim, schedule, ScaleKV(grid=2), 100, 1, 16)
    choose = max(128 * (4 * 4 + 4) + 2 * 4 * 4, 128 * 4 + 100 * 28)
    assert wide.workspace_bytes == 128 * 8 + choose + ids
    # nothing dropped: only the page ids, and the slots of the fresh tokens
    kept = plan_generation(slim, schedule, policy, 128, 1, 1)
    assert kept.workspace_bytes == 129 * 8 + (64 + 1 + 64) * 8


def test_scratch_at_the_edges():
    slim = CacheGeometry(1, 1, 1, "float32", "float32")
    # six scales of a token: the last one gathers five tokens from three pages of two
    made = plan_generation(slim, ScaleSchedule.of([1] * 6), Full(), 1, 1, 2)
    assert made.workspace_bytes == 6 * 8 + (2 + 1 + 1) * 8
    schedule = ScaleSchedule.of([8, 8, 1])
    made = plan_generation(slim, schedule, ScaleKV(), 100, 1, 16)
    ids = (4 + 1 + 100) * 8
    assert made.workspace_bytes == 128 * 8 + 128 * (16 * 4 + 4) + 2 * 16 * 4 + ids
    # one token kept
    made = plan_generation(slim, schedule, ScaleKV(grid=1), 1, 1, 16)
    assert made.workspace_bytes == 65 * 8 + 65 * (4 + 4) + 2 * 4 + (1 + 1 + 1) * 8
    # nothing kept
    made = plan_generation(slim, ScaleSchedule.of([3]), ScaleKV(), 0.5, 1)
    assert made.workspace_bytes == 9 * 8 + 8


def test_the_largest_and_the_least():
    schedule = ScaleSchedule.of([1, 2])
    slim = CacheGeometry(1, 1, 1)
    made = plan_generation(slim, schedule, Full(), 1, 2**30, 2**30, 1)
    assert made.peak_pages == 2**30 and made.chunk_rows == 1
    for rows, page_size in ((2**30 + 1, 1), (1, 2**30 + 1)):
        with pytest.raises(ValueError, match=r"positive integer up to 2\^30, got 1073741825"):
            plan_generation(slim, schedule, Full(), 1, rows, page_size)


def test_a_policy_object_has_roles_of_its_own():
    profile = profile_of(find_model("var-d16").schedule, 16)
    with pytest.raises(ValueError, match=r"^full is an object with roles of its own: give no"):
        choose_policy(Full(), profile, 16)


def test_where_roles_come_from(tmp_path):
    schedule = find_model("var-d16").schedule
    profile = profile_of(schedule, 16)
    profile.save(tmp_path / "p.json")
    assert profile_note(Full(), None, schedule) == "the policy object's own"
    assert profile_note("scalekv", None, schedule) == "none: all layers alike"
    for given in (profile, tmp_path / "p.json", str(tmp_path / "p.json")):
        assert profile_note("scalekv", given, schedule) == "given"
        other = ScaleSchedule.of([1, 2])
        assert profile_note("scalekv", given, other) == "given, made for another schedule"


def test_the_bundled_models_profile_is_used():
    assert plan("emoji64").policy.drafters
    assert not plan("emoji64", policy=ScaleKV()).policy.drafters


def test_scratch_of_a_policy_that_moves_little():
    """A window of 20 over 16 + 16 tokens: 16 fresh ones take the places of the oldest."""
    schedule = ScaleSchedule.of([4, 4, 1])
    geometry = CacheGeometry(1, 1, 4, "float32", "bfloat16")
    made = plan_generation(geometry, schedule, SlidingWindow(), 20, 1, 16)
    moved = 16
    assert made.workspace_bytes == 32 * 4 * 6 + moved * 4 * 4 + (1 + 1 + moved) * 8
    # a window of 5: all five are new
    made = plan_generation(geometry, schedule, SlidingWindow(), 5, 1, 16)
    assert made.workspace_bytes == 21 * 4 * 6 + 5 * 4 * 4 + (1 + 1 + 5) * 8
    # a layer that shrinks from 16 to 6 while 1 fresh token comes: at most 6 move
    schedule = ScaleSchedule.of([4, (1, 1), 1])

    class Shrinking(Full):
        def lengths(self, schedule, geometry, budget):
            return np.array([16, 6, 0]).reshape(3, 1, 1)

    made = plan_generation(geometry, schedule, Shrinking(), 5, 1, 16)
    # read from slots as well
    assert made.workspace_bytes == 17 * 4 * 6 + 6 * 4 * 4 + (1 + 1 + 6 + 6) * 8


def test_max_rows_reserves_nothing_by_default_and_stops_somewhere():
    made = plan("var-d16", 1)
    assert made.max_rows(made.total_bytes) == 2
    assert made.max_rows(made.total_bytes - 1) == 1
    one_scale = plan_generation(CacheGeometry(1, 1, 1), ScaleSchedule.of([1]), Full(), 1, 1)
    assert one_scale.max_rows(2**30) == MAX_ROWS == 2**20


def test_one_picture_by_default():
    assert plan("var-d16").rows == 2


def test_profiles_by_object_or_file(tmp_path):
    known = find_model("var-d16")
    profile = profile_of(known.schedule, 16)
    profile.save(tmp_path / "profile.json")
    for given in (profile, tmp_path / "profile.json", str(tmp_path / "profile.json")):
        chosen = choose_policy("scalekv", given, 16)
        assert chosen.drafters and chosen.published is None
        assert plan("var-d16", profile=given).policy == chosen


def test_lengths_are_checked():
    class Greedy(Full):
        def lengths(self, schedule, geometry, budget):
            return Full.lengths(self, schedule, geometry, budget) + 1

    with pytest.raises(ValueError, match="more than it has"):
        plan_generation(CacheGeometry(1, 1, 1), ScaleSchedule.of([1, 2]), Greedy(), 1, 1)

    class Wrong(Full):
        def lengths(self, schedule, geometry, budget):
            return np.zeros((1, 1, 1))

    with pytest.raises(ValueError, match="lengths must be int64"):
        plan_generation(CacheGeometry(1, 1, 1), ScaleSchedule.of([1, 2]), Wrong(), 1, 1)
