"""P2 and P9 by arithmetic: N rows fit and N + 1 raise; lengths keep their promises."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvruntime.errors import WillNeverFit
from kvruntime.formats import RowFormat, stored_bytes
from kvruntime.plan import plan_generation, running_total
from policies import CacheGeometry, check_lengths
from tests.support import policies, schedules


@st.composite
def plans(draw):
    layers = draw(st.integers(1, 4))
    schedule = draw(schedules)
    row = draw(st.sampled_from([None, None, *(RowFormat(b, g) for b in (2, 4, 8) for g in (1, 2))]))
    geometry = CacheGeometry(
        layers,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 8)) if row is None else draw(st.sampled_from([32, 64])),
        draw(st.sampled_from(["float32", "bfloat16"])),
        draw(st.sampled_from(["float32", "float16"])),
    )
    budget = draw(st.one_of(st.integers(1, schedule.total + 1), st.floats(0.01, 1.0)))
    try:
        return plan_generation(
            geometry,
            schedule,
            draw(policies(layers)),
            budget,
            draw(st.integers(1, 9)),
            draw(st.sampled_from([1, 3, 16, 64] if row is None else [16, 32, 48])),
            draw(st.sampled_from([1, 500, 10_000])),
            row,
            draw(st.integers(0, len(schedule) - 1)) if row and draw(st.booleans()) else None,
        )
    except ValueError:
        assume(False)


def event_by_event(plan):
    """Pages and token bytes of a row after each (scale, layer), walked in plain Python: a layer is
    quantised from the moment when it has been served at the start scale.
    """
    geometry = plan.geometry
    quantised = [False] * geometry.layers
    held = [[0] * geometry.heads for _ in range(geometry.layers)]
    for scale in range(len(plan.schedule)):
        for layer in range(geometry.layers):
            held[layer] = plan.lengths[scale, layer].tolist()
            quantised[layer] = plan.row is not None and scale >= plan.start_scale
            pages = size = 0
            for lanes, packed in zip(held, quantised, strict=True):
                per_page = plan.page_size if packed else plan.exact_page_size
                token = stored_bytes(geometry, plan.row if packed else None)
                pages += sum(-(-tokens // per_page) for tokens in lanes)
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
    page = plan.page_size * stored_bytes(plan.geometry, plan.row)
    assert plan.peak_pages == plan.rows * max(pages)
    assert plan.page_bytes == page * plan.rows * max(pages)
    assert plan.exact_page_size * plan.geometry.token_bytes <= page
    assert plan.peak_token_bytes == plan.rows * max(tokens)
    most = plan.rows * max(after_scale)
    assert plan.token_bytes == most <= plan.peak_token_bytes <= plan.page_bytes
    assert plan.total_bytes == plan.page_bytes + plan.workspace_bytes
    check_lengths(plan.lengths, plan.schedule, plan.geometry)


@given(plan=plans(), memory=st.integers(0, 300_000), reserved=st.integers(0, 1000))
def test_n_rows_fit_and_one_more_raises(plan, memory, reserved):
    def for_rows(rows):
        return plan_generation(
            plan.geometry,
            plan.schedule,
            plan.policy,
            plan.budget_tokens,
            rows,
            plan.page_size,
            plan.workspace_limit,
            plan.row,
            plan.start_scale if plan.row else None,
        )

    assume(plan.schedule.history)
    fits = plan.max_rows(memory, reserved)
    if fits:
        for_rows(fits).require(memory, reserved)
    with pytest.raises(WillNeverFit) as caught:
        for_rows(fits + 1).require(memory, reserved)
    assert caught.value.total == memory - reserved < caught.value.needed
    assert (f"{fits} of {fits + 1} rows" if fits else "not one row fits") in str(caught.value)


@given(plan=plans())
def test_the_workspace_is_bounded_and_holds_every_step(plan):
    row = plan.workspace_bytes // plan.chunk_rows
    assert plan.workspace_bytes == row * plan.chunk_rows
    assert 1 <= plan.chunk_rows <= plan.rows
    assert plan.chunk_rows == 1 or plan.workspace_bytes <= plan.workspace_limit
    assert plan.chunk_rows == plan.rows or row * (plan.chunk_rows + 1) > plan.workspace_limit
    lane = plan.geometry.token_bytes * plan.geometry.heads
    longest = 0
    for scale, fresh in enumerate(plan.schedule.tokens):
        for layer in range(plan.geometry.layers):
            cached = int(plan.lengths[scale - 1, layer].max()) if scale else 0
            size = plan.exact_page_size
            whole = -(-cached // size) * size if scale <= plan.start_scale else 0
            longest = max(longest, cached + fresh, whole)
    assert plan.workspace_row_tokens == longest
    assert longest * lane <= row


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_running_total(scales, layers, seed):
    after = np.random.default_rng(seed).integers(0, 50, (scales, layers))
    totals = running_total(after)
    assert totals.dtype == np.int64
    for scale in range(scales):
        for layer in range(layers):
            earlier = after[scale - 1, layer + 1 :].sum() if scale else 0
            assert totals[scale, layer] == after[scale, : layer + 1].sum() + earlier
