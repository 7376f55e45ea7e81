"""PagedKVCache: P1 exact, P9 refuse early, and calls that do not fit the schedule."""

import math

import pytest
import torch
import torch.nn.functional as F

import kvruntime
from allocator import PageAllocator
from kvruntime import PagedKVCache, ScheduleError, WillNeverFit
from policies import POLICY_NAMES, CacheGeometry, Full, ScaleSchedule

SCHEDULE = ScaleSchedule.of([1, 2, 3, 4, 5, 6, 8])
GEOMETRY = CacheGeometry(2, 3, 8, "float32", "float32")


def step(scale, rows=2, geometry=GEOMETRY, schedule=SCHEDULE):
    shape = (rows, schedule.tokens[scale], geometry.heads, geometry.head_dim)
    dtype = getattr(torch, geometry.key_dtype)
    return tuple(torch.randn(shape).to(dtype) for _ in range(3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("workspace_limit", [1, 2**28])
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_full_is_bit_identical_with_a_cat_cache(dtype, workspace_limit, page_size):
    """P1, with row chunks and partly filled pages."""
    torch.manual_seed(0)
    geometry = CacheGeometry(2, 3, 32, dtype, dtype)
    cache = PagedKVCache(
        geometry, SCHEDULE, "full", page_size=page_size, workspace_limit=workspace_limit
    )
    own = [(torch.empty(0), torch.empty(0))] * 2
    with cache.open(3):
        for scale in range(len(SCHEDULE)):
            for layer in range(2):
                q, k, v = step(scale, 3, geometry)
                k_all, v_all = (part.transpose(1, 2) for part in (k, v))
                if scale:
                    k_all = torch.cat((own[layer][0], k_all), 2)
                    v_all = torch.cat((own[layer][1], v_all), 2)
                own[layer] = (k_all, v_all)
                wanted = F.scaled_dot_product_attention(q.transpose(1, 2), k_all, v_all)
                assert torch.equal(cache.attend(layer, q, k, v), wanted.transpose(1, 2))


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_stats(policy):
    cache = PagedKVCache(GEOMETRY, SCHEDULE, policy, 20, page_size=4)
    assert cache.stats.rows == cache.stats.live_pages == cache.stats.baseline_bytes == 0
    assert cache.stats.timeline == ()
    with cache.open(2):
        for scale in range(3):
            for layer in range(2):
                cache.attend(layer, *step(scale))
        stats = cache.stats
        assert stats.live_pages == stats.timeline[-1].live_pages == 2 * 3 * 2 * 4
        assert [record.kept_tokens for record in stats.timeline] == [6, 30, 84]
    stats = cache.stats
    assert stats.live_pages == 0 and len(stats.timeline) == 3
    assert stats.policy == policy and stats.backend == "torch-sdpa" and stats.rows == 2
    assert stats.page_bytes == stats.planned_pages * 4 * 8 * 8
    assert stats.baseline_bytes == 155 * 2 * 3 * 2 * 64
    assert stats.token_bytes <= stats.page_bytes


def test_calls_that_do_not_fit_change_nothing():
    cache = PagedKVCache(GEOMETRY, SCHEDULE, "full")
    q, k, v = step(0)
    with pytest.raises(ScheduleError, match="no generation is open"):
        cache.attend(0, q, k, v)
    with cache.open(2):
        with pytest.raises(ScheduleError, match="a generation is open"):
            cache.open(2)
        with pytest.raises(ScheduleError, match=r"scale 0 expects layer 0 .* got layer 1"):
            cache.attend(1, q, k, v)
        with pytest.raises(ScheduleError, match="2 rows of 1 tokens, got layer 0 with 2 rows of 4"):
            cache.attend(0, *step(1))
        with pytest.raises(ScheduleError, match="got layer 0 with 3 rows of 1"):
            cache.attend(0, *step(0, rows=3))
        with pytest.raises(ValueError, match=r"k must be torch.float32 .*, got torch.float64"):
            cache.attend(0, q, k.double(), v)
        with pytest.raises(ValueError, match=r"v must be .*\(2, 1, 3, 8\), got .*\(2, 1, 3, 7\)"):
            cache.attend(0, q, k, v[..., :7])
        with pytest.raises(ValueError, match=r"q must be \[rows, n, heads, head_dim\], got \(3,\)"):
            cache.attend(0, torch.zeros(3), k, v)
        with pytest.raises(ValueError, match="v is on meta, the pool on cpu"):
            cache.attend(0, q, k, v.to("meta"))
        assert cache.is_open and cache.stats.live_pages == 0
        for scale in range(len(SCHEDULE)):
            for layer in range(2):
                cache.attend(layer, *step(scale))
        with pytest.raises(ScheduleError, match="all 7 scales are done"):
            cache.attend(0, *step(0))
    cache.close()


def test_a_pool_that_is_too_small_is_refused_before_anything_is_made(monkeypatch):
    needed = PagedKVCache(GEOMETRY, SCHEDULE, "full").plan(2).total_bytes

    def no_pool(*args):
        raise AssertionError("made a pool")

    cache = PagedKVCache(GEOMETRY, SCHEDULE, "full", memory=needed - 1)
    with monkeypatch.context() as patch:
        patch.setattr(kvruntime.cache, "Executor", no_pool)
        with pytest.raises(WillNeverFit, match="1 of 2 rows would fit") as caught:
            cache.open(2)
    assert (caught.value.needed, caught.value.total) == (needed, needed - 1)
    assert not cache.is_open
    with cache.open(1):
        cache.attend(0, *step(0, rows=1))
    PagedKVCache(GEOMETRY, SCHEDULE, "full", memory=needed).open(2).close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": math.nan}, "got nan"),
        ({"budget": 0}, "must be positive, got 0"),
        ({"budget": -3}, "must be positive, got -3"),
        ({"budget": 15}, "below the window of 16"),
        ({"budget": 0.001}, "keeps none"),
        ({"page_size": 0}, "page_size must be a positive integer"),
        ({"memory": 0}, "memory must be a positive number of bytes, got 0"),
        ({"memory": math.nan}, "memory must be a positive number of bytes, got nan"),
        ({"memory": "80GiB"}, "memory must be a positive number of bytes, got '80GiB'"),
        ({"softmax_scale": math.nan}, "softmax_scale must be finite, got nan"),
        ({"policy": Full(), "profile": "none.json"}, "give no profile"),
        ({"policy": "none"}, "unknown policy"),
        ({"geometry": CacheGeometry(1, 1, 8, "float32", "bfloat16")}, "K and V in one dtype"),
    ],
)
def test_bad_arguments(arguments, message):
    arguments = {"geometry": GEOMETRY, "schedule": SCHEDULE} | arguments
    with pytest.raises(ValueError, match=message):
        PagedKVCache(**arguments)


