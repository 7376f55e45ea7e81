"""Rows that go half way, planned; scales that come from elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvruntime import CacheGeometry, CacheOptions, PagedKVCache, Pool, ScheduleError
from kvruntime.planning import make_plan
from kvruntime.planning.shapes import Kind
from kvruntime.sizes import rows_by_scale
from kvruntime.step import shift
from policies import ScaleKV, ScaleSchedule, make_policy
from tests.support import policies, schedules

GEOMETRY = CacheGeometry(2, 2, 16, "float32", "float32")
SCHEDULE = ScaleSchedule.of([1, 2, 3, 4, 5])


def cache_of(policy="full", budget=1.0, schedule=SCHEDULE, **options):
    chosen = CacheOptions(policy, budget, **({"page_size": 4} | options))
    return PagedKVCache(GEOMETRY, schedule, chosen, softmax_scale=0.25)


def steps(schedule, rows, scale, layer, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + 10 * scale + layer)
    return torch.randn(3, rows, schedule.tokens[scale], 2, 16, generator=generator)


def draw(generation, schedule, scales):
    """The steps of some scales; what attention returned at each."""
    out = []
    for scale in scales:
        planned = generation.plan.rows_by_scale[scale]
        if planned < generation.rows:
            generation.keep_rows(planned)
        for layer in range(GEOMETRY.layers):
            q, k, v = steps(schedule, generation.plan.rows, scale, layer)[:, :planned]
            out.append(generation.attend(layer, q, k, v))
    return out


def test_rows_of_each_scale():
    assert rows_by_scale(4, 6) == (6, 6, 6, 6)
    assert rows_by_scale(4, 6, {3: 1, 1: 2, 9: 1}) == (6, 2, 2, 1)
    assert rows_by_scale(4, 2, {1: 6, 2: 3, 3: 9}) == (2, 6, 3, 9)
    for given_rows, says in (
        ({1: 7}, "repeated as often as the others, not at scale 0: 6 before scale 1, 7 from"),
        ({1: 2, 2: 3}, "2 before scale 2, 3 from there on"),
        ({-1: 2}, "got scale -1"),
        ({True: 2}, "got scale True"),
        ({1: 0}, "rows from scale 1 on must be a positive integer"),
    ):
        with pytest.raises(ValueError, match=says):
            rows_by_scale(4, 6, given_rows)


@settings(max_examples=60)
@given(st.data())
def test_planned_pages_are_those_at_the_peak(data):
    """Any policy, any schedule, rows that go any number of times."""
    schedule = data.draw(schedules)
    policy = data.draw(policies(GEOMETRY.layers, GEOMETRY.heads, schedule))
    kv_dtype = data.draw(st.sampled_from([None, "int4"]))
    rows = data.draw(st.integers(1, 5))
    rows_from, left = {}, rows
    for scale in sorted(data.draw(st.sets(st.integers(0, len(schedule)), max_size=3))):
        rows_from[scale] = left = data.draw(st.integers(1, left))
    try:
        cache = cache_of(policy, 0.5, schedule, kv_dtype=kv_dtype)
    except ValueError:
        return  # a budget that this policy cannot meet
    with cache.open(rows, rows_from) as generation:
        draw(generation, schedule, range(len(schedule)))
        stats = generation.stats
        assert stats.planned_pages == stats.peak_pages
        assert stats.planned_pages == cache.plan(rows, rows_from).peak_pages
        assert stats.live_pages == 0
    assert stats.planned_pages <= cache.plan(rows).peak_pages


@pytest.mark.parametrize("policy", ["full", "scalekv", "centroid"])
def test_the_rows_that_stay_are_as_alone(policy):
    cache = cache_of(make_policy(policy) if policy != "scalekv" else ScaleKV(grid=1), 0.6)
    with cache.open(4, {2: 3, 4: 1}) as some, cache.open(4) as all_of_them:
        ours = draw(some, SCHEDULE, range(5))
        theirs = draw(all_of_them, SCHEDULE, range(5))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other[: mine.shape[0]])


def test_a_scale_that_is_planned_with_fewer_rows_needs_them_gone():
    cache = cache_of()
    with cache.open(4, {1: 2}) as generation:
        draw(generation, SCHEDULE, [0])
        with pytest.raises(ScheduleError, match="planned with 2 rows and there are 4: keep_rows"):
            generation.attend(0, *steps(SCHEDULE, 4, 1, 0))
        with pytest.raises(ValueError, match="2 rows are planned from scale 1 on, got 3"):
            generation.keep_rows(3)
        generation.keep_rows([3, 0])
        generation.attend(0, *steps(SCHEDULE, 2, 1, 0))


def test_more_rows_may_go_than_were_planned_to():
    cache = cache_of()
    with cache.open(4, {1: 3, 3: 1}) as generation:
        draw(generation, SCHEDULE, [0])
        generation.keep_rows(2)
        assert generation.plan.rows_by_scale == (4, 2, 2, 1, 1)
        for scale in (1, 2):
            for layer in range(2):
                generation.attend(layer, *steps(SCHEDULE, 2, scale, layer))
        twin_plan = generation.plan.thinned(2, 0)
        assert twin_plan.rows_by_scale == (2, 2, 2, 1, 1)
        generation.keep_rows(1)
        draw(generation, SCHEDULE, [3, 4])
        assert generation.stats.planned_pages == generation.stats.peak_pages


def test_a_pool_keeps_no_room_for_rows_that_have_gone():
    cache = cache_of()
    whole, few = cache.plan(4, {2: 1}), cache.plan(1)
    assert whole.peak_pages == max(
        rows * int(pages)
        for rows, pages in zip((4, 4, 1, 1, 1), whole.row_pages.max(axis=1), strict=True)
    )
    pool = Pool(num_pages=whole.peak_pages, page_bytes=cache.page_bytes)
    shared = PagedKVCache(GEOMETRY, SCHEDULE, cache.options, softmax_scale=0.25, pool=pool)
    with shared.open(4, {2: 1}) as generation:
        assert pool.stats.reserved_pages == whole.peak_pages
        draw(generation, SCHEDULE, [0, 1])
        generation.keep_rows(1)
        assert pool.stats.reserved_pages == few.peak_pages
        pool.check()


def test_bytes_of_a_generation_buy_more_tokens_where_rows_go():
    """A share of the bytes is one of each row's."""
    sized, shared = cache_of("streaming_llm", "32KiB"), cache_of("streaming_llm", "30%")
    assert sized.plan(4, {1: 2}).budget_tokens > sized.plan(4).budget_tokens
    assert sized.plan(4, {1: 2}).page_bytes <= 32768
    assert shared.plan(4, {1: 2}).budget_tokens == shared.plan(4).budget_tokens


