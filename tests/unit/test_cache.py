"""PagedKVCache: P1 exact, P9 refuse early, interrupts, calls that do not fit."""

import pytest
import torch
import torch.nn.functional as F

import kvruntime.cache
from allocator import PageAllocator
from kvruntime import CacheOptions, PagedKVCache, ScheduleError, WillNeverFit
from policies import CacheGeometry, ScaleSchedule
from tests.support import PLAIN_POLICIES

SCHEDULE = ScaleSchedule.of([1, 2, 3, 4, 5, 6, 8])
GEOMETRY = CacheGeometry(2, 3, 8, "float32", "float32")
SCALE = 8**-0.5


def make(policy="full", budget=0.10, geometry=GEOMETRY, schedule=SCHEDULE, **options):
    outside = {name: options.pop(name) for name in ("pool", "observer") if name in options}
    chosen = CacheOptions(policy=policy, budget=budget, **options)
    scale = geometry.head_dim**-0.5
    return PagedKVCache(geometry, schedule, chosen, softmax_scale=scale, **outside)


def step(scale, rows=2, geometry=GEOMETRY, schedule=SCHEDULE, seed=0):
    generator = torch.Generator().manual_seed(seed * 1000 + scale)
    shape = (rows, schedule.tokens[scale], geometry.heads, geometry.head_dim)
    dtype = getattr(torch, geometry.key_dtype)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(3))


def draw(generation, geometry=GEOMETRY, schedule=SCHEDULE, seed=0):
    """Every output of a whole generation, left open."""
    return [
        generation.attend(layer, *step(scale, generation.rows, geometry, schedule, seed + layer))
        for scale in range(len(schedule))
        for layer in range(geometry.layers)
    ]


