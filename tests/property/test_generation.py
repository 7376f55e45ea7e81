"""P2, P4, P5, P6, P8 over whole generations: any policy, schedule, page size, batch, failure."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from allocator import BlockTable
from kvruntime import PagedKVCache
from kvruntime.attention import sdpa
from kvruntime.pool import Pool
from policies import CacheGeometry
from tests.support import Spy, dense_attention, policies, schedules


@dataclass
class Case:
    geometry: CacheGeometry
    schedule: object
    policy: object
    budget: int
    page_size: int
    rows: int
    workspace_limit: int

    def cache(self, **options):
        return PagedKVCache(
            self.geometry,
            self.schedule,
            self.policy,
            self.budget,
            page_size=self.page_size,
            workspace_limit=self.workspace_limit,
            **options,
        )


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"]))
    layers = draw(st.integers(1, 3))
    schedule = draw(schedules)
    case = Case(
        CacheGeometry(layers, draw(st.integers(1, 3)), 4, dtype, dtype),
        schedule,
        Spy(draw(policies(layers))),
        draw(st.integers(1, max(1, schedule.history + 2))),
        draw(st.sampled_from([1, 2, 3, 5, 16])),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2000, 2**28])),
    )
    try:
        case.policy.lengths(case.schedule, case.geometry, case.budget)
    except ValueError:  # this policy cannot work with this budget
        assume(False)
    return case


def fresh(case, scale, layer):
    """q, k, v of a step: the same whenever it is asked again."""
    generator = torch.Generator().manual_seed(scale * 100 + layer)
    shape = (case.rows, case.schedule.tokens[scale], case.geometry.heads, case.geometry.head_dim)
    dtype = getattr(torch, case.geometry.key_dtype)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(3))


class Dense:
    """One layer's lanes as plain tensors, kept by the policy's recorded choices."""

    def __init__(self, case):
        self.case = case
        empty = torch.zeros(0, case.geometry.head_dim)
        heads = range(case.geometry.heads)
        self.k = [[empty for _ in heads] for _ in range(case.rows)]
        self.v = [[empty for _ in heads] for _ in range(case.rows)]
        self.numbers = np.empty(0, dtype=np.int64)  # of the tokens, for policies without queries

    def add(self, k, v, scale):
        for r in range(self.case.rows):
            for h in range(self.case.geometry.heads):
                self.k[r][h] = torch.cat((self.k[r][h].to(k), k[r, :, h]))
                self.v[r][h] = torch.cat((self.v[r][h].to(v), v[r, :, h]))
        self.numbers = np.concatenate((self.numbers, np.arange(*self.case.schedule.span(scale))))

    def keep(self, scale, layer, lengths, before, chosen):
        """Drop what the policy did not choose. chosen: the (step, places) of this step, by
        chunk.
        """
        if not chosen:
            assert (lengths == before + self.case.schedule.tokens[scale]).all()
            return
        row = 0
        padded = int(before.max())
        for step, places in chosen:
            if isinstance(places, np.ndarray):
                numbers = step.tokens[places]
                assert np.unique(numbers).size == numbers.size == lengths[0]
                mine = [int(np.flatnonzero(self.numbers == number)[0]) for number in numbers]
                for r in range(self.case.rows):
                    for h in range(self.case.geometry.heads):
                        self.k[r][h], self.v[r][h] = self.k[r][h][mine], self.v[r][h][mine]
                self.numbers = self.numbers[mine]
                return
            for lane_places in places:
                for h, length in enumerate(lengths.tolist()):
                    mine = lane_places[h, :length]
                    assert mine.unique().numel() == length
                    short = int(before[h])
                    assert not ((mine >= short) & (mine < padded)).any(), "kept an empty place"
                    mine = torch.where(mine >= padded, mine - padded + short, mine)
                    self.k[row][h], self.v[row][h] = self.k[row][h][mine], self.v[row][h][mine]
                row += 1


TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}


def check_tables(cache, scale, layer):
    """P4 and P5 after a step."""
    run, plan, allocator = cache._run, cache._plan, cache._pool.allocator
    allocator.check()
    live = 0
    for tables in run.tables:
        for index, table in enumerate(tables):
            table.check()
            at = scale if index <= layer else scale - 1
            lengths = plan.lengths[at, index] if at >= 0 else np.zeros_like(table.lengths)
            assert (table.lengths == lengths).all()
            assert (table.num_pages == -(-lengths // plan.page_size)).all()
            live += table.owned().size
    assert allocator.num_live == live == plan.rows * plan.row_pages[scale, layer]


@settings(max_examples=120)
@given(case=cases(), generations=st.integers(1, 2))
def test_attention_over_pages_is_dense_attention_over_the_kept_tokens(case, generations):
    cache = case.cache()
    for _ in range(generations):
        case.policy.chosen.clear()
        with cache.open(case.rows):
            cache._pool.keys.fill_(torch.nan)  # whatever a page held before must not matter
            cache._pool.values.fill_(torch.nan)
            plan = cache._plan
            lanes = [Dense(case) for _ in range(case.geometry.layers)]
            for scale in range(len(case.schedule)):
                for layer, dense in enumerate(lanes):
                    q, k, v = fresh(case, scale, layer)
                    case.policy.chosen.clear()
                    out = cache.attend(layer, q, k, v)
                    dense.add(k, v, scale)
                    for r in range(case.rows):
                        for h in range(case.geometry.heads):
                            wanted = dense_attention(q[r, :, h], dense.k[r][h], dense.v[r][h], 0.5)
                            error = (out[r, :, h].double() - wanted).abs().max()
                            assert error < TOLERANCE[case.geometry.key_dtype]
                    check_tables(cache, scale, layer)
                    before = (
                        plan.lengths[scale - 1, layer]
                        if scale
                        else np.zeros(case.geometry.heads, dtype=np.int64)
                    )
                    if scale + 1 < len(case.schedule):
                        dense.keep(
                            scale, layer, plan.lengths[scale, layer], before, case.policy.chosen
                        )
            stats = cache.stats
            assert stats.live_pages == 0, "the last scale leaves pages"
            assert stats.planned_pages == stats.peak_pages
            assert [record.scale for record in stats.timeline] == list(range(len(case.schedule)))
        assert cache.stats.live_pages == 0


class Broken(Exception):
    pass


PLACES = {
    "select": (Spy, "select"),
    "write": (Pool, "write"),
    "resize": (BlockTable, "resize"),
    "gather": (Pool, "gather"),
    "attention": (sdpa, "attend"),
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
    cache._pool.allocator.check()

    count = -(10**9)
    with cache.open(case.rows):
        again = generate()
    other = case.cache()
    cache = other
    with other.open(case.rows):
        wanted = generate()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, wanted, strict=True))
