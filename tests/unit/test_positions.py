"""What the host knows of steps: shift, keep and append against brute force, and wrong policies
refused by name.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvruntime import Allocation, PagedKVCache
from kvruntime.options import CacheOptions
from kvruntime.planning.positions import Positions
from policies import CacheGeometry, Needs, Problem, ScaleSchedule, Selection
from policies.base import NO_NEEDS
from tests.support import schedules


@dataclass
class Aged:
    """Keeps any tokens by their numbers: each head its own, or all alike; any numbers of them."""

    tokens: np.ndarray
    seed: int
    needs: Needs = NO_NEEDS
    name: str = "aged"
    seen: list = field(default_factory=list)

    def allocate(self, problem):
        return Allocation(self.tokens)

    def scratch(self, sizes):
        return []

    def rank(self, candidates):
        """A number for each token, the same whenever it is asked again."""
        positions = candidates.positions[0].numpy()
        mixed = (positions + 1) * 7919 * (self.seed + 1) % 104_729
        return np.where(positions < 0, -1, mixed)

    def select(self, candidates):
        assert not any(t.numel() for t in (candidates.queries, candidates.keys, candidates.values))
        assert candidates.log_weights is None and candidates.softmax_scale == 1.0
        own = self.tokens[candidates.scale, candidates.layer]
        assert np.array_equal(candidates.keep, own[: candidates.keep.size])
        assert candidates.scratch == {}
        assert candidates.positions.min() >= -1
        self.seen.append((candidates.scale, candidates.layer, candidates.positions.clone()))
        ranks, keep = self.rank(candidates), candidates.keep
        most, count = int(keep.max()), ranks.shape[1]
        places = np.full((1, keep.size, most), count)
        for head, number in enumerate(keep.tolist()):
            order = np.argsort(-ranks[head], kind="stable")[:number]
            places[0, head, :number] = np.sort(order)
        return Selection(torch.from_numpy(places))


def followed(policy, schedule, tokens, quantised=None):
    """Each lane's token numbers after every step, as KnownStep says they lie: [layer][scale]
    lists of heads. Checks that what stays is not moved.
    """
    scales, layers, heads = tokens.shape
    quantised = np.zeros((scales, layers), dtype=bool) if quantised is None else quantised
    problem = Problem(CacheGeometry(layers, heads, 4), schedule, 1)
    positions = Positions(policy, problem, tokens, quantised)
    result = []
    for layer in range(layers):
        lanes = [np.empty(0, dtype=np.int64) for _ in range(heads)]
        history = []
        for scale in range(scales):
            known = positions.step(scale, layer)
            assert positions.step(scale, layer) is known
            fresh = np.arange(*schedule.span(scale))
            longest = max(lane.size for lane in lanes)
            for head, lane in enumerate(lanes):
                count = int(tokens[scale, layer, head])
                padded = np.concatenate([lane, np.full(longest - lane.size, -1), fresh])
                mine = padded[known.keep[head, :count]]
                assert (mine >= 0).all() and np.unique(mine).size == count
                if known.shift is not None:
                    moved = lane[:count].copy()
                    moved = np.concatenate([moved, np.full(count - moved.size, -1)])
                    moved[known.shift.targets] = padded[known.shift.sources]
                    assert (moved == mine).all(), "a shift and its places differ"
                    assert (np.diff(known.shift.sources) > 0).all()
                    assert (known.shift.sources[: known.shift.moved] < longest).all()
                    assert (known.shift.sources[known.shift.moved :] >= longest).all()
                    kept = np.intersect1d(mine, lane[:count])
                    stays = np.setdiff1d(np.arange(count), known.shift.targets)
                    assert np.array_equal(np.sort(lane[stays]), kept), "it moved without need"
                lanes[head] = mine
            history.append([lane.copy() for lane in lanes])
        result.append(history)
    return result


def brute_force(policy, schedule, tokens):
    """Sets of token numbers, worked out from ranks alone."""
    scales, layers, heads = tokens.shape
    result = []
    for layer in range(layers):
        sets = [set() for _ in range(heads)]
        history = []
        for scale in range(scales):
            for head in range(heads):
                sets[head] |= set(range(*schedule.span(scale)))
                number = int(tokens[scale, layer, head])
                ranked = sorted(
                    sets[head], key=lambda t: (t + 1) * 7919 * (policy.seed + 1) % 104_729
                )
                sets[head] = set(ranked[len(ranked) - number :])
            history.append([set(lane) for lane in sets])
        result.append(history)
    return result


@st.composite
def allocations(draw, schedule, layers, heads, is_even):
    tokens = np.zeros((len(schedule), layers, heads), dtype=np.int64)
    for layer in range(layers):
        for head in range(1 if is_even else heads):
            held = 0
            for scale, fresh in enumerate(schedule.tokens[:-1]):
                whole = draw(st.booleans())
                held = held + fresh if whole else draw(st.integers(0, held + fresh))
                tokens[scale, layer, head if not is_even else slice(None)] = held
    return tokens


@given(schedule=schedules, layers=st.integers(1, 2), heads=st.integers(1, 3), data=st.data())
def test_lanes_hold_what_the_policy_ranks_highest(schedule, layers, heads, data):
    """Even and ragged lanes, empty ones, layers that are alike and layers that are not."""
    is_even = data.draw(st.booleans())
    tokens = data.draw(allocations(schedule, layers, heads, is_even))
    policy = Aged(tokens, data.draw(st.integers(0, 100)))
    found = followed(policy, schedule, tokens)
    wanted = brute_force(policy, schedule, tokens)
    for ours, theirs in zip(found, wanted, strict=True):
        for lanes, sets in zip(ours, theirs, strict=True):
            assert [set(lane.tolist()) for lane in lanes] == sets


@given(schedule=schedules, heads=st.integers(1, 3), data=st.data())
def test_content_decides_only_where_something_is_dropped(schedule, heads, data):
    """Elsewhere everything is kept: each head's own cached tokens, then the new scale."""
    tokens = data.draw(allocations(schedule, 1, heads, data.draw(st.booleans())))
    policy = Aged(tokens, 0, Needs(content=True))
    problem = Problem(CacheGeometry(1, heads, 4), schedule, 1)
    quantised = np.zeros((len(schedule), 1), dtype=bool)
    positions = Positions(policy, problem, tokens, quantised)
    before = np.zeros(heads, dtype=np.int64)
    for scale, fresh in enumerate(schedule.tokens):
        known, after = positions.step(scale, 0), tokens[scale, 0]
        if after.max() == 0:
            assert known.keep.shape == (heads, 0)
        elif (after < before + fresh).any():
            assert known.keep is None and known.shift is None
        else:
            longest = int(before.max())
            for head in range(heads):
                own = [*range(before[head]), *range(longest, longest + fresh)]
                padding = [longest + fresh] * (known.keep.shape[1] - len(own))
                assert known.keep[head].tolist() == own + padding
            assert (known.shift is not None) == (before == longest).all()
        before = after
    assert policy.seen == []


