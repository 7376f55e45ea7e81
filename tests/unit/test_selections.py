"""Policies that score on the device and answer wrongly: refused, and the generation is closed."""

from dataclasses import dataclass, field

import pytest
import torch

from kvruntime import Allocation, CacheOptions, PagedKVCache, Selection
from policies import CacheGeometry, Needs, ScaleSchedule
from policies.base import WEIGHTED
from policies.budgets import capped

SCHEDULE = ScaleSchedule.of([2, 3, 2, 1])  # 4, 9, 4, 1 tokens
BUDGET, ROWS, HEADS, DIM = 6, 2, 3, 4
SHAPE = (ROWS, HEADS, BUDGET)
SCORES, FOLDS = Needs(content=True), WEIGHTED


@dataclass
class Answers:
    """A policy whose selections are made by a function of rows, heads, keep and candidates."""

    answer: object
    needs: Needs = SCORES
    is_ragged: bool = False
    name: str = "odd"
    calls: list = field(default_factory=list)

    def allocate(self, problem):
        made = capped(problem)
        if self.is_ragged:
            made.tokens[:-1, :, 1] = 3
        return Allocation(made.tokens)

    def scratch(self, sizes):
        return []

    def select(self, candidates):
        self.calls.append((candidates.scale, candidates.layer, candidates.keys.shape))
        return self.answer(candidates)


def run(policy, rows=ROWS):
    """A generation with this policy; the pool is checked whatever happens."""
    geometry = CacheGeometry(2, HEADS, DIM, "float32", "float32")
    cache = PagedKVCache(geometry, SCHEDULE, CacheOptions(policy, BUDGET), softmax_scale=1.0)
    generation = cache.open(rows)
    pool = generation._runner.pool
    try:
        for tokens in SCHEDULE.tokens:
            for layer in range(2):
                generation.attend(layer, *torch.randn(3, rows, tokens, HEADS, DIM))
    except ValueError:
        assert not generation.is_open, "a step that failed closes its generation"
        raise
    finally:
        pool.check()
        assert pool.stats.live_pages == 0
    return generation


def first_ones(candidates):
    """The first places of each head's own."""
    rows, heads = candidates.keys.shape[:2]
    return torch.arange(int(candidates.keep.max())).repeat(rows, heads, 1)


def last_ones(candidates):
    return candidates.keys.shape[2] - 1 - first_ones(candidates).flip(-1)


def change(function, base=last_ones):
    return lambda candidates: Selection(function(base(candidates), candidates.keys.shape[2]))


def test_a_policy_that_keeps_to_its_word():
    policy = Answers(change(lambda keep, count: keep))
    stats = run(policy).stats
    assert stats.planned_pages == stats.peak_pages > 0
    assert {shape for _, _, shape in policy.calls} == {(2, 3, 13, 4), (2, 3, 10, 4)}
    assert [call[:2] for call in policy.calls] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def put(keep, place, value):
    keep = keep.clone()
    keep[1, 2, place] = value
    return keep


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda keep, count: keep.flip(-1), "ascending and distinct"),
        (lambda keep, count: put(keep, 3, 4), "ascending and distinct"),
        (lambda keep, count: put(keep, 1, keep[1, 2, 0]), "ascending and distinct"),
        (lambda keep, count: put(keep, 0, -1), "in range"),
        (lambda keep, count: put(keep, -1, count), "in range"),
        (lambda keep, count: put(keep, -1, count + 5), "in range"),
        (lambda keep, count: put(keep, -1, 2**40), "in range"),
        (lambda keep, count: keep[:1], r"keep must be torch.int64 \(2, 3, 6\), got .*\(1, 3, 6\)"),
        (lambda keep, count: keep[:, :1], r"keep must be torch.int64 \(2, 3, 6\), got"),
        (lambda keep, count: keep[..., :-1], r"keep must be torch.int64 \(2, 3, 6\), got"),
        (lambda keep, count: keep[0, 0], r"keep must be torch.int64 \(2, 3, 6\), got"),
        (lambda keep, count: keep.int(), "keep must be torch.int64 .*, got torch.int32"),
        (lambda keep, count: keep.float(), "keep must be torch.int64 .*, got torch.float32"),
    ],
)
def test_places_are_checked(function, message):
    with pytest.raises(ValueError, match=f"policy odd.*{message}"):
        run(Answers(change(function)))


@pytest.mark.parametrize("answer", [None, [1, 2], torch.zeros(2, 3, 6)])
def test_what_is_no_selection(answer):
    with pytest.raises(ValueError, match="policy odd must return a Selection, got"):
        run(Answers(lambda candidates: answer))


def test_a_selection_of_no_tensors():
    with pytest.raises(ValueError, match=r"keep must be torch.int64 \(2, 3, 6\), got list"):
        run(Answers(lambda candidates: Selection([[0, 1]])))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda keep, count: keep, None),
        (lambda keep, count: put(keep, 1, 5), "ascending and distinct"),
        (lambda keep, count: put(keep, -1, -5), "ascending and distinct|in range"),
    ],
)
def test_ragged_heads(answer, message):
    """Head 1 keeps three tokens, the others six; what lies behind a head's own is not looked at."""

    def made(candidates):
        keep = first_ones(candidates)
        keep[:, 1, 3:] = -7
        return Selection(answer(keep, candidates.keys.shape[2]))

    policy = Answers(made, is_ragged=True)
    if message is None:
        run(policy)
        return
    with pytest.raises(ValueError, match=message):
        run(policy)


