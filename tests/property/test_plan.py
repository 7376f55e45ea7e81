"""P2 and P9 by arithmetic: N rows fit and N + 1 raise; lengths keep their promises."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvruntime import CacheOptions
from kvruntime.errors import WillNeverFit
from kvruntime.planning import make_plan, max_rows, require
from kvruntime.planning.demand import running_total
from kvruntime.planning.regions import output_bytes
from kvruntime.planning.shapes import Kind
from kvruntime.storage.layout import PLANE_BYTES, stored_bytes
from policies import Allocation, CacheGeometry, Problem, check_allocation
from tests.support import policies, schedules

QUANTISED = [(dtype, groups) for dtype in ("int2", "int4", "int8") for groups in (1, 2)]
QUANTISED += [("coded2", 1), ("coded3", 1)]


@st.composite
def plans(draw):
    layers = draw(st.integers(1, 4))
    schedule = draw(schedules)
    kv = draw(st.sampled_from([None, None, *QUANTISED]))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    geometry = CacheGeometry(
        layers,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 8)) if kv is None else draw(st.sampled_from([32, 64])),
        dtype,
        dtype,
    )
    budget = draw(st.one_of(st.integers(1, schedule.total + 1), st.floats(0.01, 1.0)))
    options = CacheOptions(
        budget=budget,
        page_size=draw(st.sampled_from([1, 3, 16, 64] if kv is None else [16, 32, 48])),
        workspace=draw(st.sampled_from([1, 5_000, 100_000])),
        kv_dtype=kv[0] if kv else None,
        kv_groups=kv[1] if kv else 1,
        kv_start=draw(st.integers(0, len(schedule) - 1)) if kv and draw(st.booleans()) else None,
    )
    policy, rows = draw(policies(layers, geometry.heads, schedule)), draw(st.integers(1, 9))
    try:
        return make_plan(geometry, schedule, policy, options, rows)
    except ValueError:
        assume(False)


def event_by_event(plan):
    """Pages and token bytes of a row after each (scale, layer), walked in plain Python: a layer
    changes its format in the moment when it is served.
    """
    geometry = plan.geometry
    weight = PLANE_BYTES * len(plan.planes)
    formats = [plan.formats[0]] * geometry.layers
    held = [[0] * geometry.heads for _ in range(geometry.layers)]
    for scale in range(len(plan.schedule)):
        for layer in range(geometry.layers):
            held[layer] = plan.tokens[scale, layer].tolist()
            formats[layer] = plan.format_after(scale, layer)
            pages = size = 0
            for lanes, each in zip(held, formats, strict=True):
                token = stored_bytes(geometry, each.records) + weight
                pages += sum(-(-tokens // each.page_size) for tokens in lanes)
                size += sum(lanes) * token
            yield scale, layer, pages, size


@given(plan=plans())
def test_totals_are_the_walk_over_all_events(plan):
    pages, tokens, after_scale = [], [], []
    for scale, layer, now_pages, now_tokens in event_by_event(plan):
        assert plan.row_pages[scale, layer] == now_pages
        pages.append(now_pages)
        tokens.append(now_tokens)
        if layer == plan.geometry.layers - 1:
            after_scale.append(now_tokens)
    page = plan.page_size * stored_bytes(plan.geometry, plan.records)
    places = max(each.page_size for each in plan.formats)
    planes = places * PLANE_BYTES * len(plan.planes)
    assert (plan.bytes_per_page, plan.plane_bytes_per_page) == (page, planes)
    assert plan.peak_pages == plan.rows * max(pages)
    assert plan.plane_bytes == planes * plan.rows * max(pages)
    assert plan.page_bytes == (page + planes) * plan.rows * max(pages)
    assert plan.exact_page_size * plan.geometry.token_bytes <= page
    assert plan.peak_token_bytes == plan.rows * max(tokens)
    most = plan.rows * max(after_scale)
    assert plan.token_bytes == most <= plan.peak_token_bytes <= plan.page_bytes
    assert plan.total_bytes == plan.page_bytes + plan.workspace_bytes
    problem = Problem(plan.geometry, plan.schedule, plan.budget_tokens)
    check_allocation(Allocation(plan.tokens, np.array(plan.quantised)), problem)
    if plan.records is None:
        assert not plan.quantised.any()


@settings(max_examples=50)
@given(plan=plans(), memory=st.integers(0, 1_000_000), reserved=st.integers(0, 1000))
def test_n_rows_fit_and_one_more_raises(plan, memory, reserved):
    assume(plan.schedule.history and plan.total_bytes)  # a policy may keep nothing at all
    fits = max_rows(plan, memory, reserved)
    for rows in {1, fits} if fits else ():  # one less may need more: rows in other chunks
        require(plan.for_rows(rows), memory, reserved)
    with pytest.raises(WillNeverFit) as caught:
        require(plan.for_rows(fits + 1), memory, reserved)
    assert caught.value.total == memory - reserved < caught.value.needed
    assert (f"{fits} of {fits + 1} rows" if fits else "not one row fits") in str(caught.value)


def step_bytes(plan, rows):
    """Bytes that are made beforehand and those beside them, of steps of so many rows."""
    steps = [
        plan.shape(scale, layer, rows)
        for scale in range(len(plan.schedule))
        for layer in range(plan.geometry.layers)
    ]
    regions = [plan.regions(shape) for shape in steps]
    beside = [
        part.torch_bytes + output_bytes(shape, plan.rows)
        for part, shape in zip(regions, steps, strict=True)
    ]
    return max(part.num_bytes for part in regions), max(beside)


@given(plan=plans())
def test_the_workspace_is_bounded_and_chunks_are_as_large_as_it_allows(plan):
    sums = {rows: sum(step_bytes(plan, rows)) for rows in range(1, plan.rows + 1)}
    fitting = [rows for rows, size in sums.items() if size <= plan.workspace_limit]
    assert plan.chunk_rows == max(fitting, default=1)
    assert plan.workspace_bytes == sums[plan.chunk_rows]
    assert plan.scratch_bytes == step_bytes(plan, plan.chunk_rows)[0]


@given(plan=plans())
def test_the_workspace_holds_every_step(plan):
    rows, geometry = plan.chunk_rows, plan.geometry
    lane = rows * geometry.heads * geometry.token_bytes
    for scale, fresh in enumerate(plan.schedule.tokens):
        for layer in range(geometry.layers):
            shape = plan.shape(scale, layer, rows)
            cached, after = plan.lengths_before(scale, layer), plan.tokens[scale, layer]
            assert (shape.cached, shape.fresh, shape.kept) == (cached.max(), fresh, after.max())
            assert (shape.kind is Kind.NOTHING) == (not after.any())
            assert shape.is_ragged == (len(set(cached.tolist())) > 1)
            if shape.cached:  # K and V of all that attention looks at are there at once
                assert plan.regions(shape).num_bytes >= lane * (shape.cached + fresh)


@given(plan=plans(), rows=st.integers(1, 9))
def test_rows_multiply_pages_and_nothing_else(plan, rows):
    other = plan.for_rows(rows)
    assert other.peak_pages * plan.rows == plan.peak_pages * rows
    assert other.page_bytes * plan.rows == plan.page_bytes * rows
    assert other.token_bytes * plan.rows == plan.token_bytes * rows
    assert other.tokens is plan.tokens and other.positions is plan.positions
    with pytest.raises(ValueError, match="rows"):
        plan.for_rows(0)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_running_total(scales, layers, seed):
    after = np.random.default_rng(seed).integers(0, 50, (scales, layers))
    totals = running_total(after)
    assert totals.dtype == np.int64
    for scale in range(scales):
        for layer in range(layers):
            earlier = after[scale - 1, layer + 1 :].sum() if scale else 0
            assert totals[scale, layer] == after[scale, : layer + 1].sum() + earlier