def sdpa(q, k, v, **options):
    """torch's own attention of [rows, n, heads, head_dim]."""
    turned = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(*turned, **options).transpose(1, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_full_is_bit_identical_with_a_cat_cache(dtype, workspace, page_size):
    """P1 in one chunk; with a workspace for one row, against torch's attention row by row."""
    geometry = CacheGeometry(2, 3, 32, dtype, dtype)
    cache = make(geometry=geometry, page_size=page_size, workspace=workspace)
    assert cache.plan(3).chunk_rows == (1 if workspace else 3)
    own = [(torch.empty(0), torch.empty(0))] * 2
    with cache.open(3) as generation:
        for scale in range(len(SCHEDULE)):
            for layer in range(2):
                q, k, v = step(scale, 3, geometry, seed=layer)
                k_all, v_all = (part.transpose(1, 2) for part in (k, v))
                if scale:
                    k_all = torch.cat((own[layer][0], k_all), 2)
                    v_all = torch.cat((own[layer][1], v_all), 2)
                own[layer] = (k_all, v_all)
                chunks = [slice(0, 3)] if workspace is None else [slice(r, r + 1) for r in range(3)]
                wanted = torch.cat(
                    [
                        F.scaled_dot_product_attention(
                            q[rows].transpose(1, 2), k_all[rows], v_all[rows]
                        )
                        for rows in chunks
                    ]
                )
                out = generation.attend(layer, q, k, v)
                assert torch.equal(out, wanted.transpose(1, 2)), (scale, layer)


@pytest.mark.parametrize("policy", ["full", "scalekv", "centroid", "streaming_llm"])
@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_keys_and_values_may_lie_anyhow(policy, kv_dtype):
    """Views of one interleaved tensor, [rows, heads, n, head_dim] turned round, a broadcast row."""
    geometry = CacheGeometry(1, 3, 32, "bfloat16", "bfloat16")

    def outs(change):
        with make(policy, 20, geometry, kv_dtype=kv_dtype).open(2) as generation:
            return [
                generation.attend(0, *change(*step(scale, 2, geometry)))
                for scale in range(len(SCHEDULE))
            ]

    wanted = outs(lambda q, k, v: (q, k, v))
    for change in (
        lambda q, k, v: torch.stack((q, k, v), -1).unbind(-1),
        lambda q, k, v: torch.stack((q, k, v), 2).unbind(2),
        lambda *qkv: [part.transpose(1, 2).contiguous().transpose(1, 2) for part in qkv],
    ):
        for ours, theirs in zip(outs(change), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)
    one = outs(lambda *qkv: [part[:1].expand(2, -1, -1, -1) for part in qkv])
    same = outs(lambda *qkv: [part[:1].repeat(2, 1, 1, 1) for part in qkv])
    for ours, theirs in zip(one, same, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)


@pytest.mark.parametrize("policy", sorted({*PLAIN_POLICIES} - {"pyramidkv"}))  # layers differ
def test_stats(policy):
    cache = make(policy, 20, page_size=4)
    with cache.open(2) as generation:
        stats = generation.stats
        assert stats.live_pages == stats.peak_pages == 0 and stats.timeline == ()
        for scale in range(3):
            for layer in range(2):
                generation.attend(layer, *step(scale))
        stats = generation.stats
        assert stats.live_pages == stats.timeline[-1].live_pages == 2 * 3 * 2 * 4
        assert [record.kept_tokens for record in stats.timeline] == [6, 30, 84]
        assert (generation.scale, generation.rows, generation.is_open) == (3, 2, True)
    stats = generation.stats
    assert stats.live_pages == 0 and len(stats.timeline) == 3 and not generation.is_open
    assert stats.policy == policy and stats.backend == "torch-sdpa" and stats.rows == 2
    planes = 4 * 2 if policy in ("centroid", "h2o") else 0
    assert (cache.page_bytes, cache.plane_bytes) == (4 * 8 * 8, planes)
    assert stats.page_bytes == stats.planned_pages * (4 * 8 * 8 + planes)
    assert stats.plane_bytes == stats.planned_pages * planes
    assert stats.baseline_bytes == 155 * 2 * 3 * 2 * 64
    assert stats.history_bytes == 91 * 2 * 3 * 2 * 64
    assert stats.token_bytes <= stats.page_bytes
    assert (stats.page_steps, stats.gather_steps) == (0, 6)
    with cache.open(2) as generation:
        draw(generation)
        assert generation.stats.peak_pages == generation.stats.planned_pages
        assert generation.stats.timeline[-1].live_pages == 0


def test_calls_that_do_not_fit_change_nothing():
    cache = make()
    q, k, v = step(0)
    with cache.open(2) as generation:
        for error, message, call in (
            (ScheduleError, r"scale 0 expects layer 0 .* got layer 1", (1, q, k, v)),
            (ScheduleError, "2 rows of 1 tokens, got layer 0 with 2 rows of 4", (0, *step(1))),
            (ScheduleError, "got layer 0 with 3 rows of 1", (0, *step(0, rows=3))),
            (ValueError, r"k must be torch.float32 .*, got torch.float64", (0, q, k.double(), v)),
            (
                ValueError,
                r"v must be .*\(2, 1, 3, 8\), got .*\(2, 1, 3, 7\)",
                (0, q, k, v[..., 1:]),
            ),
            (
                ValueError,
                r"q must be \[rows, n, heads, head_dim\], got \(3,\)",
                (0, v[0, 0, 0, :3], k, v),
            ),
            (ValueError, "v is on meta, the pool on cpu", (0, q, k, v.to("meta"))),
        ):
            with pytest.raises(error, match=message):
                generation.attend(*call)
        assert generation.is_open and generation.stats.live_pages == 0
        wanted = draw(make().open(2))
        for ours, theirs in zip(draw(generation), wanted, strict=True):
            assert torch.equal(ours, theirs)
        with pytest.raises(ScheduleError, match="all 7 scales are done"):
            generation.attend(0, *step(0))
    generation.close()
    with pytest.raises(ScheduleError, match="this generation is closed: open"):
        generation.attend(0, *step(0))


def test_transposed_tensors_are_named():
    """[rows, heads, n, head_dim] would fit where there are as many heads as tokens."""
    generation = make().open(2)
    with pytest.raises(
        ValueError, match=r"q is \(2, 3, 1, 8\): it looks transposed.*\(2, 1, 3, 8\)"
    ):
        generation.attend(0, *(part.transpose(1, 2) for part in step(0)))
    geometry = CacheGeometry(1, 4, 8, "float32", "float32")
    square = make(geometry=geometry, schedule=ScaleSchedule.of([2])).open(1)
    q, k, v = (torch.randn(1, 4, 4, 8) for _ in range(3))  # as many heads as tokens
    torch.testing.assert_close(square.attend(0, q, k, v), sdpa(q, k, v))


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, "2"])
def test_rows_are_a_positive_integer(rows):
    with pytest.raises(ValueError, match="rows must be a positive integer"):
        make().open(rows)


