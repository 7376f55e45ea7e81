"""Rows that are repeated: what is refused, and what is reserved for those that are left."""

import re
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import kvruntime
from kvruntime import (
    CacheGeometry,
    CacheOptions,
    PagedKVCache,
    ScheduleError,
)
from kvruntime.planning import max_rows
from policies import Allocation, Needs, ScaleKV, ScaleSchedule, Selection, make_policy
from tests.unit.test_rows import SCHEDULE, cache_of, draw, steps


@pytest.mark.parametrize(
    ("policy", "options"),
    [("full", {}), ("scalekv", {}), ("centroid", {}), ("ams_kv", {}), ("full", {"workspace": 1})],
)
def test_variations_draw_what_rows_that_were_alike_from_the_start_draw(policy, options):
    made = ScaleKV(grid=1) if policy == "scalekv" else make_policy(policy)
    cache = cache_of(made, 0.6, **options)
    with cache.open(2, {3: 6}) as some, cache_of(made, 0.6, **options).open(6) as every:
        for scale in range(5):
            if scale == 3:
                some.branch(3)
            for layer in range(2):
                q, k, v = steps(SCHEDULE, 6, scale, layer)
                if scale < 3:
                    q, k, v = (part[::3].repeat_interleave(3, 0) for part in (q, k, v))
                few = slice(None, None, 1 if scale >= 3 else 3)
                ours = some.attend(layer, q[few], k[few], v[few])
                assert torch.allclose(ours, every.attend(layer, q, k, v)[few], atol=1e-5)
        assert some.stats.peak_pages == some.stats.planned_pages


def test_what_is_refused():
    cache = cache_of()
    with cache.open(2, {2: 6}) as generation:
        draw(generation, SCHEDULE, [0])
        with pytest.raises(ScheduleError, match=r"no row is repeated at scale 1 .* \{1: 2 \* rows"):
            generation.branch(2)
        draw(generation, SCHEDULE, [1])
        with pytest.raises(ScheduleError, match=r"3 rows for each of 2: branch\(3\) goes first"):
            generation.attend(0, *steps(SCHEDULE, 2, 2, 0))
        with pytest.raises(ValueError, match="planned with 3 rows for each, got 2"):
            generation.branch(2)
        with pytest.raises(ValueError, match="count must be a positive integer"):
            generation.branch(0)
        with pytest.raises(ScheduleError, match=r"repeated at scale 2: keep_rows\(\) elsewhere"):
            generation.keep_rows(1)
        generation.branch(3)
        assert generation.rows == 6
        with pytest.raises(ScheduleError, match="no row is repeated at scale 2"):
            generation.branch(3)
        with pytest.raises(ScheduleError, match=r"repeated at scale 2: keep_rows\(\) elsewhere"):
            generation.keep_rows(1)
        generation.attend(0, *steps(SCHEDULE, 6, 2, 0))
        with pytest.raises(ScheduleError, match="branch goes between scales"):
            generation.branch(3)


def test_rows_that_went_unplanned_are_repeated_all_the_same():
    with cache_of().open(4, {3: 12}) as generation:
        draw(generation, SCHEDULE, [0])
        generation.keep_rows([3])
        assert generation.plan.rows_by_scale == (4, 1, 1, 3, 3)
        for scale in (1, 2):
            for layer in range(2):
                generation.attend(layer, *steps(SCHEDULE, 1, scale, layer))
        generation.branch(3)
        for layer in range(2):
            generation.attend(layer, *steps(SCHEDULE, 3, 3, layer))
        assert generation.stats.peak_pages == generation.stats.planned_pages


def half_way(schedule, rows, rows_from, at, **options):
    """A generation before scale ``at``, its rows repeated or gone as planned."""
    generation = cache_of(schedule=schedule, **options).open(rows, rows_from)
    while generation.scale < at:
        whole_scale(generation)
    return generation


def whole_scale(generation):
    plan, scale = generation.plan, generation.scale
    if generation.place.copies > 1:
        generation.branch(generation.place.copies)
    elif plan.rows_by_scale[scale] < generation.rows:
        generation.keep_rows(plan.rows_by_scale[scale])
    for layer in range(2):
        generation.attend(layer, *steps(plan.schedule, generation.rows, scale, layer))


LONG = ScaleSchedule.of([1, 4, 4, 2, 6, 7])


def test_exactly_the_pages_of_the_rows_that_are_left_stay_reserved():
    """Rows 0 and 1 are of one picture, rows 0 and 3 of two."""
    found = {}
    for kept in ((0, 1), (0, 3), (5, 0, 3)):
        with half_way(LONG, 2, {3: 6}, 4, page_size=2) as generation:
            pool = generation._runner.pool
            generation.keep_rows(list(kept))
            found[kept] = pool.stats.reserved_pages
            generation.keep_rows(generation.rows)  # all of them: nothing changes
            assert pool.stats.reserved_pages == found[kept]
            with generation.fork() if 2 * found[kept] <= pool.num_pages else nullcontext():
                pass
            whole_scale(generation)
            assert pool.stats.live_pages <= found[kept]
            whole_scale(generation)
            assert generation.stats.planned_pages == generation.stats.peak_pages
    assert found[0, 1] < found[0, 3] < found[5, 0, 3]