@pytest.mark.parametrize("rows", [0, -1, 1.5, True])
def test_rows_are_a_positive_integer(rows):
    cache = PagedKVCache(GEOMETRY, SCHEDULE, "full")
    with pytest.raises(ValueError, match="rows must be a positive integer"):
        cache.open(rows)
    assert not cache.is_open


def test_the_pool_is_kept_for_the_same_number_of_rows_and_replaced_for_another():
    cache = PagedKVCache(GEOMETRY, SCHEDULE, "full")
    cache.open(2).close()
    executor = cache._executor
    cache.open(2).close()
    assert cache._executor is executor
    cache.open(3).close()
    assert cache._executor is not executor


def test_no_memory_for_the_tensors_leaves_the_cache_usable():
    cache = PagedKVCache(GEOMETRY, SCHEDULE, "full")
    cache.open(2).close()
    with pytest.raises(WillNeverFit, match="free on the device") as caught:
        cache.open(2**28)
    assert caught.value.needed > caught.value.total > 0
    with cache.open(2):
        cache.attend(0, *step(0))
    cache.open(2).close()
    assert cache.stats.peak_pages == 0


@pytest.mark.parametrize("name", ["allocate", "release"])
def test_an_interrupt_between_allocator_and_table_costs_the_pool_not_the_pages(monkeypatch, name):
    """Pages that no table owns cannot be given back one by one: the pool goes as a whole."""
    cache = PagedKVCache(GEOMETRY, SCHEDULE, "streaming_llm", 6, page_size=1)
    method = getattr(PageAllocator, name)

    def interrupted(self, pages):
        method(self, pages)
        raise KeyboardInterrupt

    def generate():
        for scale in range(len(SCHEDULE)):
            for layer in range(2):
                cache.attend(layer, *step(scale))

    cache.open(2)
    with monkeypatch.context() as patch:
        patch.setattr(PageAllocator, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate()
    assert not cache.is_open and cache.stats.live_pages == 0
    for _ in range(2):
        with cache.open(2):
            generate()
        assert cache.stats.planned_pages == cache.stats.peak_pages > 0


def test_autocast_does_not_reach_the_runtimes_own_arithmetic():
    def outs(limit):
        torch.manual_seed(0)
        cache = PagedKVCache(GEOMETRY, SCHEDULE, "scalekv", 20, workspace_limit=limit)
        with cache.open(2):
            return [
                cache.attend(layer, *step(scale))
                for scale in range(len(SCHEDULE))
                for layer in range(2)
            ]

    wanted = outs(2**28)
    for limit in (1, 2**28):
        with torch.autocast("cpu", torch.bfloat16):
            ours = outs(limit)
        assert all(out.dtype == torch.float32 for out in ours)
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_schedule_of_one_scale_plans_nothing(policy):
    cache = PagedKVCache(GEOMETRY, ScaleSchedule.of([3]), policy)
    assert cache.plan(2).peak_pages == 0


def test_a_schedule_of_one_scale_needs_no_cache():
    cache = PagedKVCache(GEOMETRY, ScaleSchedule.of([3]), "full")
    with cache.open(1):
        for layer in range(2):
            q, k, v = (torch.randn(1, 9, 3, 8) for _ in range(3))
            wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
            assert torch.equal(cache.attend(layer, q, k, v), wanted.transpose(1, 2))
    assert cache.stats.planned_pages == cache.stats.peak_pages == 0


def test_softmax_scale():
    torch.manual_seed(0)
    cache = PagedKVCache(GEOMETRY, SCHEDULE, "full", softmax_scale=2.0)
    q, k, v = step(0)
    cache.open(2).attend(0, q, k, v)
    q, k, v = (torch.randn(1, 4, 3, 8) for _ in range(3))
    one = PagedKVCache(GEOMETRY, ScaleSchedule.of([2]), "full", softmax_scale=2.0)
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=2.0)
    assert torch.equal(one.open(1).attend(0, q, k, v), wanted.transpose(1, 2))
