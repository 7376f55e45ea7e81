"""P4, P5: lanes hold exactly the pages their lengths need, whatever happens to other tables."""

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
    """A table and the pages that a plain list says its lanes own."""

    table: BlockTable
    lanes: list[list[list[int]]]  # [rows][heads][pages]
    lengths: list[int]


def pages_for(tokens, page_size):
    return (tokens + page_size - 1) // page_size


class TableMachine(RuleBasedStateMachine):
    tables = Bundle("tables")

    @initialize(num_pages=st.integers(1, 24), page_size=st.integers(1, 3))
    def start(self, num_pages, page_size):
        self.allocator = PageAllocator(num_pages)
        self.page_size = page_size
        self.held = []

    def owners(self):
        count = {}
        for held in self.held:
            for row in held.lanes:
                for lane in row:
                    for page in lane:
                        count[page] = count.get(page, 0) + 1
        return count

    @rule(target=tables, rows=st.integers(1, 2), heads=st.integers(1, 3))
    def open(self, rows, heads):
        held = Held(
            BlockTable(self.allocator, rows, heads, self.page_size),
            [[[] for _ in range(heads)] for _ in range(rows)],
            [0] * heads,
        )
        self.held.append(held)
        return held

    @rule(held=tables, data=st.data())
    def resize(self, held, data):
        heads = len(held.lengths)
        lengths = data.draw(st.lists(st.integers(0, 8), min_size=heads, max_size=heads))
        new = [pages_for(tokens, self.page_size) for tokens in lengths]
        owners = self.owners()
        rows = held.lanes
        dropped = [page for row in rows for h, lane in enumerate(row) for page in lane[new[h] :]]
        needed = sum(max(0, new[h] - len(lane)) for row in rows for h, lane in enumerate(row))
        room = self.allocator.num_free + sum(owners[page] == 1 for page in dropped)
        before = held.table.pages.copy(), held.table.lengths.copy(), self.allocator.num_free
        if needed > room:
            with pytest.raises(OutOfPages) as caught:
                held.table.resize(lengths)
            error = caught.value
            assert error.requested == needed and error.total == self.allocator.num_pages
            assert self.allocator.num_free <= error.free == room
            assert np.array_equal(held.table.pages, before[0])
            assert np.array_equal(held.table.lengths, before[1])
            assert self.allocator.num_free == before[2]
            return
        most = max(self.allocator.num_live, self.allocator.num_live + needed)
        self.allocator.reset_high_water()
        live = self.allocator.num_live
        held.table.resize(np.array(lengths))
        if not (dropped and needed):
            assert self.allocator.high_water == max(live, self.allocator.num_live) <= most
        held.lengths = lengths
        for r, row in enumerate(rows):
            for h, lane in enumerate(row):
                kept = held.table.pages[r, h, : new[h]].tolist()
                assert kept[: len(lane)] == lane[: new[h]], "a kept page moved"
                row[h] = kept

    @rule(target=tables, held=tables)
    def share(self, held):
        twin = Held(
            held.table.share(),
            [[list(lane) for lane in row] for row in held.lanes],
            held.lengths[:],
        )
        self.held.append(twin)
        return twin

    @rule(held=tables, first=st.integers(0, 8))
    def replace_shared(self, held, first):
        owners = self.owners()
        start = first // self.page_size
        shared = [
            page for row in held.lanes for lane in row for page in lane[start:] if owners[page] > 1
        ]
        if len(shared) > self.allocator.num_free:
            before = held.table.pages.copy()
            with pytest.raises(OutOfPages):
                held.table.replace_shared(first)
            assert np.array_equal(held.table.pages, before)
            return
        old, new = held.table.replace_shared(first)
        assert old.tolist() == shared and not set(new.tolist()) & set(owners)
        swap = dict(zip(old.tolist(), new.tolist(), strict=True))
        for row in held.lanes:
            for lane in row:
                lane[start:] = [swap.get(page, page) for page in lane[start:]]

    @rule(target=tables, held=consumes(tables))
    def close(self, held):
        held.table.release()
        assert not held.table.lengths.any() and not held.table.owned().size
        self.held.remove(held)
        return multiple()

    @invariant()
    def agrees_with_the_lists(self):
        self.allocator.check()
        owners = self.owners()
        assert self.allocator.num_live == len(owners)
        for page, count in owners.items():
            assert self.allocator.references([page])[0] == count
        for held in self.held:
            table = held.table
            table.check()
            assert table.lengths.tolist() == held.lengths
            assert table.num_pages.tolist() == [
                pages_for(tokens, self.page_size) for tokens in held.lengths
            ]
            assert table.is_ragged == (len(set(held.lengths)) > 1)
            assert table.owned().tolist() == [p for row in held.lanes for lane in row for p in lane]
            for r, row in enumerate(held.lanes):
                for h, lane in enumerate(row):
                    assert table.pages[r, h, : len(lane)].tolist() == lane
                    assert not table.pages[r, h, len(lane) :].any()

    def teardown(self):
        for held in self.held:
            held.table.release()
        assert self.allocator.num_free == self.allocator.num_pages, "leak"


TestTable = TableMachine.TestCase
