"""P7: a live page's content never changes under another owner, forks included."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from allocator import BlockTable, OutOfPages
from kvruntime.pool import Pool, write
from policies import CacheGeometry

DIM = 2


class PoolMachine(RuleBasedStateMachine):
    """Tables over one pool, each beside a dense copy of what its lanes hold."""

    tables = Bundle("tables")

    @initialize(num_pages=st.integers(4, 20), page_size=st.integers(1, 3))
    def start(self, num_pages, page_size):
        geometry = CacheGeometry(1, 1, DIM, "float32", "float32")
        self.pool = Pool(num_pages, page_size, geometry, torch.device("cpu"))
        self.pages = self.pool.exact
        self.pages.keys.fill_(torch.nan)
        self.pages.values.fill_(torch.nan)
        self.dense = {}
        self.counter = 0

    def put(self, table, places, k, v):
        slots = torch.from_numpy(self.pool.slots(table, np.asarray(places)))
        write(self.pages.keys, slots, k)
        write(self.pages.values, slots, v)

    def fresh(self, rows, heads, tokens):
        """Content that no other call ever writes."""
        count = rows * heads * tokens * DIM
        k = torch.arange(self.counter, self.counter + count, dtype=torch.float32)
        self.counter += count
        return k.view(rows, heads, tokens, DIM), -k.view(rows, heads, tokens, DIM) - 1

    @rule(
        target=tables,
        rows=st.integers(1, 2),
        heads=st.integers(1, 2),
        tokens=st.integers(0, 6),
    )
    def open(self, rows, heads, tokens):
        table = BlockTable(self.pool.allocator, rows, heads, self.pages.page_size)
        self.dense[table] = [[self.fresh(1, 1, 0)] * heads for _ in range(rows)]
        if tokens:
            self.append(table, tokens)
        return table

    @rule(table=tables, tokens=st.integers(1, 4))
    def add(self, table, tokens):
        self.append(table, tokens)

    def append(self, table, tokens):
        if table.is_ragged:
            return
        rows, heads, _ = table.pages.shape
        start = int(table.lengths[0])
        k, v = self.fresh(rows, heads, tokens)
        try:
            table.resize(table.lengths + tokens)
        except OutOfPages:
            return
        try:
            self.put(table, np.arange(start, start + tokens), k, v)
        except OutOfPages:  # no page left to copy a shared one to: nothing was written
            table.resize(table.lengths - tokens)
            return
        for r in range(rows):
            for h in range(heads):
                old = self.dense[table][r][h]
                self.dense[table][r][h] = tuple(
                    torch.cat((a, b[None, None, r, h]), 2) for a, b in zip(old, (k, v), strict=True)
                )

    @rule(table=tables, data=st.data())
    def overwrite(self, table, data):
        if table.is_ragged or not table.lengths[0]:
            return
        rows, heads, _ = table.pages.shape
        last = int(table.lengths[0]) - 1
        places = data.draw(st.lists(st.integers(0, last), min_size=1, unique=True))
        k, v = self.fresh(rows, heads, len(places))
        try:
            self.put(table, places, k, v)
        except OutOfPages:
            return
        for r in range(rows):
            for h in range(heads):
                mine = tuple(part.clone() for part in self.dense[table][r][h])
                mine[0][0, 0, places], mine[1][0, 0, places] = k[r, h], v[r, h]
                self.dense[table][r][h] = mine

    @rule(table=tables, data=st.data())
    def rewrite_ragged(self, table, data):
        rows, heads, _ = table.pages.shape
        lengths = data.draw(st.lists(st.integers(0, 4), min_size=heads, max_size=heads))
        try:
            table.resize(lengths)
        except OutOfPages:
            return
        k, v = self.fresh(rows, heads, max(lengths))
        try:
            slots, h, place = map(torch.from_numpy, self.pool.ragged_slots(table))
            write(self.pages.keys, slots, k[:, h, place])
            write(self.pages.values, slots, v[:, h, place])
        except OutOfPages:
            table.release()
            k, v, lengths = *self.fresh(rows, heads, 0), [0] * heads
        for r in range(rows):
            for h in range(heads):
                parts = (part[None, None, r, h, : lengths[h]] for part in (k, v))
                self.dense[table][r][h] = tuple(parts)

    @rule(target=tables, table=tables)
    def fork(self, table):
        twin = table.share()
        self.dense[twin] = [list(row) for row in self.dense[table]]
        return twin

    @precondition(lambda self: self.dense)
    @rule(target=tables, table=consumes(tables))
    def close(self, table):
        table.release()
        del self.dense[table]
        return multiple()

    @invariant()
    def every_lane_reads_back_what_it_holds(self):
        for table, dense in self.dense.items():
            table.check()
            rows, heads, count = table.pages.shape
            shape = (rows, heads, count * self.pages.page_size + 1, DIM)
            keys, values = torch.zeros(shape), torch.zeros(shape)
            ids = torch.from_numpy(table.pages.astype(np.int64))
            self.pages.gather(ids, 0, keys, values)
            for r in range(rows):
                for h in range(heads):
                    length = int(table.lengths[h])
                    assert torch.equal(keys[None, None, r, h, :length], dense[r][h][0])
                    assert torch.equal(values[None, None, r, h, :length], dense[r][h][1])
            assert not keys[:, :, -1].any(), "the gather wrote past its pages"

    def teardown(self):
        for table in self.dense:
            table.release()
        assert self.pool.allocator.num_live == 0, "leak"


TestPool = PoolMachine.TestCase
