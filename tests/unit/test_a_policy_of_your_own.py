"""A new policy is a file and a line in the registry: this is the file, the test has the line."""

from dataclasses import dataclass

import pytest
import torch

import kvruntime
import policies
from policies import make_policy
from policies.base import NO_NEEDS, Allocation, Candidates, Needs, Problem, Selection, StepSizes
from policies.budgets import capped
from policies.recency import highest
from policies.scratch import Region


@dataclass(frozen=True)
class EveryOther:
    """Tokens of even number first, the newest of them."""

    name: str = "every_other"
    needs: Needs = NO_NEEDS

    def allocate(self, problem: Problem) -> Allocation:
        return capped(problem)

    def scratch(self, sizes: StepSizes) -> list[Region]:
        return []

    def select(self, candidates: Candidates) -> Selection:
        positions = candidates.positions
        ranks = positions + candidates.schedule.total * (1 - positions % 2)
        return highest(ranks.masked_fill(positions < 0, -1), candidates.keep)


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int4"}, {"backend": "sdpa"}])
def test_a_policy_by_its_name(tiny_model, monkeypatch, options):
    monkeypatch.setitem(policies._MAKERS, "every_other", lambda profile, preset: EveryOther())
    assert make_policy("every_other") == EveryOther()
    with kvruntime.attach(tiny_model, "every_other", 0.1, **options) as attached:
        for _ in range(2):
            tiny_model.generate(torch.arange(2))
            stats = attached.stats
            assert stats.policy == "every_other" and stats.live_pages == 0
            assert stats.planned_pages == stats.peak_pages > 0
