"""P2, P4, P5, P6, P8 over whole generations: any policy, schedule, format, batch, failure."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kvruntime.generation
import kvruntime.planning.regions
import kvruntime.step.encode
import kvruntime.step.fold
import kvruntime.step.keep
import kvruntime.step.read
import kvruntime.step.refit
import kvruntime.step.run
import kvruntime.step.shift
import kvruntime.storage.coding
import kvruntime.storage.records
import policies.scoring
from allocator import BlockTable
from kvruntime.attention.sdpa import SDPA
from kvruntime.storage.coding import Transform
from policies import CacheGeometry, ScaleSchedule, StreamingLLM
from tests.generations import TOLERANCE, Case, cases, check_generation, fresh
from tests.support import RandomFold, RandomPolicy, Spy

SLICES = {  # tokens that are worked on at a time, wherever the name was imported
    "SLICE_TOKENS": [kvruntime.storage.records, kvruntime.storage.coding],
    "READ_TOKENS": [kvruntime.planning.regions],
    "CODED_TOKENS": [kvruntime.planning.regions],
    "BLOCK": [policies.scoring, kvruntime.planning.regions, kvruntime.step.fold],
}


@settings(max_examples=150)
@given(
    case=cases(),
    generations=st.integers(1, 2),
    tokens=st.fixed_dictionaries({name: st.sampled_from([1, 3, 16, 1024]) for name in SLICES}),
)
def test_attention_over_pages_is_dense_attention_over_what_is_kept(case, generations, tokens):
    with pytest.MonkeyPatch.context() as patch:
        for name, modules in SLICES.items():
            for module in modules:
                patch.setattr(module, name, tokens[name])
        cache = case.cache()
        for _ in range(generations):
            check_generation(case, cache, TOLERANCE[case.geometry.key_dtype])


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"kv_dtype": "int8", "kv_start": 2}])
@pytest.mark.parametrize(
    ("make", "num_queries", "is_ragged"),
    [
        (RandomPolicy, 0, False),
        (RandomPolicy, 0, True),
        (RandomPolicy, 1, False),
        (RandomPolicy, 1, True),
        (RandomFold, 1, False),
        (RandomFold, 1, True),
    ],
)
def test_lanes_that_grow_and_shrink_at_random(make, num_queries, is_ragged, options):
    """Survivors beyond a lane's new end move into its holes, which few drawn cases need."""
    schedule = ScaleSchedule.of([1, 2, 4, 3, 2, 3, 1])
    for seed in range(12):
        policy = Spy(make(seed, num_queries, is_ragged))
        dtype = "bfloat16" if seed % 3 else "float16"
        geometry = CacheGeometry(2, 2, 32, dtype, dtype)
        workspace = 2**28 if seed % 2 else 1
        case = Case(geometry, schedule, policy, 1, 8, 2, workspace, options)
        check_generation(case, case.cache(), TOLERANCE[dtype])


class Broken(Exception):
    pass


PLACES = {
    "select": [(Spy, "select")],
    "write": [(kvruntime.step.keep, "write"), (kvruntime.step.shift, "write")],
    "write planes": [(kvruntime.step.keep, "write_planes"), (kvruntime.step.fold, "pack_plane")],
    "refit": [(kvruntime.step.refit, "masses"), (kvruntime.step.fold, "refit")],
    "propose": [(BlockTable, "propose")],
    "commit": [(BlockTable, "commit")],
    "after the commit": [(kvruntime.step.commit, "_written_places")],
    "gather": [(kvruntime.step.read, "gather"), (kvruntime.step.read, "_gather_records")],
    "quantise": [(kvruntime.step.encode, "quantize"), (Transform, "encode")],
    "attention": [(SDPA, "attend")],
    "advance": [(kvruntime.generation.Generation, "_advance")],
    "caller": [],
}


PLANNED_HALF_WAY = Case(  # the policy is first asked when the workspace is made
    CacheGeometry(2, 3, 32, "float32", "float32"),
    ScaleSchedule.of([1, (1, 2, 2), (2, 3, 1), (1, 2, 2), (2, 4)]),
    Spy(StreamingLLM()),
    9,
    32,
    2,
    20_000,
    {"kv_dtype": "int4", "kv_start": 0},
)


@settings(max_examples=120)
@example(case=PLANNED_HALF_WAY, where="select", after=1)
@given(case=cases(), where=st.sampled_from(sorted(PLACES)), after=st.integers(0, 12))
def test_a_generation_that_fails_anywhere_leaks_nothing_and_the_next_one_works(case, where, after):
    cache, count = case.cache(), 0

    def breaking(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == after + 1:
                raise Broken
            return function(*args, **kwargs)

        return call

    def generate(generation):
        outs = []
        for scale in range(len(case.schedule)):
            for layer in range(case.geometry.layers):
                if where == "caller":
                    breaking(lambda: None)()
                outs.append(generation.attend(layer, *fresh(case, scale, layer)))
        return outs

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in PLACES[where]:
            patch.setattr(owner, name, breaking(getattr(owner, name)))
        generation = cache.open(case.rows)
        pool = generation._runner.pool
        try:
            with generation:
                generate(generation)
        except Broken:
            pass
    assert not generation.is_open and generation.stats.live_pages == 0
    assert pool.stats.live_pages == pool.stats.reserved_pages == 0
    pool.check()

    count = -(10**9)
    with cache.open(case.rows) as generation:
        assert generation._runner.pool is pool, "the pool serves the next one"
        again = generate(generation)
    with case.cache().open(case.rows) as generation:
        wanted = generate(generation)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, wanted, strict=True))
