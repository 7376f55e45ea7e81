"""P2, P4, P5, P6, P8 over whole generations: any policy, schedule, format, batch, failure."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvruntime.executor
import kvruntime.pool
from allocator import BlockTable
from kvruntime.attention.sdpa import SDPA
from kvruntime.pool import Pages
from policies import CacheGeometry, ScaleSchedule
from tests.generations import TOLERANCE, Case, cases, check_generation, fresh
from tests.support import RandomPolicy, Spy


@settings(max_examples=200)
@given(case=cases(), generations=st.integers(1, 2), slice_tokens=st.sampled_from([3, 16, 1024]))
def test_attention_over_pages_is_dense_attention_over_the_kept_tokens(
    case, generations, slice_tokens
):
    with pytest.MonkeyPatch.context() as patch:
        for module in (kvruntime.executor, kvruntime.pool):
            patch.setattr(module, "SLICE_TOKENS", slice_tokens)
        cache = case.cache()
        for _ in range(generations):
            check_generation(case, cache, TOLERANCE[case.geometry.key_dtype])


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8", "kv_start": 2}])
@pytest.mark.parametrize(("num_queries", "is_ragged"), [(0, False), (1, False), (1, True)])
def test_lanes_that_grow_and_shrink_at_random(num_queries, is_ragged, options):
    """Survivors beyond a lane's new end move into its holes, which few drawn cases need."""
    schedule = ScaleSchedule.of([1, 2, 4, 3, 2, 3, 1])
    for seed in range(20):
        policy = Spy(RandomPolicy(seed, num_queries, is_ragged))
        geometry = CacheGeometry(2, 2, 32, "float16", "float16")
        case = Case(geometry, schedule, policy, 1, 8, 2, 2**28, options)
        check_generation(case, case.cache(), TOLERANCE["float16"])


class Broken(Exception):
    pass


PLACES = {
    "select": (Spy, "select"),
    "write": (kvruntime.executor, "write"),
    "resize": (BlockTable, "resize"),
    "gather": (Pages, "gather"),
    "attention": (SDPA, "attend"),
    "caller": (None, ""),
}


@settings(max_examples=80)
@given(case=cases(), data=st.data())
def test_a_generation_that_fails_anywhere_leaks_nothing_and_the_next_one_works(case, data):
    where = data.draw(st.sampled_from(sorted(PLACES)))
    after = data.draw(st.integers(0, 12))
    cache = case.cache()
    count = 0

    def breaking(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == after + 1:
                raise Broken
            return function(*args, **kwargs)

        return call

    def generate():
        outs = []
        for scale in range(len(case.schedule)):
            for layer in range(case.geometry.layers):
                if where == "caller":
                    breaking(lambda: None)()
                outs.append(cache.attend(layer, *fresh(case, scale, layer)))
        return outs

    with pytest.MonkeyPatch.context() as patch:
        owner, name = PLACES[where]
        if owner is not None:
            patch.setattr(owner, name, breaking(getattr(owner, name)))
        try:
            with cache.open(case.rows):
                generate()
        except Broken:
            pass
    assert not cache.is_open
    assert cache.stats.live_pages == 0
    cache._executor.pool.allocator.check()

    count = -(10**9)
    with cache.open(case.rows):
        again = generate()
    other = case.cache()
    cache = other
    with other.open(case.rows):
        wanted = generate()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, wanted, strict=True))