def test_memory_is_refused_before_anything_is_made(monkeypatch):
    needed = make().plan(2).total_bytes

    def no_pool(*args, **kwargs):
        raise AssertionError("made a pool")

    cache = make(memory=needed - 1)
    with monkeypatch.context() as patch:
        patch.setattr(kvruntime.cache, "Pool", no_pool)
        with pytest.raises(WillNeverFit, match="1 of 2 rows would fit") as caught:
            cache.open(2)
    assert (caught.value.needed, caught.value.total) == (needed, needed - 1)
    with cache.open(1) as generation:
        draw(generation)
    make(memory=needed).open(2).close()
    assert make(memory="1GiB").options.memory == 2**30


def test_the_own_pool_is_kept_for_as_many_rows():
    cache = make()

    def pool_of(rows):
        with cache.open(rows) as generation:
            return generation._runner.pool

    first = pool_of(2)
    assert pool_of(2) is first
    other = pool_of(3)
    assert other is not first and other.num_pages == cache.plan(3).peak_pages
    assert pool_of(2) is not first
    last = pool_of(2)
    cache.let_go()
    assert pool_of(2) is not last


def test_no_memory_for_the_tensors_leaves_the_cache_usable():
    cache = make()
    wide = make(geometry=CacheGeometry(2, 3, 2**16, "float32", "float32"))
    for large, rows, words in ((cache, 2**28, "no device has"), (wide, 2**20, "free on the dev")):
        with pytest.raises(WillNeverFit, match=words) as caught:
            large.open(rows)
        assert caught.value.needed == large.plan(rows).page_bytes > caught.value.total > 0
    with cache.open(2) as generation:
        draw(generation)


@pytest.mark.parametrize("name", ["exchange", "release", "allocate"])
@pytest.mark.parametrize("is_late", [False, True])
def test_an_interrupt_while_pages_change_hands(monkeypatch, name, is_late):
    """The generation is closed, every page is back, and the pool serves the next one."""
    cache = make("streaming_llm", 6, page_size=1)
    method = getattr(PageAllocator, name)
    for skipped in (0, 1):
        left = skipped

        def interrupted(self, *args):
            nonlocal left
            left -= 1
            if left >= 0:
                return method(self, *args)
            if is_late:
                method(self, *args)
            left = 10**9
            raise KeyboardInterrupt

        generation = cache.open(2)
        pool = generation._runner.pool
        with monkeypatch.context() as patch:
            patch.setattr(PageAllocator, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                draw(generation)
        assert not generation.is_open and generation.stats.live_pages == 0
        pool.check()
        assert (pool.stats.live_pages, pool.stats.reserved_pages) == (0, 0)
        with cache.open(2) as generation:
            assert generation._runner.pool is pool
            draw(generation)
        assert generation.stats.planned_pages == generation.stats.peak_pages > 0


def test_an_interrupt_in_close_is_carried_out_and_then_raised(monkeypatch):
    cache = make("full", page_size=4)
    generation = cache.open(2)
    for layer in range(2):
        generation.attend(layer, *step(0))
    pool, release, calls = generation._runner.pool, PageAllocator.release, 0

    def interrupted(self, pages):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return release(self, pages)

    with monkeypatch.context() as patch:
        patch.setattr(PageAllocator, "release", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generation.close()
    assert not generation.is_open and generation.stats.live_pages == 0
    pool.check()
    assert (pool.stats.live_pages, pool.stats.reserved_pages) == (0, 0)
    with cache.open(2) as generation:
        assert generation._runner.pool is pool, "given back to the cache"
