"""P5, P6: a KeyboardInterrupt at any line of a generation, and threads, each with its own."""

import sys
import threading

import pytest
import torch

from policies import Centroid, ScaleKV, ScaleSchedule, SlidingWindow
from tests.generations import fresh
from tests.hazards.interrupts import Interrupts
from tests.shared import CASES, Twin, case_of, pool_of

SHORT = ScaleSchedule.of([1, 2, 1])
FLOAT = (1, 1, 32, "float32", "float32")
SMALL = {
    "shift": lambda: case_of(
        SlidingWindow(), FLOAT, 2, 3, schedule=SHORT, kv_dtype="int4", kv_start=0
    ),
    "hand-over": lambda: case_of(
        SlidingWindow(), FLOAT, 2, 3, schedule=SHORT, kv_dtype="int4", kv_start=1
    ),
    "choose": lambda: case_of(ScaleKV(grid=1), FLOAT, 3, 3, schedule=SHORT),
    "fold": lambda: case_of(Centroid(1), FLOAT, 3, 3, workspace=1, schedule=SHORT),
}
KINDS = {"shift": "SHIFT", "hand-over": "KEEP", "choose": "CHOOSE", "fold": "FOLD"}


def draw(case, cache, seed=0):
    """A generation that forks, drops a row and closes; what every step of it returned."""
    outs = []
    with cache.open(case.rows) as generation:
        twin = None
        try:
            for scale in range(len(case.schedule)):
                q, k, v = fresh(case, scale, 0, seed=seed)
                if scale == 1:
                    twin = generation.fork()
                    outs.append(twin.attend(0, q, k, v))
                    generation.keep_rows([1])
                rows = slice(2 - generation.rows, 2)
                outs.append(generation.attend(0, q[rows], k[rows], v[rows]))
        finally:
            if twin is not None:
                twin.close()
        generation.close()
    return outs


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("choose", 3),
        ("shift", 7),
        ("hand-over", 7),
        ("fold", 9),
        *(
            pytest.param(name, 1, marks=pytest.mark.full)
            for name in ("choose", "shift", "hand-over", "fold")
        ),
    ],
)
def test_an_interrupt_at_any_line_harms_nobody_else(name, stride):
    """Every line, or some of them, of one generation after another on the same pool, until
    one is not reached.
    """
    case, pool = SMALL[name](), pool_of(40)
    cache = case.cache(pool)
    assert cache.plan(case.rows).shape(1, 0, 1).kind.name == KINDS[name]
    other = Twin(case, cache)
    other.step(7)
    other.step(7)
    wanted = draw(case, cache, 1)
    owned = [table.owned() for table in other.generation._tables]
    ids = torch.from_numpy(owned[0]).long()
    held = [part[ids].clone() for part in (pool.keys, pool.values, pool.planes)]
    before, at, places = pool.stats, 1 - stride, set()
    while True:
        at += stride
        interrupts = Interrupts(at)
        try:
            with interrupts:
                draw(case, cache, 1)
        except KeyboardInterrupt:
            places.add(interrupts.where)
        pool.check()
        stats = pool.stats
        where = f"line {at}, {interrupts.where}"
        assert stats.live_pages == before.live_pages == owned[0].size, where
        assert stats.reserved_pages == before.reserved_pages, where
        if not interrupts.happened:
            break
    assert len(places) * stride > 350, "most lines of a step"
    assert all(
        (old == table.owned()).all()
        for old, table in zip(owned, other.generation._tables, strict=True)
    )
    for part, old in zip((pool.keys, pool.values, pool.planes), held, strict=True):
        assert torch.equal(part[ids], old)
    while not other.is_done:
        other.step(7)
    other.close()
    again = draw(case, cache, 1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, wanted, strict=True))
    assert pool.stats.live_pages == pool.stats.reserved_pages == 0


@pytest.mark.parametrize("name", sorted(CASES))
def test_threads_draw_what_each_draws_alone(name):
    """Four at a time on one pool, forks among them, switched as often as the interpreter can."""
    case, pool = CASES[name](), pool_of(400)
    cache = case.cache(pool)
    wanted = [whole(case, case.cache(pool_of(100)), seed) for seed in range(4)]
    found, start, interval = {}, threading.Barrier(4), sys.getswitchinterval()

    def work(seed):
        start.wait(60)
        found[seed] = [whole(case, cache, seed) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(interval)
    assert sorted(found) == [0, 1, 2, 3], "a thread failed"
    for seed, outs in found.items():
        for ours in outs:
            assert all(map(torch.equal, ours, wanted[seed]))
    pool.check()
    assert pool.stats.live_pages == pool.stats.reserved_pages == 0


def whole(case, cache, seed):
    """A generation and its fork, step by step beside each other."""
    outs, layers = [], range(case.geometry.layers)
    with cache.open(case.rows) as generation:
        both = [generation]
        for scale in range(len(case.schedule)):
            if scale == 2:
                both.append(generation.fork())
            for number, one in enumerate(both):
                for layer in layers:
                    outs.append(one.attend(layer, *fresh(case, scale, layer, seed=seed + number)))
        for one in both:
            one.close()
    return outs