def test_heads_of_one_length_that_hold_different_tokens():
    """Once ragged, then even: what stays where is each head's own."""
    schedule = ScaleSchedule.of([2, 2, 2, 2, 1])
    tokens = np.array([[4, 2], [5, 5], [6, 6], [4, 4], [0, 0]])[:, None]
    for seed in range(8):
        policy = Aged(tokens, seed)
        found = followed(policy, schedule, tokens)[0]
        wanted = brute_force(Aged(tokens, seed), schedule, tokens)[0]
        for lanes, sets in zip(found, wanted, strict=True):
            assert [set(lane.tolist()) for lane in lanes] == sets


def test_a_shift_by_hand():
    """A window of four over three and three: two old ones at the front are overwritten."""
    schedule = ScaleSchedule.of([(1, 3), (1, 3), 1])
    tokens = np.array([3, 4, 0]).reshape(3, 1, 1)

    class Window(Aged):
        def rank(self, candidates):
            return candidates.positions[0].numpy()

    policy = Window(tokens, 0)
    positions = Positions(
        policy, Problem(CacheGeometry(1, 1, 4), schedule, 4), tokens, np.zeros((3, 1), dtype=bool)
    )
    shift = positions.step(1, 0).shift
    assert shift.sources.tolist() == [3, 4, 5] and shift.moved == 0 and shift.fresh_is_slice
    assert shift.targets.tolist() == [0, 1, 3]
    assert positions.step(1, 0).keep.tolist() == [[3, 4, 2, 5]]
    assert policy.seen[0][2].tolist() == [[[0, 1, 2, 3, 4, 5]]]
    assert positions.step(2, 0).keep.shape == (1, 0)
    # handed over to another format, everything is written anew, in order
    quantised = np.array([[False], [True], [True]])
    positions = Positions(policy, Problem(CacheGeometry(1, 1, 4), schedule, 4), tokens, quantised)
    assert positions.step(1, 0).shift is None
    assert positions.step(1, 0).keep.tolist() == [[2, 3, 4, 5]]


