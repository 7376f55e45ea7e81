"""Admission without threads: whoever is let in can always finish, and waits for nobody younger."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvruntime.admission.demand import Demand, demand_of, never_waiting
from kvruntime.admission.ledger import Ledger, Pace, Request
from kvruntime.catalogue import find_model
from kvruntime.planning import plan
from tests.generations import cases


@st.composite
def demands(draw, most=20):
    """Any curve of a few legs: what is held at the end of one is no more than while it runs."""
    pages = draw(st.lists(st.integers(1, most), min_size=1, max_size=6))
    after = [draw(st.integers(0, min(each))) for each in pairwise(pages)]
    work = [draw(st.integers(1, 9)) for _ in pages]
    return Demand(tuple(range(len(pages))), tuple(pages), (*after, 0), tuple(work))


class Drawing(RuleBasedStateMachine):
    """Generations come, go through their legs, fork and are cancelled, in any order and speed."""

    @initialize(
        num_pages=st.integers(20, 60),
        kinds=st.lists(demands(), min_size=1, max_size=3),
        most=st.sampled_from([None, None, 1, 3]),
    )
    def begin(self, num_pages, kinds, most):
        self.ledger, self.now = Ledger(num_pages, most), 0.0
        self.paces = {kind: Pace(kind) for kind in kinds}
        self.before = {}  # of each request: those that came before it and have not left
        self.told, self.forks = [], set()

    def request(self, demand, done=0):
        made = Request(demand, self.paces.setdefault(demand, Pace(demand)), done, done)
        made.wake = lambda: self.told.append(made)
        self.before[made] = set(self.before)
        return made

    def settle(self):
        self.told.clear()
        running = [one for one in self.ledger.underway if one.is_running]
        granted = {one: one.granted for one in self.everybody()}
        self.ledger.settle(self.now)
        news = [one for one in self.ledger.underway if one.granted != granted[one]]
        assert set(news) <= set(self.told), "granted, and not told"
        assert all(one.is_running for one in running), "a leg was taken back"

    def everybody(self):
        return [*self.ledger.underway, *self.ledger.queue]

    def left(self, one):
        self.before.pop(one)
        for others in self.before.values():
            others.discard(one)

    @rule(data=st.data())
    def submit(self, data):
        demand = data.draw(st.sampled_from(sorted(self.paces, key=repr)))
        self.ledger.submit(self.request(demand))
        self.settle()

    def running(self):
        return [one for one in self.ledger.underway if one.is_running]

    @precondition(lambda self: self.running())
    @rule(data=st.data(), seconds=st.floats(0, 5))
    def end_a_leg(self, data, seconds):
        self.now += seconds
        self.end_leg(data.draw(st.sampled_from(self.running())))

    def end_leg(self, one):
        if one.granted == len(one.demand):
            self.ledger.finish(one, self.now)
            self.left(one)
        else:
            leg = one.done
            self.ledger.end_leg(one, leg, self.now)
            self.ledger.end_leg(one, leg, self.now)  # twice, as after an interrupt
        self.settle()

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds):
        self.now += seconds
        self.settle()

    @precondition(lambda self: self.everybody())
    @rule(data=st.data())
    def cancel(self, data):
        one = data.draw(st.sampled_from(self.everybody()))
        self.ledger.leave(one)
        self.ledger.leave(one)
        self.left(one)
        self.settle()

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(self.running()))
        twin = self.request(never_waiting(parent.demand, parent.done), parent.done)
        room = self.ledger.slack
        if self.ledger.start_now(twin, self.now):
            assert self.ledger.start_now(twin, self.now)  # twice, as after an interrupt
            assert twin.held == twin.peak_left <= room
            self.forks.add(twin)
            for queued in self.ledger.queue:  # which it was put before, as its parent was
                self.before[queued].add(twin)
        else:
            assert twin.peak_left > room
            self.left(twin)
        self.settle()

    @invariant()
    def everybody_can_finish(self):
        if not hasattr(self, "ledger"):
            return
        ledger = self.ledger
        ledger.check()
        assert ledger.held <= ledger.num_pages
        assert ledger.underway or not ledger.queue, "the pool is idle, and somebody waits"
        for one in self.everybody():
            assert one.is_running or self.before[one], "waits for somebody who came later"
        submitted = [one for one in ledger.underway if one not in self.forks]
        assert ledger.most_underway is None or len(submitted) <= ledger.most_underway

    def teardown(self):
        """Whoever can go on does, the last ones first; so all come to their end."""
        if not hasattr(self, "ledger"):
            return
        steps = sum(len(one.demand) for one in self.everybody())
        while self.everybody():
            assert steps > 0 and self.running(), "nobody can go on"
            self.end_leg(self.running()[-1])
            steps -= 1
            self.everybody_can_finish()
        assert not self.ledger.held


Drawing.TestCase.settings = settings(max_examples=300, stateful_step_count=40)
TestDrawing = Drawing.TestCase


@settings(max_examples=80)
@given(case=cases())
def test_legs_are_the_planned_pages(case):
    """Each step's pages, before and after it, are within its leg's, which are reached."""
    planned = case.cache(None).plan(case.rows)
    demand = demand_of(planned)
    steps = planned.row_pages.size
    after = (planned.row_pages * planned.rows).ravel().tolist()
    ends = [*demand.first_step[1:], steps]
    assert demand.first_step[0] == 0 and demand.peak == planned.peak_pages
    for leg, (first, end) in enumerate(zip(demand.first_step, ends, strict=True)):
        held = [0, *after][first : end + 1]
        assert max(held) == demand.pages[leg], "before the first step, and after each"
        assert demand.after[leg] == (held[-1] if end < steps else 0)
    assert sum(demand.work) == planned.rows * len(planned.tokens[0]) * planned.schedule.total
    assert [max(demand.pages[leg:]) for leg in range(len(demand))] == list(demand.peak_left)


def test_a_known_schedule_has_few_legs():
    for policy, budget in (("full", 1.0), ("scalekv", 0.1), ("centroid", 0.02)):
        demand = demand_of(plan("infinity-2b", 2, policy, budget))
        assert 32 <= len(demand) <= 80, "of 416 steps"
    rows = plan("infinity-2b", 4, "full", 1.0).for_rows(4, {11: 2})
    thin = demand_of(rows)
    assert thin.peak == rows.peak_pages < demand_of(rows.for_rows(4)).peak


def test_by_hand_who_goes_on():
    """Ten pages; each needs 2, then 6. Two may be under way, and only one of them at its peak."""
    demand = Demand((0, 1), (2, 6), (2, 0), (1, 3))
    pace = Pace(demand)
    ledger = Ledger(10)
    first, second, third = (Request(demand, pace) for _ in range(3))
    ledger.submit(first)
    ledger.submit(second)
    ledger.settle(0.0)
    # both peaks do not fit: the second starts when the first has come through half of its time
    # (its mean is 5 of 10 pages), which only the end of a leg tells, as long as nothing is measured
    assert (first.held, second.held, ledger.queue) == (2, 0, [second])
    ledger.end_leg(first, 0, 1.0)
    ledger.settle(1.0)
    assert (first.held, second.held) == (6, 0), "a quarter of the work"
    ledger.finish(first, 4.0)
    ledger.submit(third)
    ledger.settle(4.0)
    assert pace.is_measured and pace.until == [0.0, 1.0, 4.0] and pace.mean == 5.0
    assert (second.held, third.held, ledger.delay(4.0)) == (2, 0, 2.0)
    ledger.end_leg(second, 0, 5.0)
    ledger.settle(5.0)
    assert (second.held, third.held, ledger.delay(5.0)) == (6, 0, 1.0)
    ledger.settle(6.0)
    assert (second.held, third.held) == (6, 2)
    ledger.end_leg(third, 0, 7.0)
    ledger.settle(7.0)
    assert not third.is_running and third.asks == 4 == ledger.num_pages - 6
    ledger.check()


def test_nobody_starts_while_one_that_has_hardly_started_waits():
    demand = Demand((0, 1, 2), (1, 9, 3), (1, 3, 0), (2, 7, 1))
    ledger, pace = Ledger(10), Pace(demand)
    requests = [Request(demand, pace) for _ in range(3)]
    pace.learn([1.0, 8.0, 1.0])
    for request in requests:
        ledger.submit(request)
    ledger.settle(0.0)
    ledger.end_leg(requests[0], 0, 1.0)
    ledger.settle(1.0)
    ledger.settle(8.0)  # its mean is 7.6 of 10 pages: after 7.6 s of 10 the next one starts
    assert [request.held for request in requests] == [9, 1, 0]
    ledger.end_leg(requests[1], 0, 9.0)  # and now it waits for the first one's pages
    ledger.settle(100.0)
    assert [request.is_running for request in requests] == [True, False, False]
    assert ledger.delay(100.0) == math.inf
    ledger.end_leg(requests[0], 1, 101.0)
    assert requests[0].held == 3, "what is left of the nine"
    ledger.settle(101.0)
    assert [request.held for request in requests] == [3, 1, 0]


def test_what_never_fits_is_refused():
    demand = Demand((0,), (11,), (0,), (1,))
    with pytest.raises(ValueError, match="11 pages of 10"):
        Ledger(10).submit(Request(demand, Pace(demand)))


def test_how_long_a_leg_takes_is_a_median():
    demand = Demand((0, 1), (1, 3), (1, 0), (5, 5))
    pace = Pace(demand)
    assert (pace.is_measured, pace.mean, pace.until) == (False, 2.0, [0.0, 5.0, 10.0])
    pace.learn([0.0, 0.0])
    assert not pace.is_measured, "a clock that stands still tells nothing"
    for seconds in ([25.0, 3.0], [1.0, 3.0], [1.0, 3.0]):  # the first one compiled kernels
        pace.learn(seconds)
    assert pace.until == [0.0, 1.0, 4.0] and pace.mean == 2.5
    for _ in range(9):
        pace.learn([2.0, 2.0])
    assert pace.until == [0.0, 2.0, 4.0]


@pytest.mark.parametrize("model", ["var-d16", "infinity-2b"])
def test_never_waiting_holds_what_will_be_needed(model):
    known = find_model(model)
    demand = demand_of(plan(known, 2, "full", 1.0))
    for done in (0, 1, len(demand) - 1):
        twin = never_waiting(demand, done)
        assert twin.pages[done:] == demand.peak_left[done:] == twin.peak_left[done:]
        assert twin.after == (*[0] * done, *demand.peak_left[done + 1 :], 0)
        request = Request(twin, Pace(twin), done, done)
        ledger = Ledger(demand.peak)
        assert ledger.start_now(request, 0.0)
        while request.granted < len(twin):
            ledger.end_leg(request, request.done, 0.0)
            assert request.asks <= 0, "it never asks for more"
            ledger.settle(0.0)
            assert request.is_running
