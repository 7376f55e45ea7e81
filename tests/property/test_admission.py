"""Any mix of generations on one pool, in threads, tasks and interrupts: all come to their end."""

import asyncio
import random
import sys
import threading

import pytest

from kvruntime import Admission, Cancelled, OutOfPages, ScheduleError
from tests.generations import fresh
from tests.hazards.interrupts import Interrupts
from tests.shared import CASES, pool_of
from tests.waiting import GROWING, PEAK, SOON, Failed, alone, draw, in_threads, is_empty

SEEDS = 3


@pytest.mark.parametrize("count", [240, pytest.param(2000, marks=pytest.mark.full)])
def test_eight_threads_draw_what_each_draws_alone(count):
    """Any mix of models and policies on a pool that holds about two of them; some fork, fail or
    are cancelled; each picture is the one that is drawn alone.
    """
    names = sorted(CASES)
    wanted = {(name, seed): alone(name, seed) for name in names for seed in range(SEEDS)}
    peaks = {name: CASES[name]().cache(pool_of(1)).plan(2).peak_pages for name in names}
    admission = Admission(pool_of(2 * max(peaks.values())))
    caches = {name: CASES[name]().cache(admission=admission) for name in names}
    left, ended = list(range(count)), dict.fromkeys(("drawn", "failed", "cancelled", "no room"), 0)
    interval = sys.getswitchinterval()

    def work(number):
        chance = random.Random(number)
        while True:
            try:
                left.pop()
            except IndexError:
                return
            name, seed = chance.choice(names), chance.randrange(SEEDS)
            case, cache, dice = CASES[name](), caches[name], chance.random()
            fork = chance.randrange(5) if dice < 0.1 else None
            fail = chance.randrange(8) if 0.1 < dice < 0.2 else None
            ticket = admission.submit(cache.plan(case.rows))
            if dice > 0.9:
                threading.Timer(chance.random() / 100, ticket.cancel).start()
            try:
                draw(case, cache, seed, wanted[name, seed], fail, fork, ticket)
                ended["drawn"] += 1
            except Failed:
                ended["failed"] += 1
            except Cancelled:
                ended["cancelled"] += 1
            except OutOfPages:
                assert fork is not None, "only forks may be refused"
                ended["no room"] += 1
            admission.check()  # also that no more is granted than there is, at one moment

    sys.setswitchinterval(1e-5)
    try:
        in_threads(*(lambda number=number: work(number) for number in range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert sum(ended.values()) >= count - 8 and min(ended.values()) > 0, ended
    assert is_empty(admission)


def test_tasks_wait_without_a_thread():
    """As in a server: many more requests than threads, of which some go away."""
    case, admission = GROWING, Admission(pool_of(2 * PEAK))
    cache = case.cache(admission=admission)
    with case.cache(pool_of(200)).open(2) as generation:
        wanted = [
            generation.attend(layer, *fresh(case, scale, layer))
            for scale in range(3)
            for layer in range(2)
        ]
    drawn = []

    async def request(number):
        async with asyncio.timeout(SOON):
            with await admission.acquire(cache.plan(2)) as ticket:
                await asyncio.to_thread(draw, case, cache, 0, wanted, ticket=ticket)
        drawn.append(number)

    async def serve():
        tasks = [asyncio.create_task(request(number)) for number in range(40)]
        await asyncio.sleep(0)
        for task in tasks[1::3]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(serve())
    cancelled = [isinstance(one, asyncio.CancelledError) for one in results]
    assert cancelled[1::3] == [True] * 13 and sum(cancelled) == 13
    assert len(drawn) == 27 and is_empty(admission)


def test_an_interrupt_at_any_line_of_admission():
    """Whoever it hits is lost, and nobody else: those who wait still start, and all is free."""
    admission = Admission(pool_of(PEAK))
    cache = GROWING.cache(admission=admission)
    at, places = 0, set()
    while True:
        at += 1
        interrupts = Interrupts(at, ("ledger.py", "shared.py", "ticket.py", "admission.py"))
        others = [admission.submit(cache.plan(2)) for _ in range(2)]
        cache.open(2, ticket=others[0]).attend(0, *fresh(GROWING, 0, 0))
        try:
            with interrupts:
                tickets = [admission.submit(cache.plan(1)) for _ in range(2)]
                tickets[0].cancel()
                others[0].leave()
                cache.open(2, ticket=others[1]).close()
                with cache.open(1, ticket=tickets[1]) as generation:
                    for layer in range(2):
                        generation.attend(layer, *fresh(GROWING, 0, layer, rows=1))
                    generation.fork().close()
        except KeyboardInterrupt:
            places.add(interrupts.where)
        tickets = generation = None
        others[0].leave()
        if not others[1].request.done and others[1]._unused:
            cache.open(2, ticket=others[1]).close()
        others = None
        assert is_empty(admission), (at, interrupts.where)
        if not interrupts.happened:
            break
    assert len(places) > 100


def test_a_signal_handler_at_any_line_of_admission():
    """It may cancel, drop and ask; what it starts is started, or refused in the middle of a
    change. Whoever waits still starts.
    """
    admission = Admission(pool_of(PEAK))
    cache = GROWING.cache(admission=admission)
    at, refused = 0, 0

    def handle():
        nonlocal refused
        tickets[0].cancel()
        del tickets[1]
        assert admission.stats.held_pages <= PEAK
        try:
            tickets.append(admission.submit(cache.plan(1)))
        except ScheduleError as error:
            assert "in the middle of a change" in str(error)
            refused += 1

    while True:
        at += 1
        handling = Interrupts(at, ("ledger.py", "shared.py", "ticket.py"), handle)
        tickets = [admission.submit(cache.plan(2)) for _ in range(3)]
        with handling:
            last = admission.submit(cache.plan(2))
            for ticket in tickets[::-1]:
                ticket.cancel()
        cache.open(2, ticket=last).close()
        tickets.clear()
        assert is_empty(admission), (at, handling.where)
        if not handling.happened:
            break
    assert at > 100 and 30 < refused < at
