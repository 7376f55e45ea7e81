"""What a cache is told: options checked once, the softmax scale, autocast, grad mode, observers."""

import math

import pytest
import torch

from kvruntime import CacheOptions, PagedKVCache, ScheduleError
from kvruntime.sizes import parse_bytes, parse_share
from policies import CacheGeometry, Full, ScaleSchedule
from tests.profiles import profile_of
from tests.support import PLAIN_POLICIES
from tests.unit.test_cache import GEOMETRY, SCHEDULE, draw, make, sdpa, step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": math.nan}, "got nan"),
        ({"budget": math.inf}, "got inf"),
        ({"budget": 0}, "a budget in tokens must be positive, got 0"),
        ({"budget": -3}, "must be positive, got -3"),
        ({"budget": 1.5}, r"must be in \(0, 1\], got 1.5"),
        ({"budget": True}, "budget must be a number, got True"),
        ({"budget": None}, "budget must be a number, got None"),
        ({"budget": "0.1"}, "a share such as '2%' or a size such as '512MiB', got '0.1'"),
        ({"budget": "650"}, "got '650'"),
        ({"budget": "lots"}, "got 'lots'"),
        ({"budget": "0%"}, r"a percentage must be in \(0, 100\], got '0%'"),
        ({"budget": "101%"}, r"a percentage must be in \(0, 100\], got '101%'"),
        ({"budget": "-2%"}, "got '-2%'"),
        ({"budget": "0MiB"}, "got '0MiB'"),
        ({"page_size": 0}, "page_size must be a positive integer up to 2.30, got 0"),
        ({"page_size": True}, "page_size must be a positive integer"),
        ({"memory": 0}, "memory must be a positive number of bytes, got 0"),
        ({"memory": True}, "memory must be a positive number of bytes, got True"),
        ({"memory": math.nan}, "memory must be a positive number of bytes, got nan"),
        ({"memory": "all"}, "memory must be a size such as 80GiB"),
        ({"memory": "9" * 400 + "GiB"}, "memory must be a size such as 80GiB"),
        ({"workspace": 0}, "workspace must be a positive number of bytes, got 0"),
        ({"workspace": math.nan}, "workspace must be a positive number of bytes, got nan"),
        ({"workspace": "0MiB"}, "must be positive"),
        ({"backend": "flash"}, "'flash' is not one of auto, sdpa, xformers"),
        ({"paged_queries": -1}, "got -1"),
        ({"paged_queries": 1.5}, r"got 1\.5"),
        ({"paged_queries": True}, "got True"),
        ({"kv_dtype": "int3"}, "not one of int2, int4, int8"),
        ({"kv_dtype": "int4", "kv_groups": 3}, r"kv_groups must be one of \(1, 2, 4, 8\), got 3"),
        ({"kv_dtype": "int4", "kv_groups": True}, "kv_groups must be one of"),
        ({"kv_groups": 2}, "kv_groups 2 goes with a kv_dtype"),
        ({"kv_start": 0}, "kv_start 0 goes with a kv_dtype"),
        ({"kv_dtype": "int4", "kv_start": True}, "kv_start must be a scale, got True"),
        ({"policy": Full(), "profile": "none.json"}, "full is an object .* give no profile"),
    ],
)
def test_options_that_cannot_work_anywhere(options, message):
    with pytest.raises(ValueError, match=message):
        CacheOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "scalekv", "budget": 15}, "budget 15 is below the window of 16"),
        ({"policy": "sliding_window", "budget": 0.001}, "of 91 of history keeps none"),
        ({"policy": "none"}, "unknown policy 'none'"),
        ({"geometry": CacheGeometry(1, 1, 8, "float32", "bfloat16")}, "K and V in one dtype"),
        ({"kv_dtype": "int4", "kv_groups": 2}, "take fewer groups"),
        ({"kv_dtype": "int4", "kv_start": 7}, r"kv_start must be a scale in 0\.\.6, got 7"),
        ({"kv_dtype": "int4", "kv_start": -1}, r"kv_start must be a scale in 0\.\.6, got -1"),
        ({"kv_dtype": "int4", "page_size": 1}, "page_size 1 is too small"),
        ({"kv_dtype": "int4", "page_size": 2048}, "at most 1024 tokens, got 2048"),
        ({"profile": profile_of(SCHEDULE, 3)}, "the profile has 3 layers, the model 2"),
    ],
)
def test_options_that_do_not_suit_this_model(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_positional_policies_are_refused_by_name():
    with pytest.raises(ValueError, match=r"got 'full': for a policy by name write CacheOptions"):
        PagedKVCache(GEOMETRY, SCHEDULE, "full", softmax_scale=1.0)


def test_options_are_parsed_once():
    options = CacheOptions(memory="1.5 MiB", workspace="2kb")
    assert (options.memory, options.workspace) == (3 * 2**19, 2000)
    assert options.records is None
    assert CacheOptions(kv_dtype="int8", kv_groups=4).records.num_bytes(32) == 32 + 4 * 4
    assert (parse_share("80%"), parse_share(" 2.5 % "), parse_share("80GiB")) == (0.8, 0.025, None)
    assert parse_bytes("80GiB") == 80 * 2**30


def test_softmax_scale_has_no_default():
    with pytest.raises(TypeError, match="softmax_scale"):
        PagedKVCache(GEOMETRY, SCHEDULE)
    for bad, words in (
        (math.nan, "finite, got nan"),
        (math.inf, "finite"),
        (None, "number"),
        (True, "number"),
    ):
        with pytest.raises(ValueError, match=f"softmax_scale must be .*{words}"):
            PagedKVCache(GEOMETRY, SCHEDULE, softmax_scale=bad)


@pytest.mark.parametrize("scale", [2.0, 0, -1.0])
def test_softmax_scale_is_the_factor_on_the_logits(scale):
    cache = PagedKVCache(GEOMETRY, ScaleSchedule.of([2]), CacheOptions("full"), softmax_scale=scale)
    q, k, v = (torch.randn(1, 4, 3, 8) for _ in range(3))
    out = cache.open(1).attend(0, q, k, v)
    assert torch.equal(out, sdpa(q, k, v, scale=float(scale)))


@pytest.mark.parametrize("policy", PLAIN_POLICIES)
def test_a_schedule_of_one_scale_needs_no_cache(policy):
    """Nothing is cached, whatever the policy and its budget."""
    for budget in (0.10, 1, "1%", "1B"):
        cache = make(policy, budget, schedule=ScaleSchedule.of([3]))
        assert cache.plan(2).peak_pages == 0
        with cache.open(1) as generation:
            for layer in range(2):
                q, k, v = (torch.randn(1, 9, 3, 8) for _ in range(3))
                assert torch.equal(generation.attend(layer, q, k, v), sdpa(q, k, v))
        assert generation.stats.planned_pages == generation.stats.peak_pages == 0


@pytest.mark.parametrize("policy", ["scalekv", "centroid"])
def test_autocast_does_not_reach_the_runtimes_own_arithmetic(policy):
    wanted = draw(make(policy, 20).open(2))
    with torch.autocast("cpu", torch.bfloat16):
        ours = draw(make(policy, 20).open(2))
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_no_gradients_and_no_inference_tensors_stay():
    """A cache that served under inference_mode serves outside it, and the other way round."""
    cache = make("scalekv", 20)
    wanted = draw(cache.open(2))
    with torch.inference_mode():
        ours = draw(cache.open(2))
    again = draw(cache.open(2))
    for a, b, c in zip(ours, again, wanted, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c) and not b.requires_grad
    q, k, v = (part.requires_grad_() for part in step(0))
    out = cache.open(2).attend(0, q, k, v)
    assert not out.requires_grad


def test_observers_see_queries_and_all_keys():
    seen = {}

    def observer(scale, layer, row, q, keys, values):
        seen[scale, layer] = q.clone(), keys.clone()

    with make(observer=observer).open(2) as generation:
        draw(generation)
    assert set(seen) == {(scale, layer) for scale in range(len(SCHEDULE)) for layer in range(2)}
    for (scale, layer), (q, keys) in seen.items():
        assert torch.equal(q, step(scale, seed=layer)[0])
        all_keys = torch.cat([step(s, seed=layer)[1] for s in range(scale + 1)], 1)
        assert torch.equal(keys, all_keys.transpose(1, 2))


def test_an_observer_can_neither_close_nor_step():
    errors = []

    def observer(scale, layer, row, q, keys, values):
        for call in (generation.close, lambda: generation.attend(0, *step(0))):
            with pytest.raises(ScheduleError) as caught:
                call()
            errors.append(str(caught.value))

    generation = make(observer=observer).open(2)
    generation.attend(0, *step(0))
    assert "close() while a step runs" in errors[0] and "is running already" in errors[1]
    assert generation.is_open and generation.stats.live_pages == 6


def test_an_observer_that_raises_closes_the_generation():
    def observer(*seen):
        raise RuntimeError("mine")

    generation = make(observer=observer).open(2)
    pool = generation._runner.pool
    with pytest.raises(RuntimeError, match="mine"):
        generation.attend(0, *step(0))
    assert not generation.is_open
    assert pool.stats.live_pages == 0
