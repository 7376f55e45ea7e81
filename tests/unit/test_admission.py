"""Admission: who waits, who is refused, and how one leaves."""

import asyncio
import gc
import signal
import threading
import time

import pytest

from kvruntime import Admission, Cancelled, OutOfPages, QueueFull, ScheduleError, WillNeverFit
from kvruntime.admission import Ticket
from tests.generations import fresh
from tests.shared import pool_of
from tests.waiting import GROWING, PEAK, SOON, in_threads, is_empty


def test_one_that_waits_goes_on_when_there_is_room():
    admission = Admission(pool_of(PEAK))
    cache = GROWING.cache(admission=admission)
    first = cache.open(2)
    ticket = admission.submit(cache.plan(2))
    assert not ticket.has_started
    with pytest.raises(TimeoutError, match=r"of 12 are held by 1 generations"):
        in_threads(lambda: ticket.wait(timeout=0.01))
    threading.Timer(0.05, first.close).start()
    in_threads(lambda: cache.open(2, ticket=ticket).close())
    assert is_empty(admission)


def test_a_thread_does_not_wait_for_itself():
    """Its second generation holds its peak at once, or is refused; so is a fork."""
    admission = Admission(pool_of(3 * PEAK - 1))
    cache = GROWING.cache(admission=admission)
    with cache.open(2) as first, cache.open(2) as second:
        assert second._ticket.request.held == PEAK
        with pytest.raises(OutOfPages) as refused:
            cache.open(2)
        assert (refused.value.requested, refused.value.total) == (PEAK, 3 * PEAK - 1)
        with pytest.raises(OutOfPages):
            first.fork()
        second.close()
        twin = first.fork()
        assert twin._ticket.request.held == PEAK
        twin.close()
    assert is_empty(admission)


def test_waiting_for_ones_own_generation_is_an_error():
    """Two that were given to one thread: the later one cannot go on before the other."""
    admission = Admission(pool_of(PEAK))
    cache = GROWING.cache(admission=admission)
    tickets = [admission.submit(cache.plan(2)) for _ in range(2)]
    with cache.open(2, ticket=tickets[0]):
        with pytest.raises(ScheduleError, match="another generation of the same thread"):
            cache.open(2, ticket=tickets[1])
    tickets[1].cancel()
    assert is_empty(admission)


def test_a_task_may_hand_its_tickets_on():
    """One acquires, others draw: it waits for none of its own."""
    admission = Admission(pool_of(PEAK))
    cache = GROWING.cache(admission=admission)

    async def dispatch():
        drawing = []
        for _ in range(4):
            ticket = await asyncio.wait_for(admission.acquire(cache.plan(2)), SOON)
            drawing.append(asyncio.create_task(asyncio.to_thread(draw_it, ticket)))
        await asyncio.gather(*drawing)

    def draw_it(ticket):
        with cache.open(2, ticket=ticket) as generation:
            generation.attend(0, *fresh(GROWING, 0, 0))

    asyncio.run(dispatch())
    assert is_empty(admission)


def test_cancelling_wherever_it_is():
    admission = Admission(pool_of(PEAK))
    cache = GROWING.cache(admission=admission)
    first = admission.submit(cache.plan(2))
    generation = cache.open(2, ticket=first)
    queued, waiting = (admission.submit(cache.plan(2)) for _ in range(2))
    queued.cancel()
    queued.cancel()
    assert admission.stats.queued == 1
    with pytest.raises(Cancelled):
        cache.open(2, ticket=queued)
    threading.Timer(0.05, waiting.cancel).start()
    with pytest.raises(Cancelled):
        in_threads(waiting.wait)
    assert (admission.stats.queued, admission.stats.underway) == (0, 1)
    first.cancel()
    assert generation.is_open and first.is_cancelled, "until its next leg"
    with pytest.raises(Cancelled):
        for scale in range(3):
            for layer in range(2):
                generation.attend(layer, *fresh(GROWING, scale, layer))
    assert not generation.is_open and is_empty(admission)


def test_who_is_dropped_leaves():
    admission = Admission(pool_of(PEAK))
    cache = GROWING.cache(admission=admission)
    admission.submit(cache.plan(2))
    gc.collect()
    assert is_empty(admission), "a ticket"
    kept = admission.submit(cache.plan(2))
    generation = cache.open(2, ticket=kept)
    generation.attend(0, *fresh(GROWING, 0, 0))
    del generation
    gc.collect()
    assert is_empty(admission), "a generation"
    with admission.submit(cache.plan(2)):
        assert admission.stats.underway == 1
    assert is_empty(admission), "a ticket that nobody used"


