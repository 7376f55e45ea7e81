"""Hazards of what a policy hands back, and of the arithmetic by which policies choose."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kvruntime import Allocation, CacheOptions, PagedKVCache, Pool, Selection
from kvruntime.planning import plan
from policies import CacheGeometry, ScaleKV, ScaleSchedule, make_policy
from policies.base import Candidates, Needs, StepSizes
from policies.scoring import attention_received, attention_scratch, patch_centres
from policies.scratch import lend
from tests.profiles import problem_of
from tests.support import PLAIN_POLICIES

SCHEDULE = ScaleSchedule.of([1, 2, 3, 4])
GEOMETRY = CacheGeometry(1, 3, 8, "float32", "float32")
KEPT = 6
CONTENT = Needs(content=True)


@dataclass(frozen=True)
class Returning:
    """Keeps KEPT tokens of every lane, those that ``choose(candidates, count)`` says."""

    choose: object
    needs: Needs = CONTENT
    name: str = "returning"

    def allocate(self, problem):
        lengths = np.minimum(np.array(problem.schedule.seen), KEPT)[:, None, None]
        tokens = np.repeat(lengths, problem.geometry.heads, axis=2)
        tokens[-1] = 0
        return Allocation(tokens)

    def scratch(self, sizes):
        return []

    def select(self, candidates):
        content = self.needs.content
        count = (candidates.keys if content else candidates.positions).shape[2]
        return self.choose(candidates, count)


def ascending(candidates, rows=2, heads=3):
    """A legal choice: the first ones."""
    return torch.arange(int(candidates.keep.max())).expand(rows, heads, -1).clone()


def draw(policy, pool=None):
    """A generation of two rows; returns the pool that it has used."""
    cache = PagedKVCache(
        GEOMETRY,
        SCHEDULE,
        CacheOptions(policy=policy, budget=KEPT, page_size=2),
        softmax_scale=1.0,
        pool=pool,
    )
    with cache.open(2) as generation:
        for tokens in SCHEDULE.tokens:
            generation.attend(0, *torch.randn(3, 2, tokens, 3, 8))
    return cache


def changed(place, value):
    def choose(candidates, count):
        keep = ascending(candidates)
        keep[1, 2, place] = value(keep, count)
        return Selection(keep)

    return choose


BAD = {
    "repeated": changed(1, lambda keep, count: keep[1, 2, 0]),
    "unsorted": changed(0, lambda keep, count: keep[1, 2, 1] + 1),
    "negative": changed(0, lambda keep, count: -1),
    "beyond the end": changed(-1, lambda keep, count: count),
    "far beyond the end": changed(-1, lambda keep, count: 2**40),
    "reversed": lambda candidates, count: Selection(ascending(candidates).flip(-1)),
    "one row for all": lambda candidates, count: Selection(ascending(candidates, rows=1)),
    "one head for all": lambda candidates, count: Selection(ascending(candidates, heads=1)),
    "too few": lambda candidates, count: Selection(ascending(candidates)[..., 1:]),
    "too many": lambda candidates, count: Selection(torch.arange(count).expand(2, 3, -1)),
    "int32": lambda candidates, count: Selection(ascending(candidates).int()),
    "folding unannounced": lambda candidates, count: Selection(
        ascending(candidates), torch.zeros(2, 3, count, dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_h07_places_that_are_unsorted_or_repeated_corrupt_lanes(name):
    """Refused by name, in the step, and no page stays behind."""
    pool = Pool(num_pages=30, page_bytes=2 * 2 * 8 * 4)
    with pytest.raises(ValueError, match="policy returning"):
        draw(Returning(BAD[name]), pool)
    pool.check()
    assert pool.stats.live_pages == 0


def test_h07_the_legal_choice_is_accepted():
    draw(Returning(lambda candidates, count: Selection(ascending(candidates))))


@pytest.mark.parametrize("needs", [CONTENT, Needs()])
def test_h07_a_policy_that_writes_into_its_arguments_changes_no_plan(needs):
    def vandal(candidates, count):
        rows = 2 if needs.content else 1
        heads = 3 if needs.content else candidates.keep.size
        keep = ascending(candidates, rows, heads)
        candidates.keep[:] = 1
        if not needs.content:
            candidates.positions.fill_(0)
        return Selection(keep)

    cache = draw(Returning(vandal, needs))
    assert (cache.plan(2).tokens[-2] == KEPT).all()


@pytest.mark.parametrize("seed", range(60))
def test_h16_a_policy_without_queries_returns_any_order(seed):
    """37 of 60 random orders drew wrong pictures silently."""
    rng = np.random.default_rng(seed)

    def shuffled(candidates, count):
        kept = rng.permutation(count)[: int(candidates.keep.max())]
        if (np.diff(kept) > 0).all():
            kept = kept[::-1]
        return Selection(torch.from_numpy(kept.copy())[None, None].expand(1, 1, -1))

    with pytest.raises(ValueError, match="ascending, distinct"):
        draw(Returning(shuffled, Needs()))


@pytest.mark.parametrize(
    "choose",
    [
        lambda candidates, count: Selection(torch.arange(KEPT - 1)[None, None]),
        lambda candidates, count: Selection(torch.arange(count)[None, None]),
        lambda candidates, count: Selection(torch.arange(KEPT)[None, None].float()),
        lambda candidates, count: Selection(torch.arange(KEPT)),
        lambda candidates, count: Selection(torch.arange(KEPT)[None, None] + count),
        lambda candidates, count: Selection(torch.arange(KEPT)[None, None] - 1),
        lambda candidates, count: Selection(
            torch.arange(KEPT)[None, None], into=torch.zeros(1, 1, count).long()
        ),
    ],
)
def test_h16_a_policy_without_queries_returns_any_number(choose):
    with pytest.raises(ValueError, match="policy returning"):
        draw(Returning(choose, Needs()))


def test_h10_full_does_not_look_at_its_budget():
    for name in ("var-d16", "infinity-8b"):
        for budget in (0.001, 1, 1e-9):
            made = plan(name, 1, "full", budget)
            assert made.peak_pages == plan(name, 1, "full", 1.0).peak_pages


def candidates_of(dtype, factor=1.0, cached=40, rows=2):
    """Candidates of scale 3 with scratch as the planner declares it."""
    generator = torch.Generator().manual_seed(0)
    sizes = StepSizes(rows, 3, 8, str(dtype).removeprefix("torch."), cached, 16, 20)
    policy = ScaleKV(grid=2)
    queries = torch.randn(rows, 16, 3, 8, generator=generator).mul(factor).to(dtype)
    keys = torch.randn(rows, 3, cached + 16, 8, generator=generator).to(dtype)
    keep = np.full(3, 20)
    scratch = lend(policy.scratch(sizes), torch.device("cpu"))
    assert {region.name for region in attention_scratch(sizes, 4)} - scratch.keys() == {
        "torch: missing"
    }
    empty = torch.empty(0, dtype=torch.int64)
    return policy, Candidates(
        problem_of(SCHEDULE), 3, 0, keep, empty, queries, keys, keys, None, 1.0, scratch
    )


def wanted_scores(candidates, centres):
    q = candidates.queries[:, centres].transpose(1, 2).double()
    return (q @ candidates.keys.double().transpose(2, 3)).softmax(-1).sum(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 20.0])
def test_h13_selection_logits_round_before_the_softmax(dtype, factor):
    """What is chosen under half precision is what float32 arithmetic chooses from the same bits."""
    policy, candidates = candidates_of(dtype, factor)
    exact = Candidates(
        **{name: getattr(candidates, name) for name in Candidates.__slots__}
        | {
            "queries": candidates.queries.float(),
            "keys": candidates.keys.float(),
            "scratch": candidates_of(torch.float32)[1].scratch,
        }
    )
    assert torch.equal(policy.select(candidates).keep, policy.select(exact).keep)
    centres = torch.from_numpy(patch_centres((4, 4), 2))
    scores = attention_received(candidates, centres)
    wanted = wanted_scores(candidates, centres)
    assert float((scores - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("factor", [1.0, 200.0, 2e4])
def test_h13_scores_survive_logits_that_overflow_an_exponential(factor):
    """Without the subtraction of the maximum a score is inf / inf, and the choice is arbitrary."""
    _, candidates = candidates_of(torch.float32, factor)
    centres = torch.from_numpy(patch_centres((4, 4), 2))
    scores = attention_received(candidates, centres)
    assert scores.isfinite().all()
    wanted = wanted_scores(candidates, centres)
    assert float((scores - wanted).abs().max()) < 1e-2
    assert torch.equal(scores.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("policy", PLAIN_POLICIES)
def test_h07_shipped_policies_keep_their_promise(policy):
    """The same checks pass for all that is shipped."""
    draw(ScaleKV(grid=2) if policy == "scalekv" else make_policy(policy))
