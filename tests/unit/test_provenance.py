"""Where stored tokens come from: written down by hand beside what the policy keeps and folds."""

import numpy as np
import pytest
import torch

from kvruntime import CacheOptions, PagedKVCache, provenance
from policies import CacheGeometry, ScaleSchedule
from tests.support import RandomFold, RandomPolicy, Spy

SCHEDULE = ScaleSchedule.of([1, (2, 3), (1, 2, 4), 3])


def cache_of(policy, budget=5, **options):
    geometry = CacheGeometry(2, 2, 32, "float32", "float32")
    chosen = CacheOptions(policy, budget, provenance=True, **{"page_size": 4, **options})
    return PagedKVCache(geometry, SCHEDULE, chosen, softmax_scale=1.0)


def steps(scale):
    generator = torch.Generator().manual_seed(scale)
    return torch.randn(3, 2, SCHEDULE.tokens[scale], 2, 32, generator=generator)


def of_scale(scale):
    *lines, columns = SCHEDULE.sizes[scale]
    high = int(np.prod(lines))
    return [
        (scale, (i + 0.5) / high, (j + 0.5) / columns) for i in range(high) for j in range(columns)
    ]


def by_hand(found, row, head, count):
    numbers = torch.stack((found.scale, found.line, found.column), -1)[row, head]
    assert numbers[count:].isnan().all()
    return [tuple(round(x, 3) for x in token) for token in numbers[:count].tolist()]


@pytest.mark.parametrize("policy", ["full", "sliding_window", "streaming_llm"])
@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int4", "kv_start": 1, "page_size": 8}])
def test_policies_that_go_by_age(policy, options):
    cache = cache_of(policy, **options)
    every = [place for scale in range(3) for place in of_scale(scale)]
    with cache.open(2) as generation:
        for scale in range(3):
            for layer in range(2):
                generation.attend(layer, *steps(scale))
        wanted = {
            "full": every,
            "sliding_window": every[-5:],
            "streaming_llm": every[:4] + every[-1:],
        }
        wanted = [tuple(round(float(np.float16(x)), 3) for x in token) for token in wanted[policy]]
        for layer in range(2):
            found = provenance(generation, layer)
            assert (found.weight == 1).all()
            for row in range(2):
                assert sorted(by_hand(found, row, 1, len(wanted))) == sorted(wanted)


@pytest.mark.parametrize("seed", [1, 6, 7])
@pytest.mark.parametrize("fold", [False, True])
def test_what_is_chosen_and_folded(seed, fold):
    """Layer 0 after every scale, and half way through one."""
    policy = Spy((RandomFold if fold else RandomPolicy)(seed, 1, True))
    cache = cache_of(policy)
    lanes = [[[] for _ in range(2)] for _ in range(2)]  # (origin, weight) by row and head
    with cache.open(2) as generation:
        for scale in range(3):
            policy.chosen.clear()
            generation.attend(0, *steps(scale))
            before, after = cache.plan(2).lengths_before(scale, 0), cache.plan(2).tokens[scale, 0]
            padded = int(before.max())
            found = provenance(generation, 0)
            for row in range(2):
                for head in range(2):
                    held = lanes[row][head] + [(place, 1.0) for place in of_scale(scale)]
                    lanes[row][head] = kept(policy, held, row, head, before, after, padded)
                    wanted = lanes[row][head]
                    assert len(wanted) == after[head]
                    mine = by_hand(found, row, head, len(wanted))
                    for ours, (theirs, _) in zip(mine, wanted, strict=True):
                        assert ours == pytest.approx(theirs, abs=4e-3 * (1 + scale))
                    weights = found.weight[row, head, : len(wanted)].tolist()
                    if policy.needs.weighted and not policy.needs.refit:
                        assert weights == pytest.approx([w for _, w in wanted], rel=1e-2)
            generation.attend(1, *steps(scale))


def kept(policy, held, row, head, before, after, padded):
    """What a lane holds afterwards, by the recorded choice."""
    if not policy.chosen:
        return held if after[head] else []
    choice = policy.chosen[0].selection
    short = int(before[head])

    def own(place):
        return place if place < short else place - padded + short

    places = [own(p) for p in choice.keep[row, head, : after[head]].tolist()]
    if choice.into is None:
        return [held[place] for place in places]
    sums = [np.zeros(4) for _ in places]
    for place, into in enumerate(choice.into[row, head].tolist()):
        if into >= 0 and not short <= place < padded:
            origin, weight = held[own(place)]
            weight = weight if policy.needs.weighted else 1.0
            sums[into] += weight * np.array([*origin, 1.0])
    return [(tuple(part[:3] / part[3]), part[3]) for part in sums]


def test_refusals():
    plain = PagedKVCache(CacheGeometry(1, 1, 32), SCHEDULE, CacheOptions("full"), softmax_scale=1.0)
    with plain.open(1) as generation, pytest.raises(ValueError, match="provenance=True"):
        provenance(generation, 0)
    generation = cache_of("full").open(1)
    assert provenance(generation, 0).scale.shape == (1, 2, 0), "nothing is held yet"
    with pytest.raises(ValueError, match="layer 2 is not one of 2"):
        provenance(generation, 2)
    generation.close()
    with pytest.raises(ValueError, match="this generation is closed"):
        provenance(generation, 0)
