"""Caches of different geometry and format on one pool, and generations drawn beside their own
selves alone.
"""

import torch

from kvruntime import Pool
from policies import AMSKV, CacheGeometry, Centroid, ScaleSchedule, SlidingWindow
from tests.codecs import coding_of
from tests.generations import Case, fresh
from tests.support import RandomFold, RandomPolicy

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


def pool_of(num_pages):
    return Pool(num_pages=num_pages, page_bytes=PAGE_BYTES, plane_bytes=PLANE_BYTES)


class Twin:
    """A generation on a shared pool, and the same one alone on a pool of its own."""

    def __init__(self, case, cache, generation, script=()):
        self.case, self.cache, self.generation = case, cache, generation
        self.reserved = generation.plan.peak_pages
        self.rows = list(range(case.rows))
        self.script, self.layer = [], 0
        self.alone = case.cache(pool_of(200)).open(case.rows)
        for scale, seed, rows in script:
            self._replay(scale, seed, rows)

    def inputs(self, scale, layer, seed, rows):
        return tuple(part[rows] for part in fresh(self.case, scale, layer, seed=seed))

    def _replay(self, scale, seed, rows):
        if rows != self.rows:
            self._keep_alone(rows)
        for layer in range(self.case.geometry.layers):
            self.alone.attend(layer, *self.inputs(scale, layer, seed, rows))
        self.script.append((scale, seed, rows))

    def _keep_alone(self, rows):
        self.alone.keep_rows([self.rows.index(row) for row in rows])
        self.rows = list(rows)

    @property
    def is_done(self):
        return self.generation.scale == len(self.case.schedule)

    @property
    def is_between_scales(self):
        return self.layer == 0

    def step(self, seed):
        """One layer of both, compared bit for bit. The seed counts at the start of a scale."""
        scale, layer = self.generation.scale, self.layer
        if layer == 0:
            self.script.append((scale, seed, list(self.rows)))
        inputs = self.inputs(scale, layer, self.script[-1][1], self.rows)
        ours = self.generation.attend(layer, *inputs)
        assert torch.equal(ours, self.alone.attend(layer, *inputs))
        self.layer = (layer + 1) % self.case.geometry.layers

    def keep_rows(self, places):
        self.generation.keep_rows(places)
        self.reserved = self.generation.plan.peak_pages_from(self.generation.scale)
        self._keep_alone([self.rows[place] for place in places])

    def fork(self):
        twin = Twin(self.case, self.cache, self.generation.fork(), self.script)
        if twin.rows != self.rows:
            twin._keep_alone(self.rows)
        return twin

    def close(self):
        self.generation.close()
        self.alone.close()
