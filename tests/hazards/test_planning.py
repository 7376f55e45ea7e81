"""Hazards between what is planned and what runs: bytes, roles, names, chunks."""

import importlib.util
import inspect
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kvruntime
from benchmarks.memory import TINY, measure
from benchmarks.ragged import RAGGED
from kvruntime import CacheGeometry, CacheOptions, PagedKVCache
from kvruntime.calibration import _Statistics
from kvruntime.catalogue import find_model
from policies import ScaleSchedule, load_preset, make_policy
from tests.look_alikes.var import VAR

profiled = pytest.mark.filterwarnings("ignore")  # the profiler's own


def by_name(policy):
    return policy.name


@profiled
@pytest.mark.parametrize("policy", RAGGED, ids=by_name)
@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float32", None), ("bfloat16", "int4")])
def test_h08_ragged_pages_use_half_as_much_again_as_planned(policy, dtype, kv_dtype):
    assert measure(TINY, policy, dtype, kv_dtype, 1)["ratio"] <= 1.0


@profiled
@pytest.mark.parametrize("policy", ["scalekv", "centroid"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_h15_selection_in_half_precision_takes_more_than_planned(policy, dtype):
    """What is kept is gathered as integers; numbers would go through float32."""
    assert measure(TINY, make_policy(policy), dtype, None, 1)["ratio"] <= 1.0


@profiled
@pytest.mark.parametrize("policy", ["full", "scalekv"])
def test_h22_the_output_of_several_chunks_is_planned(policy):
    assert measure(TINY, make_policy(policy), "float32", None, TINY.rows)["ratio"] <= 1.0


def keys_of_a_generation(statistics, schedule, layers, device):
    for scale, tokens in enumerate(schedule.tokens):
        for layer in range(layers):
            q = torch.zeros(2, tokens, 2, 8, device=device)
            keys = torch.zeros(2, 2, schedule.seen[scale], 8, device=device)
            statistics(scale, layer, 0, q, keys, keys)
            yield scale


def test_h09_calibration_keeps_keys_that_nobody_reads():
    """Keys wait for the next scale of their layer alone, and none outlives the last scale."""
    schedule = ScaleSchedule.of([1, 2, 3, 4])
    statistics = _Statistics(schedule, 3, 1.0, 0.1)
    held = []
    for scale in keys_of_a_generation(statistics, schedule, 3, "cpu"):
        tokens = [keys.shape[2] for keys in statistics._last_keys.values()]
        held.append((scale, sum(tokens)))
    assert [count for scale, count in held if scale == 3] == [18, 9, 0]


def test_h09_calibration_waits_for_the_device(monkeypatch):
    """Tensors without numbers would refuse to be read before the end."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # not for meta
    schedule = ScaleSchedule.of([1, 2, 3, 4])
    statistics = _Statistics(schedule, 2, 1.0, 0.1)
    list(keys_of_a_generation(statistics, schedule, 2, "meta"))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        statistics.profile("none", 1)


def test_h11_a_function_hides_the_module_of_its_name():
    module = importlib.import_module("kvruntime.planning")
    assert inspect.ismodule(module) and kvruntime.planning is module
    assert inspect.isfunction(kvruntime.plan) and kvruntime.plan is module.plan
    for name in kvruntime.__all__:
        assert importlib.util.find_spec(f"kvruntime.{name}") is None


@pytest.mark.parametrize("name", ["infinity-2b", "infinity-8b"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_h14_a_cache_runs_the_published_roles(name, dtype):
    model = find_model(name).with_dtypes(dtype, dtype)
    options = CacheOptions(budget=650)
    cache = PagedKVCache(model.geometry, model.schedule, options, softmax_scale=1.0)
    planned, preset = kvruntime.plan(name, 1, "scalekv", 650), load_preset(name)
    assert cache.facts["profile"] == f"published preset of {name}"
    assert (cache.plan(2).tokens == planned.tokens).all()
    for reader in range(preset.first_scale, len(model.schedule)):
        tokens = cache.plan(2).tokens[reader - 1, :, 0]
        drafter, refiner = preset.budgets[reader - preset.first_scale]
        drafters = list(preset.drafters[reader - preset.first_scale])
        wanted = np.full(model.geometry.layers, refiner)
        wanted[drafters] = drafter
        assert (tokens <= wanted).all() and (np.delete(tokens, drafters) == refiner).all()


def test_h14_attach_runs_the_published_roles():
    """A model of Infinity-2B's geometry and schedule, without its weights."""
    known = find_model("infinity-2b")
    sides = [size[0] for size in known.schedule.sizes]
    with torch.device("meta"):
        model = VAR(depth=32, heads=16, dim=128, sides=sides)
    with kvruntime.attach(model, "scalekv", 650) as attached:
        assert attached.stats.profile == "published preset of infinity-2b"
        ours = attached.plan(1)
    assert (ours.tokens == kvruntime.plan("infinity-2b", 1, "scalekv", 650).tokens).all()
    assert len({*ours.tokens[-2, :, 0].tolist()}) > 1


def test_h14_another_schedule_is_not_the_published_one():
    known = find_model("infinity-2b")
    schedule = ScaleSchedule(known.schedule.sizes[:-1])
    cache = PagedKVCache(known.geometry, schedule, CacheOptions(budget=650), softmax_scale=1.0)
    other = CacheGeometry(31, 16, 128, "bfloat16", "bfloat16")
    fewer = PagedKVCache(other, known.schedule, CacheOptions(budget=650), softmax_scale=1.0)
    assert fewer.facts["profile"] == "none: all layers alike"
    assert cache.facts["profile"] == "published preset of infinity-2b, made for another schedule"


ONE_CHUNK = """
import sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(2)
from tests.hazards.test_planning import check_one_chunk
check_one_chunk()
"""


def check_one_chunk():
    """Attention of one head, in one chunk of several rows, against torch.cat."""
    schedule = ScaleSchedule.of([1, 2, 4, 7, 11])
    for dim in (64, 96):
        for rows in (2, 5):
            geometry = CacheGeometry(1, 1, dim, "float32", "float32")
            cache = PagedKVCache(geometry, schedule, CacheOptions("full"), softmax_scale=0.1)
            assert cache.plan(rows).chunk_rows == rows
            keys = values = torch.empty(rows, 1, 0, dim)
            with cache.open(rows) as generation:
                for tokens in schedule.tokens:
                    q, k, v = torch.randn(3, rows, tokens, 1, dim)
                    keys = torch.cat((keys, k.transpose(1, 2)), 2)
                    values = torch.cat((values, v.transpose(1, 2)), 2)
                    wanted = F.scaled_dot_product_attention(
                        q.transpose(1, 2), keys, values, scale=0.1
                    )
                    assert torch.equal(generation.attend(0, q, k, v), wanted.transpose(1, 2))


def test_h21_one_chunk_computes_what_the_models_own_cache_computes():
    """With two threads as well. Several chunks need not: torch then picks other blocks for some
    shapes of one head, which the docs say.
    """
    root = str(importlib.import_module("tests").__path__[0]).removesuffix("/tests")
    done = subprocess.run(
        [sys.executable, "-c", ONE_CHUNK.format(root=root)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
