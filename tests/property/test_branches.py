"""P4, P5, P6 where rows are repeated half way: shared pages are counted once, before it happens."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvruntime.admission.demand import demand_of
from tests.generations import TOLERANCE, cases
from tests.support import DEVICE


@st.composite
def changing_rows(draw, scales):
    """Rows at first, and {scale: rows from there on}, up to 12: some go, or all are repeated."""
    left = rows = draw(st.integers(1, 3))
    rows_from = {}
    for scale in sorted(draw(st.sets(st.integers(1, max(1, scales - 1)), max_size=3))):
        more = [n * left for n in (1, 2, 3) if n * left <= 12]
        rows_from[scale] = left = draw(st.sampled_from([*more, *range(1, left)]))
    return rows, rows_from


def inputs(case, scale, layer, rows):
    """q, k, v of some rows, [rows, n, heads, head_dim], by their numbers."""
    generator = torch.Generator().manual_seed(100 * scale + layer)
    geometry = case.geometry
    shape = (200, case.schedule.tokens[scale], geometry.heads, geometry.head_dim)
    dtype = getattr(torch, geometry.key_dtype)
    parts = (torch.randn(shape, generator=generator)[rows] for _ in range(3))
    return tuple(part.to(DEVICE, dtype) for part in parts)


def change_rows(generation, rows, choose=range):
    """What the next scale needs, carried out; the numbers of the rows then, each one's own."""
    scale, copies = generation.scale, generation.place.copies
    planned = generation.plan.rows_by_scale[scale]
    if copies > 1:
        generation.branch(copies)
        return [(row * 3 + copy) % 200 for row in rows for copy in range(copies)]
    if planned < len(rows):
        kept = list(choose(planned))
        generation.keep_rows(kept)
        return [rows[row] for row in kept]
    return rows


@settings(max_examples=150)
@given(case=cases(), data=st.data())
def test_the_pages_of_repeated_rows_are_planned_to_the_page_at_every_step(case, data):
    rows, rows_from = data.draw(changing_rows(len(case.schedule)))
    cache = case.cache()
    plan = cache.plan(rows, rows_from)
    held = plan.occupancy
    with cache.open(rows, rows_from) as generation:
        pool, numbers = generation._runner.pool, list(range(rows))
        for scale in range(len(case.schedule)):
            numbers = change_rows(generation, numbers)
            assert pool.allocator.num_live == held.at_start[scale]
            assert plan.peak_pages_from(scale) == max(
                held.at_start[scale], *held.within[scale:].ravel()
            )
            for layer in range(case.geometry.layers):
                pool.allocator.reset_high_water()
                generation.attend(layer, *inputs(case, scale, layer, numbers))
                assert pool.allocator.high_water == held.within[scale, layer]
                assert pool.allocator.num_live == held.after[scale, layer]
                pool.check()
        stats = generation.stats
        assert stats.planned_pages == stats.peak_pages == plan.peak_pages == held.within.max()
        assert stats.live_pages == pool.allocator.num_live == 0
    assert plan.peak_pages == pool.num_pages or pool.num_pages == 1
    demand = demand_of(plan)
    assert demand.peak == plan.peak_pages and demand.after[-1] == 0
    if not plan.branches:
        lanes = max(
            n * int(m) for n, m in zip(plan.rows_by_scale, plan.row_pages.max(1), strict=True)
        )
        assert plan.peak_pages == lanes


@settings(max_examples=60)
@given(case=cases(), data=st.data())
def test_copies_go_on_as_rows_that_were_alike_from_the_start(case, data):
    assume(not case.policy.needs.content)  # which may choose for each row by itself
    assume(len(case.schedule) > 1)
    copies, at = data.draw(st.integers(2, 4)), data.draw(st.integers(1, len(case.schedule) - 1))
    rows, total = case.rows, copies * case.rows
    with case.cache().open(rows, {at: total}) as some, case.cache().open(total) as every:
        for scale in range(len(case.schedule)):
            if scale == at:
                some.branch(copies)
            for layer in range(case.geometry.layers):
                q, k, v = inputs(case, scale, layer, list(range(total)))
                if scale < at:
                    q, k, v = (part[:rows].repeat_interleave(copies, 0) for part in (q, k, v))
                few = slice(None) if scale >= at else slice(None, None, copies)
                wanted = every.attend(layer, q, k, v)[few]
                ours = some.attend(layer, q[few], k[few], v[few])
                tolerance = TOLERANCE[case.geometry.key_dtype]
                assert torch.allclose(ours, wanted, atol=tolerance, rtol=tolerance)
