"""P5: free + live == total whatever comes; a bad call raises and changes nothing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from allocator import OutOfPages, PageAllocator, PageStateError


class AllocatorMachine(RuleBasedStateMachine):
    """Drive the allocator beside a Counter of references that cannot be wrong."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages):
        self.allocator = PageAllocator(num_pages)
        self.model = Counter()
        self.most = 0

    def state(self):
        everything = np.arange(self.allocator.num_pages)
        references = self.allocator.references(everything).tolist()
        return self.allocator.num_free, self.allocator.high_water, references

    def refused(self, call, error, match=None):
        before = self.state()
        with pytest.raises(error, match=match) as caught:
            call()
        assert self.state() == before
        return caught.value

    def some(self, data):
        """Pages, each as often as it has owners or less."""
        mentions = sorted(self.model.elements())
        if not mentions:
            return []
        places = data.draw(st.lists(st.sampled_from(range(len(mentions))), unique=True))
        return [mentions[place] for place in places]

    def freed_by(self, pages):
        return sum(self.model[page] == times for page, times in Counter(pages).items())

    @rule(count=st.integers(0, 14))
    def allocate(self, count):
        free = self.allocator.num_pages - len(self.model)
        if count > free:
            error = self.refused(lambda: self.allocator.allocate(count), OutOfPages)
            assert (error.requested, error.free, error.total) == (
                count,
                free,
                self.allocator.num_pages,
            )
            return
        pages = self.allocator.allocate(count)
        assert pages.dtype == np.int32 and pages.shape == (count,)
        assert not self.model.keys() & set(pages.tolist()), "handed out a live page"
        self.model.update(pages.tolist())
        self.most = max(self.most, len(self.model))

    @rule(count=st.integers(-3, -1))
    def negative_count(self, count):
        self.refused(lambda: self.allocator.allocate(count), ValueError, f"got {count}")

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def retain(self, data):
        pages = data.draw(st.lists(st.sampled_from(sorted(self.model)), max_size=9))
        self.allocator.retain(pages)
        self.model.update(pages)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), shape=st.sampled_from(["list", "array", "table"]))
    def release(self, data, shape):
        pages = self.some(data)
        given = np.array(pages, dtype=np.int64)
        freed = self.allocator.release({"list": pages, "array": given, "table": given[None]}[shape])
        assert freed == self.freed_by(pages)
        self.model -= Counter(pages)

    @rule(data=st.data(), count=st.integers(0, 14))
    def exchange(self, data, count):
        pages = self.some(data)
        freed = self.freed_by(pages)
        free = self.allocator.num_pages - len(self.model) + freed
        if count > free:
            error = self.refused(lambda: self.allocator.exchange(pages, count), OutOfPages)
            assert (error.requested, error.free, error.total) == (
                count,
                free,
                self.allocator.num_pages,
            )
            return
        taken = self.allocator.exchange(pages, count)
        self.model -= Counter(pages)
        assert taken.dtype == np.int32 and taken.shape == (count,)
        assert not self.model.keys() & set(taken.tolist()), "handed out a live page"
        self.model.update(taken.tolist())
        self.most = max(self.most, len(self.model))

    @rule(page=st.integers(-2, 14), count=st.integers(0, 3))
    def exchange_of_a_dead_page(self, page, count):
        """Also where the pages that are asked for are there."""
        if page not in self.model:
            self.refused(
                lambda: self.allocator.exchange([page], count), (PageStateError, OutOfPages)
            )

    @rule(data=st.data())
    def rebuild(self, data):
        """From the owners alone, whatever the books say."""
        owners = [[] for _ in range(max(self.model.values(), default=0))]
        for page, count in self.model.items():
            for owner in data.draw(st.permutations(owners))[:count]:
                owner.append(page)
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        for book in (self.allocator._stack, self.allocator._references):
            book[:] = rng.integers(-3, 99, book.size)
        self.allocator.num_free = int(rng.integers(0, 99))
        self.allocator._extra_references = -1
        self.allocator.rebuild(np.array(ids, dtype=np.int32) for ids in owners)

    @rule(data=st.data(), page=st.integers(-2, 14))
    def dead_or_foreign_page(self, data, page):
        if page in self.model:
            return
        others = (
            data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, max_size=2))
            if self.model
            else []
        )
        pages = [*others, page]
        known = 0 <= page < self.allocator.num_pages
        match = f"page {page} is free already" if known else f"page {page} is not one of"
        self.refused(lambda: self.allocator.release(pages), PageStateError, match)
        self.refused(lambda: self.allocator.retain(pages), PageStateError, match)
        if not known:
            self.refused(lambda: self.allocator.references(pages), PageStateError, match)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), more=st.integers(1, 2))
    def page_named_more_often_than_it_has_owners(self, data, more):
        page = data.draw(st.sampled_from(sorted(self.model)))
        owners, others = self.model[page], sorted(self.model.keys() - {page})[:2]
        pages = [page, *others, *[page] * (owners - 1 + more)]
        match = f"page {page} is named {owners + more} times and has {owners} owners"
        self.refused(lambda: self.allocator.release(pages), PageStateError, match)
        self.refused(lambda: self.allocator.exchange(pages, 0), PageStateError, match)

    @rule()
    def reset_high_water(self):
        self.allocator.reset_high_water()
        self.most = len(self.model)

    @invariant()
    def agrees_with_the_model(self):
        self.allocator.check()
        total = self.allocator.num_pages
        assert self.allocator.num_free + self.allocator.num_live == total
        assert self.allocator.num_live == len(self.model)
        assert self.allocator.is_sharing == any(count > 1 for count in self.model.values())
        assert self.allocator.high_water == self.most
        assert self.allocator.references(range(total)).tolist() == [
            self.model[page] for page in range(total)
        ]

    def teardown(self):
        for page, owners in self.model.items():
            for _ in range(owners):
                self.allocator.release([page])
        assert self.allocator.num_free == self.allocator.num_pages, "leak"


TestAllocator = AllocatorMachine.TestCase
