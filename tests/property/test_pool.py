"""P7: a live page's content never changes under another owner, forks included."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import stateful
from hypothesis import strategies as st

from allocator import BlockTable, OutOfPages
from kvruntime import Pool
from kvruntime.errors import WillNeverFit
from kvruntime.storage.layout import PageLayout
from kvruntime.storage.pages import copy_pages, write

DIM, HALF, WEIGHTS = 2, 48, 12  # bytes of a page's K, and of its log weights
SIZES = (1, 2, 3, 6)  # tokens in a page


class Owner:
    """Stands for a generation of one layer. Of each lane [rows][heads]: what its tokens hold, as
    numbers [n, 2 * DIM + 1], K, V and the log weight.
    """

    def __init__(self, pool, rows, heads):
        self.tables = [BlockTable(pool.allocator, rows, heads)]
        self.dense = [[torch.zeros(0, 2 * DIM + 1) for _ in range(heads)] for _ in range(rows)]
        self.layout = PageLayout(1, HALF, DIM, "float32", planes=1)

    @property
    def table(self):
        return self.tables[0]


class Broken(Exception):
    pass


class PoolMachine(stateful.RuleBasedStateMachine):
    """Tables over one pool, each beside a dense copy of what its lanes hold."""

    owners = stateful.Bundle("owners")

    @stateful.initialize(num_pages=st.integers(4, 30), scratch=st.sampled_from([1, 7, 48, 200]))
    def start(self, num_pages, scratch):
        self.scratch = scratch  # bytes
        self.pool = Pool(num_pages=num_pages, page_bytes=2 * HALF, plane_bytes=WEIGHTS)
        for part in (self.pool.keys, self.pool.values, self.pool.planes):
            part.fill_(0xFF)
        self.open_now, self.counter = {}, 0

    @stateful.rule(
        target=owners, rows=st.integers(1, 2), heads=st.integers(1, 2), pages=st.integers(0, 12)
    )
    def open(self, rows, heads, pages):
        owner = Owner(self.pool, rows, heads)
        return self.admitted(owner, pages)

    def admitted(self, owner, pages):
        free = self.pool.num_pages - sum(self.open_now.values())
        if pages > free:
            never = pages > self.pool.num_pages
            with pytest.raises(WillNeverFit if never else OutOfPages):
                self.pool.admit(owner, owner.tables, pages)
            return stateful.multiple()
        self.pool.admit(owner, owner.tables, pages)
        self.open_now[owner] = pages
        return owner

    def fresh(self, count):
        """Content that no other call ever writes; log weights are float16 and may repeat."""
        numbers = torch.arange(self.counter, self.counter + count * 2 * DIM, dtype=torch.float32)
        self.counter += count * 2 * DIM
        weights = torch.arange(count, dtype=torch.float32) + self.counter % 1001
        return torch.cat((numbers.view(count, 2 * DIM), weights[:, None]), 1)

    @stateful.rule(owner=owners)
    def repeat_rows(self, owner):
        if owner not in self.open_now or len(owner.dense) > 2:
            return
        with self.pool.changing():
            owner.table.repeat_rows(2)
        owner.dense = [[lane.clone() for lane in row] for row in owner.dense for _ in range(2)]

    @stateful.rule(owner=owners, data=st.data(), size=st.sampled_from(SIZES), fails=st.booleans())
    def change(self, owner, data, size, fails):
        """Some rows become longer or shorter, and some of their places are written."""
        if owner not in self.open_now:
            return
        table, heads = owner.table, len(owner.dense[0])
        afresh = size != owner.layout.page_size
        rows = range(data.draw(st.integers(0, len(owner.dense) - 1)), len(owner.dense))
        if afresh:  # all rows read their pages alike
            rows = range(len(owner.dense))
        lengths = data.draw(st.lists(st.integers(0, 7), min_size=heads, max_size=heads))
        most = max(lengths)
        written = np.zeros((heads, -(-most // size)), dtype=bool)
        places = {}
        for r in rows:
            for h, count in enumerate(lengths):
                held = 0 if afresh else len(owner.dense[r][h])
                some = data.draw(st.sets(st.integers(0, count - 1))) if count else set()
                places[r, h] = sorted(some | set(range(held, count)))
                written[h, [place // size for place in places[r, h]]] = True
        proposal = table.propose(
            slice(rows.start, rows.stop), np.array(lengths), size, written, afresh
        )
        if table.owned().size - proposal.dropped.size + proposal.num_taken > self.open_now[owner]:
            return  # more than it has reserved: plans never ask for that
        layout = PageLayout(size, HALF, DIM, "float32", planes=1)
        try:
            with self.pool.changing():
                old, new = table.commit(proposal)
                parts = (self.pool.keys, self.pool.values, self.pool.planes)
                both = (torch.from_numpy(ids).long() for ids in (old, new))
                copy_pages(parts, *both, torch.empty(self.scratch, dtype=torch.uint8))
                if fails and data.draw(st.booleans()):
                    raise Broken
        except (OutOfPages, Broken) as error:  # forks may hold more than they reserved together
            if isinstance(error, Broken):
                self.close(owner)
            return
        owner.layout = layout
        for (r, h), mine in places.items():
            new = self.fresh(len(mine))
            old = owner.dense[r][h]
            lane = torch.full((lengths[h], 2 * DIM + 1), torch.nan)
            if not afresh:
                lane[: min(len(old), lengths[h])] = old[: lengths[h]]
            lane[mine] = new
            owner.dense[r][h] = lane
            self.put(owner, r, h, torch.tensor(mine, dtype=torch.int64), new)

    def put(self, owner, r, h, places, new):
        pages, size = self.pool.view(owner.layout), owner.layout.page_size
        ids = torch.from_numpy(owner.table.pages[r, h].astype(np.int64))
        slots = ids[places // size] * size + places % size
        write(pages.keys, slots, new[:, :DIM])
        write(pages.values, slots, new[:, DIM:-1])
        pages.planes[ids[places // size], places % size, 0] = new[:, -1].half()

    @stateful.rule(target=owners, owner=owners)
    def fork(self, owner):
        if owner not in self.open_now:
            return stateful.multiple()
        twin = Owner(self.pool, *owner.table.lengths.shape)
        if self.admitted(twin, self.open_now[owner]) is not twin:
            return stateful.multiple()
        with self.pool.changing():
            twin.tables[0] = owner.table.share()
        twin.dense = [[lane.clone() for lane in row] for row in owner.dense]
        twin.layout = owner.layout
        return twin

    @stateful.rule(owner=owners, data=st.data())
    def keep_rows(self, owner, data):
        if owner in self.open_now:
            everyone = range(len(owner.dense))
            rows = data.draw(st.lists(st.sampled_from(everyone), min_size=1, unique=True))
            with self.pool.changing():
                owner.table.keep_rows(np.array(rows))
            owner.dense = [owner.dense[row] for row in rows]

    @stateful.rule(owner=owners, pages=st.integers(0, 12))
    def reserve(self, owner, pages):
        """As many as it holds at least, and no more than before."""
        if owner in self.open_now:
            pages = max(owner.table.owned().size, min(pages, self.open_now[owner]))
            self.pool.reserve(owner, pages)
            self.open_now[owner] = pages

    @stateful.rule(owner=stateful.consumes(owners))
    def dismiss(self, owner):
        if owner in self.open_now:
            self.close(owner)

    def close(self, owner):
        self.pool.dismiss(owner)
        self.pool.dismiss(owner)
        assert not owner.table.owned().size
        del self.open_now[owner]

    @stateful.rule()
    def fail(self):
        """Whoever changes owners and fails is mended by the next one."""
        with pytest.raises(Broken), self.pool.changing():
            self.pool.allocator.allocate(self.pool.allocator.num_free)
            raise Broken

    @stateful.invariant()
    def every_lane_reads_back_what_it_holds(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        stats = self.pool.stats
        ids = {page for owner in self.open_now for page in owner.table.owned().tolist()}
        assert stats.live_pages == len(ids) == self.pool.num_pages - stats.free_pages
        assert stats.reserved_pages == sum(self.open_now.values()) <= stats.num_pages
        for owner in self.open_now:
            pages, table = self.pool.view(owner.layout), owner.table
            for r, row in enumerate(owner.dense):
                for h, lane in enumerate(row):
                    assert table.lengths[r, h] == len(lane)
                    mine = torch.from_numpy(table.pages[r, h].astype(np.int64))
                    mine = mine[: int(table.num_pages[r, h])]
                    planes = pages.planes[mine][:, : owner.layout.page_size].float()
                    parts = (pages.keys[mine], pages.values[mine], planes)
                    held = torch.cat([part.flatten(0, 1)[: len(lane)] for part in parts], 1)
                    assert torch.equal(held, lane)

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        for owner in list(self.open_now):
            self.close(owner)
        assert self.pool.stats.live_pages == self.pool.stats.reserved_pages == 0, "leak"


TestPool = PoolMachine.TestCase


def test_an_owner_that_is_forgotten_gives_back_its_pages():
    pool = Pool(num_pages=4, page_bytes=2 * HALF)
    owner = Owner(pool, 1, 1)
    pool.admit(owner, owner.tables, 3)
    owner.table.commit(owner.table.propose(slice(0, 1), np.array([3]), 1))
    assert (pool.stats.live_pages, pool.stats.reserved_pages) == (3, 3)
    del owner
    gc.collect()
    assert (pool.stats.live_pages, pool.stats.reserved_pages) == (0, 0)
    pool.check()


def test_the_peak_is_counted_while_anybody_is_there():
    pool, owners = Pool(num_pages=4, page_bytes=2 * HALF), []
    for pages in (3, 2):
        owner = Owner(pool, 1, 1)
        owners.append(owner)  # dismissed, not forgotten
        pool.admit(owner, owner.tables, 3)
        with pool.changing():
            owner.table.commit(owner.table.propose(slice(0, 1), np.array([pages]), 1))
        pool.dismiss(owner)
        assert pool.stats.peak_pages == pages and pool.stats.live_pages == 0
