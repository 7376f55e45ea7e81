"""Whole generations beside a dense copy of what every lane holds: P2, P4, P5 and P8 by steps."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from kvruntime import CacheOptions, PagedKVCache
from kvruntime.planning.shapes import Kind
from kvruntime.storage.layout import CODED
from policies import CacheGeometry
from tests.codecs import coding_of
from tests.contents import check_attention, check_contents
from tests.lanes import Dense
from tests.support import DEVICE, Spy, policies, schedules

TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}


@dataclass
class Case:
    geometry: CacheGeometry
    schedule: object
    policy: object
    budget: int
    page_size: int
    rows: int
    workspace: int
    options: dict

    @property
    def softmax_scale(self):
        return self.geometry.head_dim**-0.5

    def cache(self, pool=None, admission=None, **options):
        chosen = CacheOptions(
            policy=self.policy,
            budget=self.budget,
            page_size=self.page_size,
            workspace=self.workspace,
            **self.options,
        )
        return PagedKVCache(
            self.geometry,
            self.schedule,
            replace(chosen, **options),
            softmax_scale=self.softmax_scale,
            pool=pool,
            admission=admission,
            device=DEVICE,
        )


NO_OPTIONS = st.just({})
formats = st.tuples(
    st.sampled_from([None, "int2", "int4", "int8", "coded2", "coded3"]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)


@st.composite
def cases(
    draw,
    dtypes=("float32", "float32", "bfloat16", "float16"),
    head_dims=(4,),
    page_sizes=(1, 2, 3, 5, 16),
    options=NO_OPTIONS,
):
    """A generation that can be planned. Quantised ones have a head dimension of 32 or more."""
    dtype = draw(st.sampled_from(dtypes))
    layers = draw(st.integers(1, 3))
    heads, schedule = draw(st.integers(1, 3)), draw(schedules)
    kv_dtype, groups, from_the_start = draw(formats)
    options = dict(draw(options))
    head_dim, page_size = draw(st.sampled_from(head_dims)), draw(st.sampled_from(page_sizes))
    if kv_dtype is not None:
        head_dim = max(head_dim, 32)
        options["kv_dtype"] = kv_dtype
        if kv_dtype.startswith("int"):
            options["kv_groups"] = groups
        if from_the_start:
            options["kv_start"] = draw(st.integers(0, len(schedule) - 1))
        page_size = max(page_size, draw(st.sampled_from([8, 16, 32, 48])))
    geometry = CacheGeometry(layers, heads, head_dim, dtype, dtype)
    if kv_dtype in CODED:
        options["coding"] = coding_of(geometry)
    case = Case(
        geometry,
        schedule,
        Spy(draw(policies(layers, heads, schedule))),
        draw(st.one_of(st.just(page_size), st.integers(1, max(1, schedule.history + 2)))),
        page_size,
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 20_000, 2**28])),
        options,
    )
    try:
        case.cache()
    except ValueError:  # a budget that this policy, or a format that this head, cannot use
        assume(False)
    return case


def fresh(case, scale, layer, rows=None, seed=0):
    """q, k, v of a step: the same whenever it is asked again."""
    generator = torch.Generator().manual_seed(seed * 10_000 + scale * 100 + layer)
    tokens, heads = case.schedule.tokens[scale], case.geometry.heads
    shape = (rows or case.rows, tokens, heads, case.geometry.head_dim)
    dtype = getattr(torch, case.geometry.key_dtype)
    return tuple(torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(3))


def check_tables(generation, scale, layer):
    """P4 and P5 after a step, where the pool serves this generation alone."""
    plan, pool = generation.plan, generation._runner.pool
    pool.check()
    live = 0
    for index, table in enumerate(generation._tables):
        at = scale if index <= layer else scale - 1
        lengths = plan.tokens[at, index] if at >= 0 else np.zeros_like(plan.tokens[0, 0])
        assert (table.lengths == lengths).all()
        size = plan.page_tokens[at, index] if at >= 0 else 1
        assert (table.num_pages == -(-lengths // size)).all()
        live += table.owned().size
    assert pool.allocator.num_live == live == plan.rows * plan.row_pages[scale, layer]


def spoil(cache, generation):
    """Whatever the workspace or a page that is free held before must not matter: it is NaN."""
    workspaces, pool = cache._workspaces, generation._runner.pool
    workspace = workspaces.borrow(generation.plan.scratch_bytes)
    workspace.memory.fill_(0xFF)
    workspaces.give_back(workspace)
    is_free = torch.from_numpy(pool.allocator.references(range(pool.num_pages)) == 0).to(DEVICE)
    for part in (pool.keys, pool.values, pool.planes):
        part[is_free] = 0xFF


def check_generation(case, cache, tolerance):
    """Draw, and compare each step's attention with the dense one over what should be kept, then
    what is kept with what the policy chose.
    """
    with cache.open(case.rows) as generation:
        plan = generation.plan
        layers = [Dense(case, plan) for _ in range(case.geometry.layers)]
        for scale in range(len(case.schedule)):
            for layer, dense in enumerate(layers):
                q, k, v = fresh(case, scale, layer)
                case.policy.chosen.clear()
                case.policy.attended.clear()
                spoil(cache, generation)
                out = generation.attend(layer, q, k, v)
                before = dense.lengths
                q, k, v, out = q.cpu(), k.cpu(), v.cpu(), out.cpu()
                dense.add(k, v, scale)
                where = f"scale {scale}, layer {layer}"
                check_attention(dense, q, out, tolerance, where, dense.attended(before))
                check_tables(generation, scale, layer)
                shape = plan.shape(scale, layer, min(plan.chunk_rows, case.rows))
                folded = any(choice.selection.into is not None for choice in case.policy.chosen)
                assert folded == (shape.kind is Kind.FOLD)
                dense.keep(scale, layer, before)
                check_contents(generation, scale, layer, dense)
        stats = generation.stats
        assert stats.live_pages == 0, "the last scale leaves pages"
        assert stats.planned_pages == stats.peak_pages == plan.peak_pages
        assert [record.scale for record in stats.timeline] == list(range(len(case.schedule)))
        assert stats.events == tuple(plan.occupancy.after.ravel())
        pool = generation._runner.pool
        assert pool.allocator.high_water == plan.peak_pages
    assert pool.stats.live_pages == pool.stats.reserved_pages == 0