def test_layers_that_are_alike_share_what_is_worked_out():
    schedule = ScaleSchedule.of([2, 2, 2, 1])
    tokens = np.array([4, 5, 5, 0])[:, None, None].repeat(30, 1).repeat(8, 2)
    tokens[2, 7] = 3
    policy = Aged(tokens, 3)
    followed(policy, schedule, tokens)
    assert len(policy.seen) == 3, "one choice at scale 1, two different ones at scale 2"
    assert {positions.shape for _, _, positions in policy.seen} == {(1, 1, 8), (1, 1, 9)}


def test_constants_go_to_the_device_once():
    schedule = ScaleSchedule.of([2, 1])
    tokens = np.array([4, 0]).reshape(2, 1, 1)
    problem = Problem(CacheGeometry(1, 1, 4), schedule, 4)
    known = Positions(Aged(tokens, 0), problem, tokens, np.zeros((2, 1), dtype=bool)).step(0, 0)
    made = []

    def make():
        made.append(1)
        return np.arange(3)

    cpu, meta = torch.device("cpu"), torch.device("meta")
    with torch.inference_mode():
        first = known.constant(cpu, "a", make)
    assert known.constant(cpu, "a", make) is first and not first.is_inference()
    assert known.constant(meta, "a", make).device.type == "meta"
    known.constant(cpu, "b", make)
    known.constant(cpu, "a", make, 2)
    assert len(made) == 4


WRONG = {
    "unsorted": lambda keep, count: keep.flip(-1),
    "repeated": lambda keep, count: keep[..., :1].expand_as(keep),
    "past the end": lambda keep, count: torch.cat([keep[..., :-1], keep[..., :1] * 0 + count], -1),
    "negative": lambda keep, count: torch.cat([keep[..., :1] * 0 - 1, keep[..., 1:]], -1),
    "too few": lambda keep, count: keep[..., :-1],
    "no rows": lambda keep, count: keep[0],
    "a batch": lambda keep, count: keep.expand(2, -1, -1),
    "int32": lambda keep, count: keep.int(),
    "floats": lambda keep, count: keep.float(),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("is_even", [True, False])
def test_wrong_choices_are_refused_by_name(wrong, is_even):
    schedule = ScaleSchedule.of([2, 2, 1])
    heads = 2
    tokens = np.array([[4, 4], [5, 5] if is_even else [5, 3], [0, 0]]).reshape(3, 1, heads)

    class Wrong(Aged):
        def select(self, candidates):
            keep = Aged.select(self, candidates).keep
            return Selection(WRONG[wrong](keep, candidates.positions.shape[2]))

    geometry = CacheGeometry(1, heads, 4, "float32", "float32")
    options = CacheOptions(Wrong(tokens, 1, name="odd"), 5)
    cache = PagedKVCache(geometry, schedule, options, softmax_scale=1.0)
    with pytest.raises(ValueError, match=r"policy odd must keep"):
        cache.plan(1).workspace_bytes  # noqa: B018
    generation = cache.open(1)
    pool = generation._runner.pool
    with pytest.raises(ValueError, match=r"policy odd must keep"):
        for tokens_of_scale in schedule.tokens:
            generation.attend(0, *torch.zeros(3, 1, tokens_of_scale, heads, 4))
    assert not generation.is_open and pool.stats.live_pages == 0


def test_tokens_that_are_not_there_and_folding_without_content():
    schedule = ScaleSchedule.of([2, 2, 1])
    tokens = np.array([[4, 2], [5, 4], [0, 0]]).reshape(3, 1, 2)
    problem = Problem(CacheGeometry(1, 2, 4), schedule, 5)

    class Ghosts(Aged):
        def select(self, candidates):
            if candidates.scale == 0:
                return Aged.select(self, candidates)
            return Selection(torch.tensor([[[0, 1, 2, 3, 4], [0, 1, 2, 3, 8]]]))

    class Folding(Aged):
        def select(self, candidates):
            keep = Aged.select(self, candidates).keep
            return Selection(keep, into=torch.zeros(1, 2, 8, dtype=torch.int64))

    for policy, message in (
        (Ghosts(tokens, 0), r"policy aged must keep 4 places of head 1.*got \[0, 1, 2, 3\]"),
        (Folding(tokens, 0), "policy aged folds, but looks at no content"),
    ):
        positions = Positions(policy, problem, tokens, np.zeros((3, 1), dtype=bool))
        with pytest.raises(ValueError, match=message):
            positions.step(1, 0)
