"""Hazards of pages and their bytes: who reads, who writes, who owns, in what order."""

import sys
import threading

import numpy as np
import pytest
import torch

from kvruntime import CacheOptions, PagedKVCache, Pool, WillNeverFit
from kvruntime.catalogue import find_model
from kvruntime.planning import plan
from kvruntime.step import commit, run
from kvruntime.storage import pool as pool_module
from kvruntime.storage.layout import RecordFormat
from kvruntime.storage.records import dequantize, quantize
from policies import Needs
from tests.hazards.steps import (
    FORMATS,
    GEOMETRY,
    SCALES,
    Breathing,
    alone,
    assert_same,
    cache_of,
    pool_for,
    step,
    steps,
    tokens,
)
from tests.support import PLAIN_POLICIES


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize(
    "policy", [*PLAIN_POLICIES, Breathing(Needs()), Breathing(Needs(content=True))]
)
@pytest.mark.parametrize("fork_at", [2, 4])
def test_h01_copy_on_write_takes_a_page_that_the_step_still_reads(policy, options, fork_at):
    """Both sides of a fork compute what a generation by itself computes."""
    plain = cache_of(policy, **options)
    pool = pool_for(plain, 2)
    wanted = alone(policy, 1, **options)
    with cache_of(policy, pool, **options).open(2) as first:
        before = steps(first, 1, fork_at)
        with first.fork() as second:
            ours, theirs = [*before], [*before]
            while first.scale < SCALES:  # in turn, so that each takes what the other left
                ours.append(step(first, 1))
                theirs.append(step(second, 1))
                pool.check()
        assert_same(ours, wanted)
        assert_same(theirs, wanted)
    assert pool.stats.live_pages == 0


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("policy", [Breathing(Needs()), Breathing(Needs(content=True))])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_h02_pages_change_owner_before_they_are_read(policy, options, ahead):
    """Another generation of the pool takes pages and writes them in the middle of this one's
    step.
    """
    others, theirs = [], []

    def intrude(scale, layer, first_row, q, keys, values):
        if first_row == 0 and others[0].scale < SCALES:
            theirs.append(step(others[0], 2))

    plain = cache_of("full", **options)
    pool = pool_for(plain, 2)
    intruded = cache_of(policy, pool, intrude, **options)
    with cache_of("full", pool, **options).open(2) as other, intruded.open(2) as generation:
        others.append(other)
        theirs += steps(other, 2, ahead)
        ours = steps(generation, 1)
        assert other.scale == SCALES
    assert_same(ours, alone(policy, 1, **options))
    assert_same(theirs, alone("full", 2, **options))
    pool.check()


def test_h03_an_allocator_shared_by_threads_loses_pages():
    """Three threads, a generation each, switched as often as Python allows."""
    policies = ("full", "scalekv", "centroid")
    pool = pool_for(cache_of("full"), 3)
    roomy = Pool(num_pages=pool.num_pages, page_bytes=pool.page_bytes, plane_bytes=64)
    wanted = {name: alone(name, 1) for name in policies}
    failures = []

    def draw(name):
        try:
            cache = cache_of(name, roomy)
            for _ in range(6):
                with cache.open(2) as generation:
                    assert_same(steps(generation, 1), wanted[name])
        except BaseException as error:
            failures.append((name, error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=draw, args=(name,)) for name in policies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    roomy.check()
    assert roomy.stats.live_pages == 0 and roomy.stats.free_pages == roomy.num_pages


def failing(error):
    def empty(*_, **__):
        raise error

    return empty


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("No CUDA GPUs are available"),
    ],
)
def test_h05_any_error_while_the_pool_is_made_is_called_too_little_memory(monkeypatch, error):
    monkeypatch.setattr(pool_module.torch, "empty", failing(error))
    with pytest.raises(RuntimeError, match="CUDA") as caught:
        Pool(num_pages=1, page_bytes=64)
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_h05_too_little_memory_still_says_how_much_is_free(monkeypatch, error):
    monkeypatch.setattr(pool_module.torch, "empty", failing(error))
    with pytest.raises(WillNeverFit, match="6400 bytes needed") as caught:
        Pool(num_pages=100, page_bytes=64)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("policy", PLAIN_POLICIES)
