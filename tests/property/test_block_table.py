"""P4, P5: lanes hold exactly the pages their lengths need, whatever happens to other tables."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from allocator import BlockTable, OutOfPages, PageAllocator


@dataclass(eq=False)
class Held:
    """A table, and what plain lists say its lanes own."""

    table: BlockTable
    lanes: list[list[list[int]]]  # [rows][heads][pages]
    lengths: list[list[int]]  # [rows][heads]


class TableMachine(RuleBasedStateMachine):
    tables = Bundle("tables")

    @initialize(num_pages=st.integers(1, 24))
    def start(self, num_pages):
        self.allocator = PageAllocator(num_pages)
        self.held = []

    def owners(self):
        count = {}
        for held in self.held:
            for row in held.lanes:
                for lane in row:
                    for page in lane:
                        count[page] = count.get(page, 0) + 1
        return count

    @rule(target=tables, rows=st.integers(1, 3), heads=st.integers(1, 3))
    def open(self, rows, heads):
        held = Held(
            BlockTable(self.allocator, rows, heads),
            [[[] for _ in range(heads)] for _ in range(rows)],
            [[0] * heads for _ in range(rows)],
        )
        self.held.append(held)
        return held

    @rule(
        held=tables,
        data=st.data(),
        page_size=st.integers(1, 3),
        afresh=st.sampled_from([False, False, True]),
    )
    def change(self, held, data, page_size, afresh):
        """Some rows get new lengths: worked out without a trace, then carried out or refused."""
        table, rows, heads = held.table, len(held.lanes), len(held.lanes[0])
        start = data.draw(st.integers(0, rows - 1))
        some = range(start, data.draw(st.integers(start + 1, rows)))
        lengths = data.draw(st.lists(st.integers(0, 8), min_size=heads, max_size=heads))
        counts = [-(-tokens // page_size) for tokens in lengths]
        written = None
        if data.draw(st.booleans()):
            places = st.lists(st.booleans(), min_size=max(counts), max_size=max(counts))
            written = np.array([data.draw(places) for _ in lengths], dtype=bool)
        owners, writes = self.owners(), Counter()

        def stays(h, place):
            return not afresh and place < counts[h]

        def is_written(h, place):
            return written is None or bool(written[h, place : place + 1].any())

        lanes = [(r, h, lane) for r in some for h, lane in enumerate(held.lanes[r])]
        for _, h, lane in lanes:
            writes.update(
                p for place, p in enumerate(lane) if stays(h, place) and is_written(h, place)
            )
        served = set()

        def goes(r, h, place, page):
            """Whether the lane gives this page back: the first of all its owners need not."""
            if not stays(h, place) or not is_written(h, place) or owners[page] == 1:
                return not stays(h, place)
            if owners[page] == writes[page] and page not in served:
                served.add(page)
                return False
            return True

        stay = {
            (r, h, place): page
            for r in some
            for h, lane in enumerate(held.lanes[r])
            for place, page in enumerate(lane)
            if not goes(r, h, place, page)
        }
        dropped = Counter(page for r in some for lane in held.lanes[r] for page in lane)
        dropped -= Counter(stay.values())
        taken = len(some) * sum(counts) - len(stay)
        state = [part.copy() for part in table.state]
        books = self.allocator._references.copy(), self.allocator.num_free

        change = table.propose(
            slice(some.start, some.stop), np.array(lengths), page_size, written, afresh
        )
        assert all(map(np.array_equal, table.state, state)), "a proposal changes the table"
        assert (self.allocator._references == books[0]).all()
        assert change.num_taken == taken and Counter(change.dropped.tolist()) == dropped

        freed = {page for page, times in dropped.items() if owners[page] == times}
        room = self.allocator.num_free + len(freed)
        if taken > room:
            with pytest.raises(OutOfPages) as caught:
                table.commit(change)
            error = caught.value
            assert (error.requested, error.free, error.total) == (
                taken,
                room,
                self.allocator.num_pages,
            )
            assert all(map(np.array_equal, table.state, state))
            assert (self.allocator._references == books[0]).all()
            assert self.allocator.num_free == books[1]
            return
        live, self.allocator.high_water = self.allocator.num_live, self.allocator.num_live
        old, new = table.commit(change)
        assert self.allocator.high_water == max(live, self.allocator.num_live), "drops first"
        copied = [
            (page, int(table.pages[r, h, place]))
            for r in some
            for h, lane in enumerate(held.lanes[r])
            for place, page in enumerate(lane)
            if not afresh and place < counts[h] and (r, h, place) not in stay
        ]
        assert list(zip(old.tolist(), new.tolist(), strict=True)) == copied, "copy-on-write"
        for r in some:
            held.lengths[r] = list(lengths)
            for h in range(heads):
                mine = table.pages[r, h, : counts[h]].tolist()
                for place, page in enumerate(mine):
                    at = (r, h, place)
                    assert page == stay[at] if at in stay else page not in stay.values()
                held.lanes[r][h] = mine
        assert not set(old.tolist()) & set(new.tolist()), "a page is written before it is copied"

    @rule(target=tables, held=tables)
    def share(self, held):
        twin = Held(
            held.table.share(),
            [[list(lane) for lane in row] for row in held.lanes],
            [list(row) for row in held.lengths],
        )
        self.held.append(twin)
        return twin

    @rule(held=tables, count=st.integers(1, 3))
    def repeat_rows(self, held, count):
        if count * len(held.lanes) > 9:
            return
        held.table.repeat_rows(count)
        held.lanes = [[list(lane) for lane in row] for row in held.lanes for _ in range(count)]
        held.lengths = [list(row) for row in held.lengths for _ in range(count)]

    @rule(held=tables, data=st.data())
    def keep_rows(self, held, data):
        everyone = range(len(held.lanes))
        rows = data.draw(st.lists(st.sampled_from(everyone), min_size=1, unique=True))
        held.table.keep_rows(np.array(rows))
        held.lanes = [held.lanes[row] for row in rows]
        held.lengths = [held.lengths[row] for row in rows]

    @rule(held=tables)
    def release(self, held):
        held.table.release()
        held.lanes = [[[] for _ in row] for row in held.lanes]
        held.lengths = [[0 for _ in row] for row in held.lengths]

    @rule(held=tables, others=st.integers(0, 3))
    def rebuild(self, held, others):
        """The allocator forgets everything and believes the tables."""
        before = self.allocator.references(range(self.allocator.num_pages)).tolist()
        self.allocator._references[:] = 7
        self.allocator.num_free = others
        self.allocator.rebuild(held.table.owned() for held in self.held)
        assert self.allocator.references(range(self.allocator.num_pages)).tolist() == before

    @rule(target=tables, held=consumes(tables))
    def close(self, held):
        held.table.release()
        assert not held.table.lengths.any() and not held.table.owned().size
        self.held.remove(held)
        return multiple()

    @invariant()
    def agrees_with_the_lists(self):
        if not hasattr(self, "held"):
            return
        self.allocator.check()
        owners = self.owners()
        assert self.allocator.num_live == len(owners)
        assert self.allocator.is_sharing == any(count > 1 for count in owners.values())
        for page, count in owners.items():
            assert self.allocator.references([page])[0] == count
        for held in self.held:
            table = held.table
            table.check()
            assert table.lengths.tolist() == held.lengths
            assert table.num_owned == len({p for row in held.lanes for lane in row for p in lane})
            assert table.num_pages.tolist() == [[len(lane) for lane in row] for row in held.lanes]
            assert table.owned().tolist() == [p for row in held.lanes for lane in row for p in lane]
            for r, row in enumerate(held.lanes):
                for h, lane in enumerate(row):
                    assert table.pages[r, h, : len(lane)].tolist() == lane
                    assert not table.pages[r, h, len(lane) :].any()

    def teardown(self):
        for held in getattr(self, "held", []):
            held.table.release()
        if hasattr(self, "held"):
            assert self.allocator.num_free == self.allocator.num_pages, "leak"


TestTable = TableMachine.TestCase