def test_a_share_is_solved_for_rows_that_stay():
    options = CacheOptions("streaming_llm", "30%", page_size=4)
    made = [
        make_plan(GEOMETRY, SCHEDULE, make_policy("streaming_llm"), options, 4, rows_from=rows)
        for rows in (None, {1: 2})
    ]
    assert made[0].budget_tokens == made[1].budget_tokens
    assert [plan.rows_by_scale for plan in made] == [(4,) * 5, (4, 2, 2, 2, 2)]


def test_the_workspace_is_that_of_the_rows_that_are_left():
    """The last scale is the largest: with half the rows it works in half the memory."""
    cache = cache_of(ScaleKV(grid=1), 0.3)
    late, early = cache.plan(8), cache.plan(8, {4: 2})
    assert early.workspace_bytes < late.workspace_bytes
    limited = cache_of(ScaleKV(grid=1), 0.3, workspace=early.workspace_bytes)
    assert limited.plan(8, {4: 2}).chunk_rows == 8 > limited.plan(8).chunk_rows


def test_baseline_is_the_largest_that_the_models_own_cache_gets():
    plan = cache_of().plan(4, {4: 1})
    each = 2 * 2 * 2 * 16 * 4
    base = plan.baseline_bytes()
    assert base["history_bytes"] == 4 * 30 * each
    assert base["all_scales_bytes"] == max(4 * 30, 1 * 55) * each
    assert cache_of().plan(4, {3: 1}).baseline_bytes()["history_bytes"] == max(4 * 14, 30) * each


