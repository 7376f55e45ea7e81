"""Pools that several generations share, and pools that do not suit a cache."""

import threading

import pytest
import torch

from kvruntime import CacheOptions, OutOfPages, PagedKVCache, Pool, WillNeverFit
from kvruntime.catalogue import find_model
from policies import CacheGeometry
from tests.unit.test_cache import GEOMETRY, SCHEDULE, draw, make, step


def test_several_generations_at_once_do_not_notice_each_other():
    cache = make("scalekv", 20)
    wanted = [draw(cache.open(rows), seed=rows) for rows in (1, 2, 3)]
    open_ones = [cache.open(rows) for rows in (1, 2, 3)]
    ours = [[], [], []]
    for scale in range(len(SCHEDULE)):
        for layer in range(2):
            for mine, generation in zip(ours, open_ones, strict=True):
                rows = generation.rows
                mine.append(generation.attend(layer, *step(scale, rows, seed=rows + layer)))
    for mine, theirs in zip(ours, wanted, strict=True):
        assert all(map(torch.equal, mine, theirs))
    assert len({id(generation._runner.pool) for generation in open_ones}) == 3


def test_a_shared_pool_serves_caches_of_different_geometry():
    other = CacheGeometry(3, 2, 16, "bfloat16", "bfloat16")
    pool = Pool(memory="1MiB", page_bytes=make(page_size=4).page_bytes, plane_bytes=8)
    caches = [
        (make("full", page_size=4, pool=pool), GEOMETRY),
        (make("scalekv", 20, other, pool=pool), other),
        (make("centroid", 20, page_size=2, pool=pool), GEOMETRY),
        (make("full", geometry=CacheGeometry(1, 2, 32), kv_dtype="int4", pool=pool), None),
    ]
    caches[3] = (caches[3][0], caches[3][0].geometry)
    wanted = [draw(cache.open(2), geometry) for cache, geometry in caches]
    assert pool.stats.live_pages == 0
    generations = [cache.open(2) for cache, _ in caches]
    assert pool.stats.reserved_pages == sum(cache.plan(2).peak_pages for cache, _ in caches)
    ours = [[] for _ in caches]

    def play(index):
        ours[index] = draw(generations[index], caches[index][1])

    threads = [threading.Thread(target=play, args=(index,)) for index in range(len(caches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(ours, wanted, strict=True):
        assert all(map(torch.equal, mine, theirs))
    pool.check()
    for generation in generations:
        generation.close()
    stats = pool.stats
    assert (stats.live_pages, stats.reserved_pages, stats.free_pages) == (0, 0, stats.num_pages)


def test_a_shared_pool_refuses_what_does_not_fit():
    peak = make().plan(2).peak_pages
    pool = Pool(num_pages=peak + 1, page_bytes=make().page_bytes)
    cache = make(pool=pool)
    with pytest.raises(WillNeverFit, match="lower the budget or make the pool larger") as never:
        cache.open(3)
    assert never.value.needed == cache.plan(3).page_bytes > never.value.total == pool.num_bytes
    first = cache.open(2)
    with pytest.raises(OutOfPages, match=f"{peak} pages requested, 1 free of {peak + 1}"):
        cache.open(2)
    draw(first)
    first.close()
    with cache.open(2) as second:
        draw(second)
    del second
    abandoned = cache.open(2)
    abandoned.attend(0, *step(0))
    assert pool.stats.live_pages > 0
    del abandoned
    assert (pool.stats.live_pages, pool.stats.reserved_pages) == (0, 0), "nobody closed it"
    pool.check()


def test_pools_that_do_not_suit_a_cache():
    with pytest.raises(ValueError, match=r"centroid needs 32 bytes of .* has 0: make"):
        make("centroid", 20, pool=Pool(num_pages=9, page_bytes=1024))
    with pytest.raises(ValueError, match="plane_bytes must be a multiple of 2, got 3"):
        Pool(num_pages=9, page_bytes=1024, plane_bytes=3)
    with pytest.raises(ValueError, match="make the pool's pages a multiple of 64 bytes"):
        make(pool=Pool(num_pages=9, page_bytes=32))
    meta = Pool(num_pages=99, page_bytes=1024, device="meta")
    with pytest.raises(ValueError, match="q is on cpu, the pool on meta"):
        make(pool=meta).open(1).attend(0, *step(0, rows=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT RUN: there is a GPU")
def test_cuda_without_a_gpu_is_a_clear_error():
    message = "device cuda: torch sees no CUDA device here, use device='cpu'"
    with pytest.raises(ValueError, match=message):
        PagedKVCache(GEOMETRY, SCHEDULE, softmax_scale=1.0, device="cuda")
    with pytest.raises(ValueError, match=message):
        Pool(num_pages=1, page_bytes=64, device="cuda")
    with pytest.raises(ValueError, match="device cuda, but the pool is on cpu"):
        pool = Pool(num_pages=1, page_bytes=1024)
        PagedKVCache(GEOMETRY, SCHEDULE, softmax_scale=1.0, pool=pool, device="cuda")


@pytest.mark.parametrize("policy", ["scalekv", "centroid", "full"])
@pytest.mark.parametrize("kv_dtype", [None, "int4"])
@pytest.mark.parametrize("budget", [0.1, "2%", "4%", "10%", "25%"])
@pytest.mark.parametrize("model", ["emoji64", "var-d16", "infinity-125m"])
def test_a_pool_of_a_caches_own_pages_serves_it_as_its_own_would(model, budget, kv_dtype, policy):
    """Pages of 13 tokens were read as pages of one, and nine tenths of the tokens were lost."""
    known = find_model(model)
    options = CacheOptions(policy, budget, kv_dtype=kv_dtype)
    try:
        own = PagedKVCache(known.geometry, known.schedule, options, softmax_scale=1.0)
    except WillNeverFit:
        return
    pool = Pool(num_pages=1, page_bytes=own.page_bytes, plane_bytes=own.plane_bytes)
    cache = PagedKVCache(known.geometry, known.schedule, options, softmax_scale=1.0, pool=pool)
    ours, theirs = own.plan(2), cache.plan(2)
    assert (ours.page_size, ours.exact_page_size) == (theirs.page_size, theirs.exact_page_size)
    assert (ours.budget_tokens, ours.start_scale) == (theirs.budget_tokens, theirs.start_scale)
    assert ours.page_bytes == theirs.page_bytes


@pytest.mark.parametrize(
    ("page_bytes", "options"),
    [
        (4096, {"page_size": 24}),
        (4096, {"page_size": 1000}),
        (1028, {"page_size": 5}),
        (1028, {}),
        (4096, {"page_size": 400, "kv_dtype": "int4"}),
    ],
)
def test_pages_that_hold_no_whole_tokens_are_refused_with_the_cache(page_bytes, options):
    geometry = CacheGeometry(2, 2, 32, "float32", "float32")
    pool = Pool(num_pages=9, page_bytes=page_bytes)
    with pytest.raises(ValueError, match="half a page"):
        make("full", geometry=geometry, pool=pool, **options)


@pytest.mark.parametrize(
    ("dtype", "page_bytes", "kv_dtype", "page_size", "sizes"),
    [
        ("bfloat16", 660, None, None, (5, 5)),  # 64-byte tokens at a distance of 66
        ("float32", 60_000, "int4", None, (750, 15)),  # 1500 records of 20 bytes: 1024 at most
        ("float32", 4096, "int4", 16, (16, 16)),  # 102 would fit
    ],
)
def test_pages_of_others(dtype, page_bytes, kv_dtype, page_size, sizes):
    geometry = CacheGeometry(2, 2, 32, dtype, dtype)
    pool = Pool(num_pages=9, page_bytes=page_bytes)
    cache = make("full", geometry=geometry, pool=pool, kv_dtype=kv_dtype, page_size=page_size)
    made = cache.plan(1)
    assert (made.page_size, made.exact_page_size) == sizes
    assert all(pool.view(made.layout(each, page_bytes)) for each in made.formats)


def test_exact_tokens_in_pages_of_64_records():
    """18 would fill them, which the paged kernel cannot read: 16, as in a pool of its own."""
    geometry = CacheGeometry(2, 2, 64, "bfloat16", "bfloat16")
    own = make("full", geometry=geometry, kv_dtype="int4", page_size=64)
    pool = Pool(num_pages=9, page_bytes=own.page_bytes)
    cache = make("full", geometry=geometry, kv_dtype="int4", page_size=64, pool=pool)
    assert own.plan(1).exact_page_size == cache.plan(1).exact_page_size == 16


def test_records_lie_at_whole_numbers():
    geometry = CacheGeometry(2, 2, 32, "bfloat16", "bfloat16")
    with pytest.raises(ValueError, match="make the pool's pages a multiple of 40 bytes"):
        make("full", geometry=geometry, kv_dtype="int4", pool=Pool(num_pages=9, page_bytes=252))
