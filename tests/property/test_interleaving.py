"""P2, P5, P6, P7 with several generations on one pool: whatever the others do, each draws what it
draws alone.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import kvruntime.step.keep
import kvruntime.step.run
from allocator import BlockTable, OutOfPages
from kvruntime.attention.sdpa import SDPA
from tests.hazards.interrupts import Interrupts
from tests.shared import CASES, Twin, pool_of

seeds = st.integers(0, 3)
copies = st.sampled_from([{}, {}, {1: 2}, {2: 3}, {3: 2}, {4: 3}])  # at which scale, how many
twins = st.integers(0, 9)  # which of those that are open, counted round and round


class Broken(Exception):
    pass


PLACES = [
    (BlockTable, "propose"),
    (BlockTable, "commit"),
    (SDPA, "attend"),
    (kvruntime.step.run, "choose"),
    (kvruntime.step.run, "commit"),
    (kvruntime.step.keep, "write"),
]


class PoolOfGenerations(RuleBasedStateMachine):
    @initialize(
        names=st.lists(st.sampled_from(sorted(CASES)), min_size=2, max_size=3, unique=True),
        num_pages=st.integers(12, 120),
    )
    def start(self, names, num_pages):
        self.pool = pool_of(num_pages)
        self.cases = [CASES[name]() for name in names]
        self.caches = [case.cache(self.pool) for case in self.cases]
        self.open_now = []

    def reserved(self):
        return sum(twin.reserved for twin in self.open_now)

    def pages(self):
        owned = [table.owned() for twin in self.open_now for table in twin.generation._tables]
        return {page for ids in owned for page in ids.tolist()}

    def gone(self, twin):
        self.open_now.remove(twin)
        twin.close()
        assert not twin.generation.is_open and twin.generation.stats.live_pages == 0

    @rule(which=st.integers(0, 2), copies=copies)
    def open(self, which, copies):
        cache = self.caches[which % len(self.caches)]
        case = self.cases[which % len(self.caches)]
        rows_from = {scale: case.rows * count for scale, count in copies.items()}
        needed = cache.plan(case.rows, rows_from).peak_pages
        if needed + self.reserved() > self.pool.num_pages:
            with pytest.raises(Exception, match=r"pages requested|needed") as caught:
                cache.open(case.rows, rows_from)
            if needed <= self.pool.num_pages:
                assert isinstance(caught.value, OutOfPages)
                free = self.pool.num_pages - self.reserved()
                assert (caught.value.requested, caught.value.free) == (needed, free)
            return
        self.open_now.append(Twin(case, cache, copies))

    @precondition(lambda self: self.open_now)
    @rule(twin=twins, seed=seeds, steps=st.integers(1, 4))
    def step(self, twin, seed, steps):
        twin = self.open_now[twin % len(self.open_now)]
        for _ in range(steps):
            if not twin.is_done:
                twin.step(seed)

    @precondition(lambda self: self.open_now)
    @rule(twin=twins)
    def fork(self, twin):
        twin = self.open_now[twin % len(self.open_now)]
        if not twin.is_between_scales:
            return
        needed = twin.generation.plan.peak_pages_from(twin.generation.scale)
        if self.reserved() + needed > self.pool.num_pages:
            with pytest.raises(OutOfPages):
                twin.generation.fork()
            return
        other = twin.fork()
        self.open_now.append(other)

    @precondition(lambda self: self.open_now)
    @rule(twin=twins, data=st.data())
    def keep_rows(self, twin, data):
        twin = self.open_now[twin % len(self.open_now)]
        if twin.may_lose_rows:
            everyone = range(twin.generation.rows)
            places = data.draw(st.lists(st.sampled_from(everyone), min_size=1, unique=True))
            try:
                twin.keep_rows(places)
            except ValueError as error:
                assert "share too little" in str(error)

    @precondition(lambda self: self.open_now)
    @rule(twin=twins)
    def close(self, twin):
        self.gone(self.open_now[twin % len(self.open_now)])

    @precondition(lambda self: self.open_now)
    @rule(twin=twins)
    def forget(self, twin):
        """Nobody closes it: its pages come back when it is collected."""
        twin = self.open_now.pop(twin % len(self.open_now))
        twin.alone.close()
        del twin.generation

    @precondition(lambda self: self.open_now)
    @rule(twin=twins, where=st.sampled_from(PLACES), seed=seeds)
    def fail(self, twin, where, seed):
        twin = self.open_now[twin % len(self.open_now)]
        if twin.is_done:
            return

        if twin.is_between_scales:
            twin.branch()

        def broken(*args, **kwargs):
            raise Broken

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*where, broken)
            try:
                inputs = twin.inputs(twin.generation.scale, twin.layer, seed, twin.rows)
                twin.generation.attend(twin.layer, *inputs)
            except Broken:
                assert not twin.generation.is_open
        self.gone(twin)

    @precondition(lambda self: self.open_now)
    @rule(twin=twins, at=st.integers(1, 700), seed=seeds)
    def interrupt(self, twin, at, seed):
        twin = self.open_now[twin % len(self.open_now)]
        if twin.is_done:
            return
        if twin.is_between_scales:
            twin.branch()
        inputs = twin.inputs(twin.generation.scale, twin.layer, seed, twin.rows)
        with Interrupts(at):
            try:
                twin.generation.attend(twin.layer, *inputs)
            except KeyboardInterrupt:
                pass
        self.gone(twin)

    @precondition(lambda self: self.open_now)
    @rule(twin=twins, at=st.integers(1, 120))
    def interrupt_the_end(self, twin, at):
        twin = self.open_now[twin % len(self.open_now)]
        before = twin.generation.stats.live_pages
        with Interrupts(at):
            try:
                twin.generation.close()
            except KeyboardInterrupt:
                pass
        # it is carried out all the same, unless it had not begun
        assert twin.generation.stats.live_pages == (before if twin.generation.is_open else 0)
        self.gone(twin)

    @precondition(lambda self: self.open_now)
    @rule(twin=twins, at=st.integers(1, 300))
    def interrupt_a_fork(self, twin, at):
        twin = self.open_now[twin % len(self.open_now)]
        if not twin.is_between_scales:
            return
        with Interrupts(at):
            try:
                twin.generation.fork()  # and nobody takes it
            except (KeyboardInterrupt, OutOfPages):
                pass

    @precondition(lambda self: self.open_now)
    @rule(twin=twins, at=st.integers(1, 120))
    def interrupt_a_branching(self, twin, at):
        twin = self.open_now[twin % len(self.open_now)]
        if not twin.is_between_scales or twin.generation.place.copies == 1:
            return
        before = twin.generation.rows
        with Interrupts(at):
            try:
                twin.generation.branch(twin.generation.place.copies)
            except KeyboardInterrupt:
                assert not twin.generation.is_open or twin.generation.rows == before
        self.gone(twin)

    @rule(which=st.integers(0, 2), at=st.integers(1, 300))
    def interrupt_an_opening(self, which, at):
        which %= len(self.caches)
        with Interrupts(at):
            try:
                self.caches[which].open(self.cases[which].rows)
            except (KeyboardInterrupt, OutOfPages, ValueError):
                pass
            except Exception as error:
                assert "needed" in str(error), error

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        stats = self.pool.stats
        assert stats.reserved_pages == self.reserved() <= stats.num_pages
        assert stats.live_pages == len(self.pages()) <= stats.reserved_pages

    def teardown(self):
        for twin in list(getattr(self, "open_now", [])):
            self.gone(twin)
        if hasattr(self, "pool"):
            assert self.pool.stats.live_pages == self.pool.stats.reserved_pages == 0
            self.pool.check()


PoolOfGenerations.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestPoolOfGenerations = PoolOfGenerations.TestCase


@pytest.mark.parametrize("name", sorted(CASES))
def test_forks_of_forks_draw_what_each_draws_alone(name):
    """One at each boundary, of whoever is there, before and after rows are repeated, drawn on in
    turns.
    """
    case, pool = CASES[name](), pool_of(3000)
    twins = [Twin(case, case.cache(pool), {1: 2, 3: 2})]
    for scale in range(len(case.schedule)):
        twins.append(twins[-1].fork())
        for twin in twins[::2]:
            twin.branch()
        twins.append(twins[scale // 2].fork())
        for _ in range(case.geometry.layers):
            for number, twin in enumerate(twins):
                twin.step(seed=number)
                pool.check()
        if scale == 1:
            twins[1].keep_rows([1])
    assert all(twin.is_done for twin in twins) and len(twins) == 11
    for twin in twins:
        twin.close()
    assert pool.stats.live_pages == pool.stats.reserved_pages == 0