class TestAppend:
    @pytest.mark.parametrize("policy", ["full", "streaming_llm", "sliding_window"])
    @pytest.mark.parametrize("kv_dtype", [None, "int4"])
    def test_goes_on_as_if_the_scales_had_been_drawn(self, policy, kv_dtype):
        cache = cache_of(policy, 0.5, kv_dtype=kv_dtype, page_size=8)
        with cache.open(2) as drawn:
            wanted = draw(drawn, SCHEDULE, range(5))[6:]
            timeline = drawn.stats.timeline
        with cache.open(2) as given_scales:
            for scale in range(3):
                kv = [steps(SCHEDULE, 2, scale, layer)[1:] for layer in range(2)]
                given_scales.append(scale, [k for k, _ in kv], [v for _, v in kv])
            ours = draw(given_scales, SCHEDULE, range(3, 5))
            stats = given_scales.stats
        assert all(torch.equal(*pair) for pair in zip(ours, wanted, strict=True))
        assert stats.timeline == timeline and stats.planned_pages == stats.peak_pages
        assert stats.page_steps + stats.gather_steps == 4  # nobody attended before

    def test_in_chunks_of_rows(self):
        whole = cache_of("full")
        cache = cache_of("full", workspace=whole.plan(2).workspace_bytes)
        assert cache.plan(5).chunk_rows < 5
        results = []
        for one in (whole, cache):
            with one.open(5) as generation:
                kv = [steps(SCHEDULE, 5, 0, layer)[1:] for layer in range(2)]
                generation.append(0, [k for k, _ in kv], [v for _, v in kv])
                results.append(draw(generation, SCHEDULE, [1]))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))

    def test_observers_see_the_steps_that_attend(self):
        seen = []
        cache = PagedKVCache(
            GEOMETRY,
            SCHEDULE,
            CacheOptions("full"),
            softmax_scale=1.0,
            observer=lambda scale, layer, *_: seen.append((scale, layer)),
        )
        with cache.open(1) as generation:
            kv = [steps(SCHEDULE, 1, 0, layer)[1:] for layer in range(2)]
            generation.append(0, [k for k, _ in kv], [v for _, v in kv])
            draw(generation, SCHEDULE, [1])
        assert seen == [(1, 0), (1, 1)]

    def test_a_policy_that_looks_at_queries_takes_what_it_keeps_whole(self):
        cache = cache_of(ScaleKV(grid=1), 0.4)
        appended = []
        with cache.open(1) as generation:
            for scale in range(5):
                kv = [steps(SCHEDULE, 1, scale, layer)[1:] for layer in range(2)]
                parts = [k for k, _ in kv], [v for _, v in kv]
                held = generation.stats.timeline
                kinds = {generation.plan.shape(scale, layer, 1).kind for layer in range(2)}
                if Kind.CHOOSE not in kinds:
                    generation.append(scale, *parts)
                    appended.append(scale)
                    continue
                with pytest.raises(ScheduleError, match=f"queries of scale {scale}, and append"):
                    generation.append(scale, *parts)
                assert generation.is_open and generation.stats.timeline == held
                draw(generation, SCHEDULE, [scale])
        assert appended == [0, 1, 4]

    def test_refusals_change_nothing(self):
        cache = cache_of()
        k = v = [torch.zeros(2, 1, 2, 16)] * 2
        with cache.open(2) as generation:
            for bad, says in (
                ((1, k, v), "append.. of scale 1: the next one is 0"),
                ((0, k[:1], v), "one tensor for each of 2 layers, got 1, 2"),
                ((0, [k[0], k[0][:1]], v), r"k\[1\] must be torch.float32 \(2, 1, 2, 16\)"),
                ((0, k, [v[0], v[0].half()]), r"v\[1\] must be torch.float32"),
                ((0, [torch.zeros(2, 2, 1, 16)] * 2, v), r"k\[0\] is .* looks transposed"),
            ):
                with pytest.raises((ScheduleError, ValueError), match=says):
                    generation.append(*bad)
            generation.attend(0, k[0], k[0], v[0])
            with pytest.raises(ScheduleError, match="append goes between scales"):
                generation.append(0, k, v)
        with pytest.raises(ScheduleError, match="this generation is closed"):
            generation.append(0, k, v)

    def test_a_failure_half_way_closes_the_generation(self, monkeypatch):
        cache = cache_of()
        calls = []

        write = shift.write

        def fail(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError
            write(*arguments)

        monkeypatch.setattr("kvruntime.step.shift.write", fail)
        k = v = [torch.zeros(2, 1, 2, 16)] * 2
        generation = cache.open(2)
        with pytest.raises(MemoryError):
            generation.append(0, k, v)
        assert not generation.is_open and generation.stats.live_pages == 0
