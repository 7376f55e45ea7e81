"""Hazards of pages that several generations own, and of whoever comes in the middle of a change."""

import gc
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from allocator import BlockTable, PageAllocator
from kvruntime import Pool, ScheduleError
from tests.hazards.interrupts import FOLDERS
from tests.hazards.steps import alone, assert_same, cache_of, pool_for, step, steps, tokens

POLICIES = ("sliding_window", "scalekv", "centroid")


def shared(policy, generations):
    own = cache_of(policy)
    pool = pool_for(own, generations)
    return pool, cache_of(policy, pool=pool)


@pytest.mark.parametrize("policy", POLICIES)
def test_h24_a_fork_steps_while_another_is_being_made(policy):
    """Between the marks of a reference count and its new value, pages look as if no one had them:
    the fork wrote into pages that it shared.
    """
    pool, cache = shared(policy, 3)
    first = cache.open(2)
    out = steps(first, 1, until=3)
    second = first.fork()
    is_marked, has_proposed = threading.Event(), threading.Event()

    def line(frame, event, _):
        if event == "line" and "owners" in frame.f_locals and not is_marked.is_set():
            is_marked.set()
            has_proposed.wait(0.3)  # long enough for a step that does not wait for us
        return line

    def fork():
        sys.settrace(
            lambda frame, *_: line if frame.f_code is PageAllocator.retain.__code__ else None
        )
        made.append(first.fork())

    def go_on():
        is_marked.wait(10)
        mine.append(step(second, 1))
        has_proposed.set()

    made, mine = [], []
    threads = [threading.Thread(target=fork), threading.Thread(target=go_on)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    third = made[0]
    pool.check()
    wanted = alone(policy, 1)
    for generation, before in ((first, out), (second, out + mine), (third, out)):
        assert_same(before + steps(generation, 1), wanted)
        generation.close()
    assert pool.stats.live_pages == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_h24_forks_in_threads_of_their_own(policy):
    """One prefix, drawn on in four ways at once, again and again."""
    pool, cache = shared(policy, 5)
    alone_again = []
    for seed in range(4):
        with cache.open(2) as generation:
            steps(generation, 9, until=3)
            alone_again.append(steps(generation, seed))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(6):
            first = cache.open(2)
            steps(first, 9, until=3)
            forks = [first.fork() for _ in range(4)]
            first.close()
            found = [None] * 4

            def draw(index, forks=forks, found=found):
                found[index] = steps(forks[index], index)
                forks[index].close()

            threads = [threading.Thread(target=draw, args=(index,)) for index in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            for ours, theirs in zip(found, alone_again, strict=True):
                assert_same(ours, theirs)
            pool.check()
    finally:
        sys.setswitchinterval(interval)
    assert pool.stats.live_pages == 0


class Visitor:
    """Does something before the line numbered ``at`` of those that run in these files."""

    def __init__(self, at, visit, files=("page_allocator.py", "block_table.py", "pool.py")):
        self.at, self.visit, self.files, self.count = at, visit, files, 0

    def __enter__(self):
        sys.settrace(self._frame)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _frame(self, frame, event, _):
        name = frame.f_code.co_filename
        return self._line if name.startswith(FOLDERS) and name.endswith(self.files) else None

    def _line(self, frame, event, _):
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.visit()  # Python does not trace what a trace function does
        return self._line


@pytest.mark.parametrize("what", [pytest.param("stats", marks=pytest.mark.full), "close"])
def test_h25_a_signal_handler_anywhere_in_a_step(what):
    """It asked for numbers, or closed another generation, in the middle of an exchange: the
    allocator was rebuilt from tables that were about to change, and two lanes got one page.
    """
    wanted = alone("streaming_llm", 1)
    at, seen = 1, True
    while seen:
        pool, cache = shared("streaming_llm", 2)
        other, generation = cache.open(2), cache.open(2)
        steps(other, 2, until=3)
        held, told = other.stats.live_pages, []

        def visit(pool=pool, other=other, told=told):
            if what == "close":
                other.close()
            told.append(pool.stats)

        out = steps(generation, 1, until=3)
        with Visitor(at, visit) as visitor:
            out += steps(generation, 1, until=5)
        pool.check()
        assert_same(out + steps(generation, 1), wanted)
        seen = visitor.count >= at
        for stats in told:
            assert stats.live_pages + stats.free_pages == stats.num_pages
            assert held <= stats.live_pages or what == "close"
        assert other.is_open == (what != "close" or not seen)
        for one in (other, generation):
            one.close()
        stats = pool.stats
        assert (stats.live_pages, stats.reserved_pages) == (0, 0)
        at += 5
    assert at > 300


def test_h25_a_step_in_the_middle_of_a_change_is_refused():
    pool, cache = shared("full", 2)
    other, refusals = cache.open(2), []

    def step_other():
        with pytest.raises(ScheduleError, match="in the middle of a change") as caught:
            step(other, 2)
        refusals.append(caught.value)

    exchange = PageAllocator.exchange

    def visited(self, *args):
        if not refusals:
            step_other()
        return exchange(self, *args)

    with cache.open(2) as generation, pytest.MonkeyPatch.context() as patch:
        patch.setattr(PageAllocator, "exchange", visited)
        assert_same(steps(generation, 1), alone("full", 1))
    assert len(refusals) == 1 and not other.is_open
    pool.check()
    assert (pool.stats.live_pages, pool.stats.reserved_pages) == (0, 0)


class Stream:
    """Counts its work, and remembers whose work comes before its own."""

    def __init__(self, name):
        self.name, self.before = name, {name: 0}

    def work(self):
        self.before[self.name] += 1
        return self.before[self.name]

    def wait_event(self, event):
        for name, count in event.before.items():
            self.before[name] = max(self.before.get(name, 0), count)


class Event:
    def record(self, stream):
        self.before = dict(stream.before)


def test_h26_streams_wait_for_every_other(monkeypatch):
    """A notes the end of its step after B has read and given back: A forgot that it must wait."""
    current = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    pool = Pool(num_pages=4, page_bytes=64)
    pool.device = SimpleNamespace(type="cuda")
    a, b = Stream("a"), Stream("b")

    def on(stream, *calls):
        current.append(stream)
        for call in calls:
            call()

    on(a, pool.follow, a.work, pool.note_use)
    on(b, pool.follow, b.work, pool.note_use)  # reads pages and gives them back
    on(a, a.work, pool.note_use)  # the end of its step
    on(a, pool.follow)  # takes those pages
    assert a.before["b"] == b.before["b"]
    on(b, b.work, pool.follow)  # a fork reads what its parent wrote on the other stream
    assert b.before["a"] == a.before["a"]


def test_h27_a_fork_in_an_own_pool_outlives_its_parent():
    """The pool was handed to the next generation while the fork still had pages there."""
    cache = cache_of("streaming_llm")
    parent = cache.open(4)
    while parent.scale < 3:
        parent.attend(parent._layer, *tokens(parent.scale, parent._layer, 1, rows=4))
    parent.keep_rows(2)
    fork = parent.fork()
    pool = fork._runner.pool
    parent.close()
    with cache.open(4) as other:
        assert other._runner.pool is not pool
    fork.close()
    assert not pool.owners and pool.stats.live_pages == 0


def test_h27_a_closed_generation_lets_its_pool_go():
    cache = cache_of("full")
    kept, pools = [], []
    for rows in (1, 2, 3):
        kept.append(cache.open(rows))
        pools.append(weakref.ref(kept[-1]._runner.pool))
        kept[-1].close()
    cache.let_go()
    gc.collect()
    assert [pool() for pool in pools] == [None] * 3
    assert all(generation.stats.live_pages == 0 for generation in kept)


def test_h24_the_lock_is_held_while_pages_are_looked_at(monkeypatch):
    """Whether a page is shared, and the change that follows from it, are one thing."""
    pool, cache = shared("sliding_window", 2)
    propose, seen = BlockTable.propose, []

    def looked_at(self, *args, **kwargs):
        seen.append(pool._is_mid_change())
        return propose(self, *args, **kwargs)

    monkeypatch.setattr(BlockTable, "propose", looked_at)
    with cache.open(2) as generation:
        steps(generation, 1)
    assert seen and all(seen)