def test_what_is_refused():
    admission = Admission(pool_of(100), most_pages=PEAK, most_waiting=2, most_underway=1)
    cache = GROWING.cache(admission=admission)
    with pytest.raises(WillNeverFit, match="2 of 3 rows would fit") as refused:
        admission.submit(cache.plan(3))
    each = admission.pool.page_bytes + admission.pool.plane_bytes
    assert (refused.value.needed, refused.value.total) == (PEAK * 3 // 2 * each, PEAK * each)
    tickets = [admission.submit(cache.plan(2)) for _ in range(3)]
    assert (admission.stats.underway, admission.stats.queued) == (1, 2)
    with pytest.raises(QueueFull) as full:
        admission.submit(cache.plan(2))
    assert (full.value.waiting, full.value.most) == (2, 2)
    for ticket in tickets:
        cache.open(2, ticket=ticket).close()
    with pytest.raises(ScheduleError, match="this ticket is used"):
        cache.open(2, ticket=tickets[0])
    other = Admission(pool_of(100))
    for ticket in (other.submit(cache.plan(2)), admission.submit(cache.plan(1))):
        with pytest.raises(ValueError, match="12 pages at its peak"):
            cache.open(2, ticket=ticket)
    with pytest.raises(ValueError, match="this has none"):
        GROWING.cache(pool_of(50)).open(2, ticket=ticket)
    with pytest.raises(ScheduleError, match="open with admission"):
        GROWING.cache(admission.pool).open(2)
    with pytest.raises(ScheduleError, match="in use"):
        Admission(admission.pool)
    with pytest.raises(ValueError, match="another one than the admission's"):
        GROWING.cache(pool_of(9), admission)
    busy = pool_of(50)
    with GROWING.cache(busy).open(2), pytest.raises(ScheduleError, match="in use"):
        Admission(busy)
    for wrong in ({"most_pages": 0}, {"most_underway": -1}, {"most_waiting": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Admission(pool_of(1), **wrong)


def test_rows_that_go_and_generations_that_are_done():
    """keep_rows leaves the demand as planned; the last step gives everything back."""
    admission = Admission(pool_of(PEAK))
    cache = GROWING.cache(admission=admission)
    with cache.open(2) as generation:
        for scale in range(3):
            if scale == 1:
                generation.keep_rows(1)
            for layer in range(2):
                rows = slice(0, generation.rows)
                inputs = fresh(GROWING, scale, layer)
                generation.attend(layer, *(part[rows] for part in inputs))
        assert admission.stats.underway == 0, "done, and not closed"
    assert is_empty(admission)


def test_the_head_of_the_queue_starts_by_the_clock():
    """Nobody does anything; the first one has come far enough after a while."""
    admission = Admission(pool_of(2 * PEAK - 1))
    cache = GROWING.cache(admission=admission)
    with cache.open(2) as generation:  # measured: 0.05 s a leg
        for scale in range(3):
            for layer in range(2):
                time.sleep(0.02)
                generation.attend(layer, *fresh(GROWING, scale, layer))
    first = admission.submit(cache.plan(2))
    second = admission.submit(cache.plan(2))
    assert (first.has_started, second.has_started) == (True, False)
    second.wait(timeout=SOON)
    assert first.request.granted == 1, "the first one is where it was"
    third = admission.submit(cache.plan(2))
    third.wait(timeout=SOON)  # looked at again by the clock
    for ticket in (first, second, third):
        ticket.cancel()
    assert is_empty(admission)


def test_a_ticket_that_is_cancelled_while_it_is_taken(monkeypatch):
    """Between its turn and the drawing: it belongs to one of the two."""
    admission = Admission(pool_of(PEAK))
    cache = GROWING.cache(admission=admission)
    ticket = admission.submit(cache.plan(2))
    wait = Ticket.wait

    def wait_and_cancel(self, timeout=None):
        wait(self, timeout)
        self.cancel()

    monkeypatch.setattr(Ticket, "wait", wait_and_cancel)
    with pytest.raises(Cancelled):
        cache.open(2, ticket=ticket)
    assert is_empty(admission)


def test_two_threads_that_wait_for_one_ticket():
    """Both hear of it; one draws."""
    admission = Admission(pool_of(PEAK))
    cache = GROWING.cache(admission=admission)
    first = cache.open(2)
    tickets = [admission.submit(cache.plan(2)) for _ in range(2)]
    threading.Timer(0.1, first.close).start()
    waits = [lambda: tickets[0].wait(SOON)] * 3
    in_threads(*waits)
    tickets[0].cancel()
    in_threads(lambda: cache.open(2, ticket=tickets[1]).close())
    assert is_empty(admission)


def test_a_signal_while_a_thread_waits_may_cancel():
    """The handler runs in the middle of the wait, in the same thread."""
    admission = Admission(pool_of(PEAK))
    cache = GROWING.cache(admission=admission)
    with admission.submit(cache.plan(2)):  # which nobody draws on
        ticket = admission.submit(cache.plan(2))
        before = signal.signal(signal.SIGALRM, lambda *_: ticket.cancel())
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            with pytest.raises(Cancelled):
                ticket.wait(SOON)
        finally:
            signal.signal(signal.SIGALRM, before)
    assert is_empty(admission)


def test_a_change_that_raises_is_not_made_again():
    admission = Admission(pool_of(PEAK))

    def fail(now):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        admission._shared.change(fail)
    assert is_empty(admission)
