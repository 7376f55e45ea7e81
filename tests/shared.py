"""Caches of different geometry and format on one pool, and generations drawn beside their own
selves alone.
"""

from functools import partial

import torch

from kvruntime import Pool
from policies import (
    AMSKV,
    POLICY_NAMES,
    CacheGeometry,
    Centroid,
    ScaleSchedule,
    SlidingWindow,
    make_policy,
)
from tests.codecs import coding_of
from tests.generations import Case, fresh
from tests.profiles import profile_of
from tests.support import DEVICE, RandomFold, RandomPolicy

PAGE_BYTES, PLANE_BYTES = 960, 24
SCHEDULE = ScaleSchedule.of([1, 2, 1, (1, 3), 2])


def case_of(policy, geometry, page_size, budget=4, workspace=2**28, schedule=SCHEDULE, **options):
    return Case(
        CacheGeometry(*geometry), schedule, policy, budget, page_size, 2, workspace, options
    )


CODED = (2, 2, 32, "bfloat16", "bfloat16")
CASES = {
    "exact": lambda: case_of(SlidingWindow(), (2, 1, 8, "float32", "float32"), 3),
    "ragged": lambda: case_of(RandomPolicy(4), (2, 2, 8, "bfloat16", "bfloat16"), 5, workspace=1),
    "int4": lambda: case_of(AMSKV(), (3, 1, 32, "float16", "float16"), 4, 7, kv_dtype="int4"),
    "int4 by content": lambda: case_of(
        RandomPolicy(9), (2, 2, 32, "float16", "float16"), 4, kv_dtype="int4", kv_start=1
    ),
    "centroid": lambda: case_of(Centroid(1), (2, 2, 8, "float32", "float32"), 4, 3),
    "coded": lambda: case_of(
        RandomFold(8), CODED, 4, kv_dtype="coded3", coding=coding_of(CacheGeometry(*CODED))
    ),
    "fold": lambda: case_of(
        RandomFold(6), (1, 3, 32, "float32", "float32"), 2, kv_dtype="int8", workspace=1
    ),
}
LONGER = ScaleSchedule.of([1, 2, 3, (2, 5), 2])  # ScaleKV keeps a window of 16
NAMED = (2, 2, 8, "float32", "float32")


def named(name):
    """A policy by its name, with statistics of its own."""
    policy = make_policy(name, profile_of(LONGER, 2, 2, 5, 8))
    return case_of(policy, NAMED, 10, 18, schedule=LONGER)


CASES |= {name: partial(named, name) for name in POLICY_NAMES if name not in CASES}


def pool_of(num_pages):
    return Pool(num_pages=num_pages, page_bytes=PAGE_BYTES, plane_bytes=PLANE_BYTES, device=DEVICE)


class Twin:
    """A generation on a shared pool, and the same one alone on a pool of its own. copies: {scale:
    how many rows each row becomes there}.
    """

    def __init__(self, case, cache, copies=None, script=(), generation=None):
        self.case, self.cache, self.copies = case, cache, copies or {}
        rows_from, rows = {}, case.rows
        for scale, count in sorted(self.copies.items()):
            rows_from[scale] = rows = count * rows
        self.generation = generation or cache.open(case.rows, rows_from)
        self.reserved = self.generation.plan.peak_pages_from(self.generation.scale)
        self.rows = list(range(case.rows))
        self.script, self.layer = [], 0
        self.alone = case.cache(pool_of(400)).open(case.rows, rows_from)
        for scale, seed, rows in script:
            self._replay(scale, seed, rows)

    def inputs(self, scale, layer, seed, rows):
        return tuple(part[rows] for part in fresh(self.case, scale, layer, rows=60, seed=seed))

    def _replay(self, scale, seed, rows):
        self._branch_alone()
        if rows != self.rows:
            self._keep_alone(rows)
        for layer in range(self.case.geometry.layers):
            self.alone.attend(layer, *self.inputs(scale, layer, seed, rows))
        self.script.append((scale, seed, rows))

    def _branch_alone(self):
        count = self.alone.place.copies
        if count > 1:
            self.alone.branch(count)
            self.rows = [row + 10 * copy for row in self.rows for copy in range(count)]

    def _keep_alone(self, rows):
        self.alone.keep_rows([self.rows.index(row) for row in rows])
        self.rows = list(rows)

    @property
    def is_done(self):
        return self.generation.scale == len(self.case.schedule)

    @property
    def is_between_scales(self):
        return self.layer == 0

    @property
    def may_lose_rows(self):
        return self.is_between_scales and self.generation.scale not in self.copies

    def branch(self):
        """If it is due now."""
        if self.generation.place.copies > 1:
            self.generation.branch(self.generation.place.copies)
            self._branch_alone()

    def step(self, seed):
        """One layer of both, compared bit for bit. The seed counts at the start of a scale."""
        scale, layer = self.generation.scale, self.layer
        if layer == 0:
            self.branch()
            self.script.append((scale, seed, list(self.rows)))
        inputs = self.inputs(scale, layer, self.script[-1][1], self.rows)
        ours = self.generation.attend(layer, *inputs)
        assert torch.equal(ours, self.alone.attend(layer, *inputs))
        self.layer = (layer + 1) % self.case.geometry.layers

    def keep_rows(self, places):
        """Raises ValueError, changing nothing, where those share too little."""
        before = self.generation.plan
        try:
            self.generation.keep_rows(places)
        except ValueError:
            assert self.generation.plan is before
            raise
        self.reserved = self.generation.plan.peak_pages_from(self.generation.scale)
        self._keep_alone([self.rows[place] for place in places])

    def fork(self):
        forked = self.generation.fork()
        twin = Twin(self.case, self.cache, self.copies, self.script, forked)
        if self.alone.place.copies < twin.alone.place.copies:
            twin._branch_alone()
        if twin.rows != self.rows:
            twin._keep_alone(self.rows)
        return twin

    def close(self):
        self.generation.close()
        self.alone.close()
