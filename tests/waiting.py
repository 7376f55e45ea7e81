"""Generations that wait for their turn on one pool, and the same ones drawn alone."""

import threading
from functools import cache as remembered

import torch

from policies import Full, ScaleSchedule
from tests.generations import fresh
from tests.shared import CASES, case_of, pool_of

SOON = 60  # seconds: a test that waits longer has found a deadlock
GROWING = case_of(
    Full(), (2, 1, 8, "float32", "float32"), 2, 1.0, schedule=ScaleSchedule.of([1, 2, 3])
)
PEAK = 12  # pages of GROWING


@remembered
def alone(name, seed):
    """What a generation returns, step by step, with a pool of its own."""
    case = CASES[name]()
    with case.cache(pool_of(200)).open(case.rows) as generation:
        return [
            generation.attend(layer, *fresh(case, scale, layer, seed=seed))
            for scale in range(len(case.schedule))
            for layer in range(case.geometry.layers)
        ]


class Failed(Exception):
    """What a generation of these tests fails with."""


def draw(case, cache, seed, wanted, fail_at=None, fork_at=None, ticket=None):
    """Every step compared with ``wanted``, and with what the ledger let it hold."""
    number = 0
    with cache.open(case.rows, ticket=ticket) as generation:
        both = [generation]
        for scale in range(len(case.schedule)):
            if scale == fork_at:
                both.append(generation.fork())
            for layer in range(case.geometry.layers):
                if number == fail_at:
                    raise Failed
                for one in both:
                    out = one.attend(layer, *fresh(case, scale, layer, seed=seed))
                    assert torch.equal(out, wanted[number])
                    held = one._ticket.request.held
                    assert one.stats.live_pages <= held or one.scale == len(case.schedule)
                number += 1
        for one in both:
            one.close()


def in_threads(*works):
    """Run them all; raise what one raises. A second too many is a deadlock."""
    failures = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive(), "deadlock"
    if failures:
        raise failures[0]


def is_empty(admission):
    admission.check()
    admission.pool.check()
    stats, pool = admission.stats, admission.pool.stats
    assert (stats.held_pages, stats.underway, stats.queued) == (0, 0, 0)
    return (pool.live_pages, pool.reserved_pages) == (0, 0)
