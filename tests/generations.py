"""Whole generations beside a dense copy of what every lane holds: P2, P4, P5 and P8 by steps."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from kvruntime import PagedKVCache
from kvruntime.quantize import dequantize, quantize
from policies import CacheGeometry
from tests.support import Spy, dense_attention, policies, schedules

TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}


@dataclass
class Case:
    geometry: CacheGeometry
    schedule: object
    policy: object
    budget: int
    page_size: int
    rows: int
    workspace_limit: int
    options: dict

    def cache(self, **options):
        return PagedKVCache(
            self.geometry,
            self.schedule,
            self.policy,
            self.budget,
            page_size=self.page_size,
            workspace_limit=self.workspace_limit,
            **self.options,
            **options,
        )


NO_OPTIONS = st.just({})
formats = st.tuples(
    st.sampled_from([None, "int2", "int4", "int8"]), st.sampled_from([1, 2, 4]), st.booleans()
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
    schedule = draw(schedules)
    kv_dtype, groups, from_the_start = draw(formats)
    options = dict(draw(options))
    head_dim, page_size = draw(st.sampled_from(head_dims)), draw(st.sampled_from(page_sizes))
    if kv_dtype is not None:
        head_dim = max(head_dim, 32)
        options |= {"kv_dtype": kv_dtype, "kv_groups": groups}
        if from_the_start:
            options["kv_start"] = draw(st.integers(0, len(schedule) - 1))
        page_size = max(page_size, draw(st.sampled_from([8, 16, 32, 48])))
    case = Case(
        CacheGeometry(layers, draw(st.integers(1, 3)), head_dim, dtype, dtype),
        schedule,
        Spy(draw(policies(layers))),
        draw(st.one_of(st.just(page_size), st.integers(1, max(1, schedule.history + 2)))),
        page_size,
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2000, 2**28])),
        options,
    )
    try:
        case.cache()
    except (
        ValueError
    ):  # a budget that this policy, or a format that this head dimension, cannot use
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
        dtype = getattr(torch, case.geometry.key_dtype)
        empty = torch.zeros(2, 0, case.geometry.head_dim, dtype=dtype)  # K and V
        heads = range(case.geometry.heads)
        self.lanes = [[empty for _ in heads] for _ in range(case.rows)]
        self.exact = [[0 for _ in heads] for _ in range(case.rows)]  # of the newest tokens
        self.numbers = np.empty(0, dtype=np.int64)  # of the tokens, for policies without queries

    def change(self, function):
        for r, row in enumerate(self.lanes):
            for h, lane in enumerate(row):
                row[h] = function(r, h, lane)

    def add(self, k, v, scale):
        self.change(lambda r, h, lane: torch.cat((lane, torch.stack((k[r, :, h], v[r, :, h]))), 1))
        self.numbers = np.concatenate((self.numbers, np.arange(*self.case.schedule.span(scale))))

    def quantise(self, row, first):
        """What is stored now for the first time in this format, from token ``first`` on, loses
        precision; what was stored before does not change again.
        """

        def rounded(r, h, lane):
            into = lane.clone()
            dequantize(quantize(lane, row), row, into)
            return torch.cat((lane[:, : first[h]], into[:, first[h] :]), 1)

        self.change(rounded)

    def keep(self, scale, lengths, before, chosen):
        """Drop what the policy did not choose. chosen: the (step, places) of this step, by
        chunk.
        """
        if not chosen:
            assert (lengths == before + self.case.schedule.tokens[scale]).all()
            return
        padded = int(before.max())
        if isinstance(chosen[0][1], np.ndarray):
            ((step, places),) = chosen
            numbers = step.tokens[places]
            assert np.unique(numbers).size == numbers.size == lengths[0]
            mine = [int(np.flatnonzero(self.numbers == number)[0]) for number in numbers]
            self.change(lambda r, h, lane: lane[:, mine])
            self.numbers = self.numbers[mine]
            return
        by_row = torch.cat([places for _, places in chosen])

        def kept(r, h, lane):
            mine, short = by_row[r, h, : int(lengths[h])], int(before[h])
            assert mine.unique().numel() == lengths[h]
            assert not ((mine >= short) & (mine < padded)).any(), "kept an empty place"
            return lane[:, torch.where(mine >= padded, mine - padded + short, mine)]

        self.change(kept)


def check_tables(cache, scale, layer):
    """P4 and P5 after a step."""
    run, plan, allocator = cache._run, cache._plan, cache._executor.pool.allocator
    allocator.check()
    live = 0
    for tables in run.tables:
        for index, table in enumerate(tables):
            table.check()
            at = scale if index <= layer else scale - 1
            lengths = plan.lengths[at, index] if at >= 0 else np.zeros_like(table.lengths)
            size = plan.page_size if at >= plan.start_scale else plan.exact_page_size
            assert (table.lengths == lengths).all() and table.page_size == size
            assert (table.num_pages == -(-lengths // size)).all()
            live += table.owned().size
    assert allocator.num_live == live == plan.rows * plan.row_pages[scale, layer]


def check_contents(cache, scale, layer, dense):
    """Every lane holds what it should, bit for bit, in any order."""
    run, plan = cache._run, cache._plan
    pool, head_dim = cache._executor.pool, plan.geometry.head_dim
    pages = pool.quantised if scale >= plan.start_scale else pool.exact
    for rows, tables in zip(run.chunks, run.tables, strict=True):
        table = tables[layer]
        ids = torch.from_numpy(table.pages.astype(np.int64))
        shape = (*ids.shape[:2], ids.shape[2] * pages.page_size, head_dim)
        keys, values = (torch.zeros(shape, dtype=pool.exact.keys.dtype) for _ in "kv")
        pages.gather(ids, int(table.lengths.max()), keys, values)
        for r, lanes in enumerate(dense.lanes[rows]):
            for h, lane in enumerate(lanes):
                length = int(table.lengths[h])
                held = torch.cat((keys[r, h, :length], values[r, h, :length]), 1)
                assert sorted(held.tolist()) == sorted(torch.cat(tuple(lane), 1).tolist())


def spoil(cache):
    """Whatever a page or the workspace held before must not matter: all of it is NaN."""
    executor = cache._executor
    for part in (executor.pool.exact.keys, executor.pool.exact.values, *executor._workspace):
        part.fill_(torch.nan)
    if executor.pool.quantised is not None:
        for part in (executor.pool.quantised.keys, executor.pool.quantised.values):
            part.fill_(-1)  # NaN for scale and shift


def check_generation(case, cache, tolerance):
    """Draw, and compare each step's attention with the dense one over what should be kept."""
    heads = case.geometry.heads
    softmax_scale = case.geometry.head_dim**-0.5
    with cache.open(case.rows):
        spoil(cache)
        plan = cache._plan
        layers = [Dense(case) for _ in range(case.geometry.layers)]
        for scale in range(len(case.schedule)):
            for layer, dense in enumerate(layers):
                q, k, v = fresh(case, scale, layer)
                case.policy.chosen.clear()
                out = cache.attend(layer, q, k, v)
                before = np.array([lane.shape[1] for lane in dense.lanes[0]])
                dense.add(k, v, scale)
                for r in range(case.rows):
                    for h in range(heads):
                        wanted = dense_attention(q[r, :, h], *dense.lanes[r][h], softmax_scale)
                        error = (out[r, :, h].double() - wanted).abs().max()
                        assert error < tolerance, f"scale {scale}, layer {layer}: {error}"
                check_tables(cache, scale, layer)
                if scale + 1 == len(case.schedule):
                    continue
                if scale >= plan.start_scale:
                    done = before if scale > plan.start_scale else np.zeros(heads, dtype=np.int64)
                    dense.quantise(plan.row, done)
                dense.keep(scale, plan.lengths[scale, layer], before, case.policy.chosen)
                check_contents(cache, scale, layer, dense)
        stats = cache.stats
        assert stats.live_pages == 0, "the last scale leaves pages"
        assert stats.planned_pages == stats.peak_pages
        assert [record.scale for record in stats.timeline] == list(range(len(case.schedule)))
    assert cache.stats.live_pages == 0
