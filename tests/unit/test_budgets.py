"""Budgets in bytes: never exceeded, used to the last token, refused with numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvruntime import CacheOptions, PagedKVCache, Pool, WillNeverFit, plan
from kvruntime.catalogue import find_model
from kvruntime.planning import choose_policy, make_plan
from kvruntime.planning.baseline import history_bytes
from policies import CacheGeometry, Problem, ScaleKV, ScaleSchedule
from policies.budgets import capped, split_budget
from tests.support import PLAIN_POLICIES, schedules
from tests.unit.test_cache import GEOMETRY, SCHEDULE, draw, make

MIB = 2**20
SHARES = ("2%", "5%", "10%", "25%", "60%")


def made_with(model, options, budget, page_size, rows=2):
    """The plan of a budget in tokens, in pages of this size; None where the policy refuses it."""
    chosen = replace(options, budget=budget, page_size=page_size)
    policy, _ = choose_policy(chosen, model.geometry, model.schedule)
    try:
        return make_plan(model.geometry, model.schedule, policy, chosen, rows)
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("policy", "kv_dtype"),
    [
        ("scalekv", "int4"),
        ("centroid", "int4"),
        pytest.param("ams_kv", None, marks=pytest.mark.full),
        pytest.param("scalekv", None, marks=pytest.mark.full),
        pytest.param("centroid", None, marks=pytest.mark.full),
        pytest.param("ams_kv", "int4", marks=pytest.mark.full),
        pytest.param("streaming_llm", None, marks=pytest.mark.full),
        pytest.param("streaming_llm", "int4", marks=pytest.mark.full),
    ],
)
def test_most_tokens_by_brute_force(policy, kv_dtype):
    """Every token count is tried in pages of 16; then a few more tokens in pages of every size."""
    model = find_model("emoji64")
    options = CacheOptions(policy, page_size=16, kv_dtype=kv_dtype)
    plans = [made_with(model, options, tokens, 16) for tokens in range(1, 681)]
    for share in SHARES:
        most = int(float(share[:-1]) / 100 * history_bytes(model.geometry, model.schedule, 1)) * 2
        fitting = [made.budget_tokens for made in plans if made and made.page_bytes <= most]
        if not fitting:
            with pytest.raises(WillNeverFit):
                plan("emoji64", 1, policy, share, page_size=16, kv_dtype=kv_dtype)
            continue
        best = plan("emoji64", 1, policy, share, page_size=16, kv_dtype=kv_dtype)
        assert best.budget_tokens == max(fitting) and best.page_bytes <= most
        free = plan("emoji64", 1, policy, share, kv_dtype=kv_dtype)
        assert free.page_bytes <= most and free.budget_tokens >= best.budget_tokens
        for page_size in range(4, 25):
            for more in range(free.budget_tokens + 1, min(free.budget_tokens + 12, 680)):
                larger = made_with(model, options, more, page_size)
                assert larger is None or larger.page_bytes > most, (page_size, more)


@pytest.mark.parametrize("budget", ["2%", "512MiB"])
@pytest.mark.parametrize("policy", ["scalekv", "centroid", "ams_kv", "sliding_window"])
@pytest.mark.parametrize("kv_dtype", [None, "int4", "int2"])
def test_the_published_models(budget, policy, kv_dtype):
    """Infinity-2B: the peak lies inside a scale where drafters grow before refiners shrink."""
    model = find_model("infinity-2b")
    options = CacheOptions(policy, kv_dtype=kv_dtype)
    most = 512 * MIB
    if budget == "2%":
        most = int(0.02 * history_bytes(model.geometry, model.schedule, 1)) * 2
    made = plan(model, 1, policy, budget, kv_dtype=kv_dtype)
    assert made.page_bytes == made.peak_pages * (made.bytes_per_page + made.plane_bytes_per_page)
    assert 0.85 * most < made.page_bytes <= most or made.budget_tokens == made.schedule.total
    assert made.page_size in (16, 32, 48, 64), "what the paged kernel reads"
    for page_size in (16, 32, 48, 64):
        for more in range(made.budget_tokens + 1, made.budget_tokens + 4):
            if more <= made.schedule.total:
                assert made_with(model, options, more, page_size).page_bytes > most


def test_a_share_counts_every_row_alike_and_bytes_do_not():
    share = make("sliding_window", "10%")
    tokens = {share.plan(rows).budget_tokens for rows in (1, 2, 7)}
    assert len(tokens) == 1
    assert share.plan(6).page_bytes == 6 * share.plan(1).page_bytes
    size = make("sliding_window", "64KiB")
    plans = [size.plan(rows) for rows in (1, 2, 4)]
    assert [made.budget_tokens for made in plans] == sorted(
        {made.budget_tokens for made in plans}, reverse=True
    )
    assert all(made.page_bytes <= 2**16 for made in plans)
    with size.open(4) as generation:
        draw(generation)
        pool = generation._runner.pool
        assert pool.num_bytes <= 2**16
        stats = generation.stats
        assert stats.peak_pages == stats.planned_pages == pool.stats.peak_pages
        assert stats.page_bytes == stats.peak_pages * size.plan(4).bytes_per_page <= 2**16
        assert stats.budget_tokens == plans[2].budget_tokens


def test_pages_of_a_pool_that_is_there():
    """Their size is given; the budget still holds."""
    pool = Pool(num_pages=500, page_bytes=1024, plane_bytes=32)
    for policy in ("sliding_window", "centroid"):
        cache = make(policy, "50%", pool=pool)
        most = int(0.5 * history_bytes(GEOMETRY, SCHEDULE, 1)) * 2
        made = cache.plan(2)
        assert made.page_bytes == made.peak_pages * 1056 <= most
        with cache.open(2) as generation:
            draw(generation)
            assert pool.stats.live_pages == 0 and generation.stats.page_bytes <= most


def test_refused_with_numbers_where_the_smallest_allocation_does_not_fit():
    for policy, words in (
        ("full", "full cannot keep fewer than 91"),
        ("scalekv", "scalekv cannot keep fewer than 16"),
    ):
        with pytest.raises(
            WillNeverFit, match=rf"{words} tokens of a lane, .* raise the bud"
        ) as caught:
            make(policy, "100B")
        assert caught.value.needed > caught.value.total == 100
        make(policy, f"{caught.value.needed}B")
        with pytest.raises(WillNeverFit):
            make(policy, f"{caught.value.needed - 1}B")
    cache = make("scalekv", "8KiB")
    with pytest.raises(WillNeverFit) as caught:
        cache.open(9)
    assert caught.value.total == 2**13 < caught.value.needed
    with pytest.raises(WillNeverFit, match="kv_dtype"):
        make("full", "1%")


def test_full_does_not_mind_its_budget():
    """Its budget does not matter, so a small one is not refused either."""
    outs = []
    for budget in (0.001, 1, 1.0, "100%", "1GiB"):
        cache = make("full", budget)
        with cache.open(2) as generation:
            outs.append(draw(generation))
        assert cache.plan(2).token_bytes == 91 * 2 * 3 * 2 * 64
    for other in outs[1:]:
        assert all(map(torch.equal, outs[0], other))
    assert plan("infinity-8b", 1, "full", 0.001).tokens.max() == 6425


@st.composite
def problems(draw_one):
    layers = draw_one(st.integers(1, 3))
    kv_dtype = draw_one(st.sampled_from([None, "int2", "int4", "int8"]))
    head_dim = draw_one(st.sampled_from([4, 32] if kv_dtype is None else [32, 64]))
    dtype = draw_one(st.sampled_from(["float32", "bfloat16"]))
    policy = draw_one(st.sampled_from([*PLAIN_POLICIES, "roles"]))
    if policy == "roles":
        some = st.frozensets(st.integers(0, layers - 1), max_size=layers)
        policy = ScaleKV(tuple(draw_one(st.lists(some, min_size=1, max_size=4))), grid=1)
    size = draw_one(st.one_of(st.none(), st.sampled_from([3, 8, 16])))
    budget = draw_one(
        st.one_of(
            st.integers(1, 100).map(lambda n: f"{n}%"),
            st.integers(0, 17).map(lambda n: f"{3 * 2**n} B"),
        )
    )
    options = CacheOptions(policy, budget, kv_dtype=kv_dtype, page_size=size)
    geometry = CacheGeometry(layers, draw_one(st.integers(1, 2)), head_dim, dtype, dtype)
    return geometry, draw_one(schedules), options, draw_one(st.integers(1, 3))


@given(problem=problems())
@settings(max_examples=150)
def test_a_budget_in_bytes_holds_for_all(problem):
    """Pages at the peak, as planned and as used, stay within it; the next token would not."""
    geometry, schedule, options, rows = problem
    if options.budget.endswith("%"):
        share = int(options.budget[:-1]) / 100
        most = int(share * history_bytes(geometry, schedule, 1)) * rows
    else:
        most = int(options.budget[:-1])
    policy, _ = choose_policy(options, geometry, schedule)

    def pages_of(tokens, page_size):
        chosen = replace(options, budget=tokens, page_size=page_size)
        return make_plan(geometry, schedule, policy, chosen, rows).page_bytes

    try:
        made = make_plan(geometry, schedule, policy, options, rows)
    except WillNeverFit as error:
        assert error.needed > error.total == most
        sizes = [options.page_size] if options.page_size else range(4, 25)
        for page_size in sizes:
            for tokens in range(1, schedule.total + 1):
                try:
                    assert pages_of(tokens, page_size) > most, "this would have fitted"
                except ValueError:
                    continue
        return
    except ValueError:  # these pages hold no exact token, or the policy refuses any budget
        assume(False)
    assert made.page_bytes <= most
    if made.budget_tokens < schedule.total and schedule.history:
        assert pages_of(made.budget_tokens + 1, made.page_size) > most
    cache = PagedKVCache(geometry, schedule, options, softmax_scale=1.0)
    with cache.open(rows) as generation:
        draw(generation, geometry, schedule)
        assert generation.stats.peak_pages == generation.stats.planned_pages == made.peak_pages
        assert generation.stats.page_bytes <= most
        assert generation._runner.pool.stats.peak_pages <= made.peak_pages


def test_a_budget_is_the_same_text_everywhere(tiny_model):
    import kvruntime

    with kvruntime.attach(tiny_model, "sliding_window", "10%") as attached:
        tiny_model.generate(torch.tensor([0]))
        stats = attached.stats
    assert 0 < stats.page_bytes <= 0.10 * stats.history_bytes
    assert stats.peak_pages == stats.planned_pages
    with pytest.raises(WillNeverFit), kvruntime.attach(tiny_model, "full", "1KiB"):
        pass


def test_shares_of_rare_schedules():
    """One lane of one token: the smallest page holds four."""
    slim = CacheGeometry(1, 1, 4, "float32", "float32")
    schedule = ScaleSchedule.of([1, 1, 1])
    options = CacheOptions("sliding_window", "100%")
    policy, _ = choose_policy(options, slim, schedule)
    with pytest.raises(WillNeverFit, match="in pages of 4"):
        make_plan(slim, schedule, policy, options, 1)
    made = make_plan(slim, schedule, policy, replace(options, page_size=1), 1)
    assert (made.budget_tokens, made.tokens.max(), made.page_bytes) == (3, 2, 2 * 32)


@pytest.mark.parametrize(
    ("model", "policy", "budget", "page_size", "tokens"),
    [
        ("infinity-2b", "streaming_llm", "512MiB", 64, 1024),
        ("infinity-2b", "centroid", "512MiB", 48, 1008),  # 64 bytes of weights a page are too many
        ("infinity-8b", "sliding_window", "512MiB", 16, 464),
        ("var-d16", "sliding_window", "5%", 21, 21),
        ("var-d16", "full", "64MiB", 24, 680),
    ],
)
def test_page_sizes_that_a_budget_chooses(model, policy, budget, page_size, tokens):
    """Whichever holds most tokens; of equal ones the largest."""
    made = plan(model, 1, policy, budget)
    assert (made.page_size, made.budget_tokens) == (page_size, tokens)


def test_a_lane_of_one_token():
    schedule = ScaleSchedule.of([1, 2, 1])
    tokens = capped(Problem(GEOMETRY, schedule, 1)).tokens
    assert (tokens[:-1] == 1).all() and not tokens[-1].any()
    with pytest.raises(ValueError, match="a budget of 0 tokens of 5 of history keeps none"):
        capped(Problem(GEOMETRY, schedule, 0))
    one = plan("emoji64", 1, "sliding_window", 1, page_size=1)
    asked = plan("emoji64", 1, "sliding_window", f"{one.page_bytes // 1024}KiB", page_size=1)
    assert (asked.budget_tokens, asked.page_bytes) == (1, one.page_bytes)


def test_drafters_that_have_less_than_the_budget_leave_it_to_no_one():
    tokens = split_budget(np.array([2, 9, 9]), frozenset({0}), 5, 4)
    assert tokens.tolist() == [2, 5, 5] and tokens.dtype == np.int64