def test_a_fork_of_what_is_left_reserves_what_that_needs():
    with half_way(LONG, 1, {2: 8, 4: 1}, 4, page_size=2) as generation:
        generation.keep_rows([3])
        pool = generation._runner.pool
        needed = pool.stats.reserved_pages
        with generation.fork() as twin:
            assert pool.stats.reserved_pages == 2 * needed
            for one in (generation, twin):
                whole_scale(one)
                whole_scale(one)
            assert pool.stats.live_pages == 0


def test_a_planned_drop_is_of_rows_that_share_as_much():
    """The best of each picture shares less than the first rows: refused, and nothing has changed.
    Where the drop was not planned there is room for it.
    """
    with half_way(LONG, 3, {3: 9, 4: 3}, 4, page_size=2) as generation:
        before = generation.stats
        with pytest.raises(ValueError, match=r"share too little: they need \d+ pages, \d+ are"):
            generation.keep_rows([0, 3, 6])
        assert generation.rows == 9 and generation.stats == before
        generation.keep_rows([2, 0, 1])
        whole_scale(generation)
        whole_scale(generation)
    with half_way(LONG, 3, {3: 9}, 4, page_size=2) as generation:
        generation.keep_rows([0, 3, 6])
        whole_scale(generation)
        whole_scale(generation)


def test_an_order_that_frees_pages_too_late_is_refused():
    """Rows that go through one at a time keep a shared page until the last of them is through."""
    schedule = ScaleSchedule.of([1, 7, 1, 1, 1, 1])
    options = CacheOptions("full", 1.0, page_size=16, kv_dtype="int8", kv_start=3, workspace=1)
    geometry = CacheGeometry(1, 1, 32, "float32", "float32")

    def draw_in(order):
        cache = PagedKVCache(geometry, schedule, options, softmax_scale=0.25)
        with cache.open(2, {2: 6}) as generation:
            for scale in range(6):
                if scale == 2:
                    generation.branch(3)
                if scale == 3:
                    generation.keep_rows(order)
                rows = torch.randn(3, generation.rows, schedule.tokens[scale], 1, 32)
                generation.attend(0, *rows)
            assert generation.stats.peak_pages == generation.stats.planned_pages
            return generation.stats.peak_pages

    assert draw_in([0, 1, 2, 3, 4, 5]) == 36
    with pytest.raises(ValueError, match="they need 42 pages, 36 are planned"):
        draw_in([0, 3, 1, 4, 2, 5])
    assert draw_in([0, 3, 1, 4]) <= 36


def test_rows_in_proportion():
    plan = cache_of().plan(2, {1: 6, 3: 3})
    assert plan.as_large_for(4).rows_by_scale == (4, 12, 12, 6, 6)
    assert plan.as_large_for(1).rows_by_scale == (1, 3, 3, 2, 2), "rounded up"
    most = max_rows(plan, plan.total_bytes)
    assert most == 2 and plan.as_large_for(3).total_bytes > plan.total_bytes


def test_far_too_many_copies_are_refused_at_once():
    cache = cache_of(memory="1MiB")
    began = time.monotonic()
    with pytest.raises(kvruntime.WillNeverFit, match="repeat rows less often"):
        cache.open(1, {2: 2**30})
    assert time.monotonic() - began < 5
    for rows in (2, 40, 3000):
        bound, exact = cache_of().plan(1, {2: rows}), cache_of().plan(rows)
        assert bound.peak_pages <= exact.peak_pages


def test_bytes_of_a_generation_that_branches():
    """The advice counts the copies as well."""
    cache = cache_of("streaming_llm", "12KiB", memory="24KiB", page_size=1)
    with pytest.raises(kvruntime.WillNeverFit) as caught:
        cache.open(6, {2: 24})
    found = re.search(r"(\d+) of 6 rows would fit", str(caught.value))
    if found:
        cache.open(int(found[1]), {2: 4 * int(found[1])}).close()


class Ends:
    """Keeps eight tokens of the history: the first ones in even layers, the last in odd ones."""

    name, needs = "ends", Needs(by_lane=True)

    def allocate(self, problem):
        geometry = problem.geometry
        counts = [min(seen, 8) for seen in problem.schedule.seen[:-1]] + [0]
        tokens = np.tile(np.array(counts)[:, None, None], (1, geometry.layers, geometry.heads))
        return Allocation(tokens)

    def scratch(self, sizes):
        return []

    def select(self, candidates):
        heads, count = candidates.positions.shape[1:]
        keep = int(candidates.keep[0])
        first = count - keep if candidates.layer % 2 else 0
        return Selection(torch.arange(first, first + keep).expand(1, heads, keep))


def test_layers_that_keep_other_tokens_share_other_pages():
    """As many in each layer, and yet one rewrites its pages where the other does not."""
    cache = cache_of(Ends(), 8, page_size=2)
    with cache.open(1, {3: 4}) as generation:
        held, pool = generation.plan.occupancy, generation._runner.pool
        for scale in range(5):
            if scale == 3:
                generation.branch(4)
            for layer in range(2):
                generation.attend(layer, *steps(SCHEDULE, generation.rows, scale, layer))
                assert pool.allocator.num_live == held.after[scale, layer]
        assert generation.stats.peak_pages == generation.stats.planned_pages
    assert np.diff(held.after[3]) > 0, "the second layer writes"


def test_too_little_memory_says_how_many_rows_would_fit():
    room = cache_of().plan(2, {3: 6}).total_bytes
    plan = cache_of().plan(4, {3: 12})
    with pytest.raises(kvruntime.WillNeverFit, match="2 of 4 rows would fit"):
        kvruntime.planning.require(plan, room)