def test_h06_keys_and_values_interleaved_in_one_tensor(policy, options):
    """``unbind(-1)`` leaves numbers of a token apart from each other."""
    wanted = alone(policy, 1, **options)
    with cache_of(policy, **options).open(2) as generation:
        ours = []
        while generation.scale < SCALES:
            q, *both = tokens(generation.scale, generation._layer, 1)
            k, v = torch.stack(both, dim=-1).unbind(-1)
            assert k.stride(-1) == 2
            ours.append(generation.attend(generation._layer, q, k, v))
    assert_same(ours, wanted)


def test_h12_the_workspace_follows_the_device(monkeypatch):
    """Eight pictures of Infinity-8B: a fixed 256 MiB made 8320 small steps of one row each."""
    model = find_model("infinity-8b")
    options = CacheOptions(budget=650)
    chunks = {}
    for free in (2**30, 2**36, 2**38):
        monkeypatch.setattr("kvruntime.cache.free_bytes", lambda _, free=free: free)
        cache = PagedKVCache(model.geometry, model.schedule, options, softmax_scale=1.0)
        made = cache.plan(16)
        chunks[free] = -(-made.rows // made.chunk_rows)
        assert made.chunk_rows == 1 or made.workspace_bytes <= free // 8
    assert chunks[2**30] == 16 > chunks[2**36] == chunks[2**38]
    assert chunks[2**38] <= 4
    planned = plan("infinity-8b", 8, budget=650)
    assert -(-planned.rows // planned.chunk_rows) == chunks[2**38]


@pytest.mark.parametrize("policy", PLAIN_POLICIES)
def test_h12_page_ids_go_up_as_int32_and_slots_not_at_all(policy, monkeypatch):
    sent = []

    def spy(device, arrays):
        sent.extend(arrays)
        return upload(device, arrays)

    upload = run.upload
    monkeypatch.setattr(run, "upload", spy)
    monkeypatch.setattr(commit, "upload", spy)
    cache = cache_of(policy)
    with cache.open(2) as generation:
        while generation.scale < SCALES:
            sent.clear()
            step(generation, 1)
            table = generation._tables[generation._layer - 1]
            assert all(array.dtype == np.int32 for array in sent)
            most = max(cache.plan(2).longest_table(cache.plan(2).formats[0]), table.pages.shape[2])
            assert sum(array.size for array in sent) <= 2 * 2 * GEOMETRY.heads * most


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_h20_a_range_beyond_float16_becomes_infinite(bits, groups):
    """-60000 to 60000 is 120000 wide: its step size fits float16, the range itself does not."""
    values = torch.linspace(-60_000, 60_000, 8 * 64).view(8, 64).to(torch.float16)
    values[:, ::2] *= -1
    records, out = RecordFormat(bits, groups), torch.empty_like(values)
    dequantize(quantize(values, records).unsqueeze(0), records, out.unsqueeze(0))
    assert out.isfinite().all()
    grouped = values.float().view(8, groups, -1)
    step_size = (grouped.amax(-1) - grouped.amin(-1)) / (2**bits - 1)
    error = (out.float() - values.float()).abs().view(8, groups, -1).amax(-1)
    assert (error <= 0.5 * step_size * 1.01 + 32).all()  # 32: rounding of float16 up there


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_h20_infinite_numbers_saturate(bits):
    values = torch.zeros(1, 64, dtype=torch.float16)
    values[0, 3], values[0, 5] = torch.inf, -torch.inf
    records, out = RecordFormat(bits), torch.empty_like(values)
    dequantize(quantize(values, records).unsqueeze(0), records, out.unsqueeze(0))
    assert out.isfinite().all()


def test_h20_four_bits_saturate_at_1905_as_the_docs_say():
    values = torch.zeros(1, 64, dtype=torch.float16)
    values[0, 3] = 5000.0
    records, out = RecordFormat(4), torch.empty_like(values)
    dequantize(quantize(values, records).unsqueeze(0), records, out.unsqueeze(0))
    assert float(out.max()) == 1905.0