def test_tokens_that_are_not_there():
    """Head 1 has three of six cached places: the others are holes."""

    def made(candidates):
        keep = first_ones(candidates)
        if candidates.scale == 2:
            keep[:, 1, :3] = torch.tensor([0, 1, 4])
        return Selection(keep)

    with pytest.raises(ValueError, match=r"scale 2, layer 0 are not of tokens that are there"):
        run(Answers(made, is_ragged=True))

    def right(candidates):
        keep = first_ones(candidates)
        if candidates.scale == 2:
            keep[:, 1, :3] = torch.tensor([0, 2, 6])  # the last is of the new scale
        return Selection(keep)

    run(Answers(right, is_ragged=True))


def folded(keep, count):
    """Everything that is not kept goes to the last kept place."""
    into = torch.full((*keep.shape[:2], count), keep.shape[2] - 1)
    return into.scatter(2, keep, torch.arange(keep.shape[2]).expand_as(keep))


def poke(into, place, value):
    into = into.clone()
    into[0, 1, place] = value
    return into


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda into, count: into, None),
        (lambda into, count: torch.where(into == BUDGET - 1, into, into), None),
        (lambda into, count: poke(into, 0, BUDGET), "folded into kept places"),
        (lambda into, count: poke(into, 0, -2), "folded into kept places"),
        (lambda into, count: poke(into, count - 1, 0), "folded into themselves"),
        (lambda into, count: poke(into, count - 3, -1), "folded into themselves"),
        (lambda into, count: into[:1], r"into must be torch.int64 \(2, 3, 13\), got"),
        (lambda into, count: into[..., 1:], r"into must be torch.int64 \(2, 3, 13\), got"),
        (lambda into, count: into.int(), r"into must be torch.int64 \(2, 3, 13\), got"),
        (lambda into, count: None, "must say what it folds into what"),
    ],
)
def test_targets_are_checked(function, message):
    def answer(candidates):
        keep, count = last_ones(candidates), candidates.keys.shape[2]
        return Selection(keep, function(folded(keep, count), count))

    if message is None:
        run(Answers(answer, FOLDS))
        return
    with pytest.raises(ValueError, match=f"policy odd.*{message}"):
        run(Answers(answer, FOLDS))


def test_a_policy_that_folds_says_so():
    """In its needs or not at all: tokens would be stored without their weights."""

    def answer(candidates):
        keep, count = last_ones(candidates), candidates.keys.shape[2]
        return Selection(keep, folded(keep, count))

    with pytest.raises(ValueError, match="policy odd folds: its needs must say so"):
        run(Answers(answer, SCORES))


ADDS_UP = Needs(content=True, planes=("score",))


@pytest.mark.parametrize(
    ("scores", "needs", "message"),
    [
        (lambda count: torch.zeros(2, 3, count), ADDS_UP, None),
        (lambda count: torch.zeros(2, 3, count).half(), ADDS_UP, None),
        (lambda count: None, ADDS_UP, None),
        (lambda count: torch.zeros(2, 3, count + 1), ADDS_UP, "scores must be floating"),
        (lambda count: torch.zeros(2, 3, count).long(), ADDS_UP, "scores must be floating"),
        (lambda count: torch.zeros(2, 3, count), SCORES, "its needs must name the plane score"),
    ],
)
def test_scores_are_checked(scores, needs, message):
    def answer(candidates):
        return Selection(last_ones(candidates), scores=scores(candidates.keys.shape[2]))

    if message is None:
        run(Answers(answer, needs))
        return
    with pytest.raises(ValueError, match=f"policy odd.*{message}"):
        run(Answers(answer, needs))


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"planes": ("age",), "content": True}, "planes are log_weight, .*, got 'age'"),
        ({"planes": ("score",)}, "looks at the content"),
        ({"folds": True}, "looks at the content"),
        ({"refit": 4, "content": True, "folds": True}, "refit fits log weights"),
    ],
)
def test_needs_that_cannot_be(needs, message):
    with pytest.raises(ValueError, match=message):
        Needs(**needs)


@pytest.mark.parametrize("queries", [0, 1])
def test_the_plan_is_not_the_policys_to_write(queries):
    def answer(candidates):
        if queries:
            keep = last_ones(candidates)
        else:
            keep = torch.arange(BUDGET).repeat(1, candidates.keep.size, 1)
        candidates.keep[:] = 1
        return Selection(keep)

    policy = Answers(answer, Needs(content=bool(queries)))
    generation = run(policy)
    assert (generation.plan.tokens[1:-1] == BUDGET).all()
    assert generation.stats.timeline[1].kept_tokens == BUDGET * HEADS * 2


def test_a_policy_that_raises_closes_the_generation():
    def answer(candidates):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run(Answers(answer))
