"""P3: what the runtime allocates is what it planned, measured by the profiler."""

import subprocess
import sys

import pytest
import torch

import kvruntime
from benchmarks.common import even_coding, even_profile, random_steps
from benchmarks.memory import TINY, allocations, measure, peak_allocated_bytes
from benchmarks.ragged import RAGGED
from kvruntime import CacheGeometry, CacheOptions, PagedKVCache
from kvruntime.planning.regions import output_bytes
from kvruntime.planning.workspace import Workspace
from kvruntime.reference import load_model
from policies import POLICY_NAMES, make_policy

pytestmark = pytest.mark.filterwarnings("ignore")  # the profiler's own

EVERY_POLICY = [*POLICY_NAMES, *RAGGED]
FORMATS = [
    ("float32", None),
    ("bfloat16", "int4"),
    ("float16", "int2"),
    ("bfloat16", None),
    ("bfloat16", "coded3"),
]


def by_name(policy):
    return getattr(policy, "name", policy)


def made_for(policy, layers, head_dim):
    """A policy by its name for a model of this size, or the policy itself."""
    if not isinstance(policy, str):
        return policy
    return make_policy(policy, even_profile(TINY.schedule, layers, TINY.heads, head_dim))


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=by_name)
@pytest.mark.parametrize("chunks", [1, TINY.rows])
@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
def test_allocated_is_planned(policy, dtype, kv_dtype, chunks):
    policy = made_for(policy, TINY.layers, TINY.head_dim)
    result = measure(TINY, policy, dtype, kv_dtype, chunks)
    share = result["workspace_bytes"] / result["planned_bytes"]
    assert 0.2 < share < 0.96, "neither part may hide the other"
    assert 0.95 <= result["ratio"] <= 1.0, result


def laid_out(step, layout):
    """q, k, v of the same numbers as other attention code makes them."""
    if layout == "interleaved":  # qkv.view(rows, n, 3, heads, head_dim).unbind(2)
        return torch.stack(tuple(step), dim=2).unbind(2)
    return tuple(part.transpose(1, 2).contiguous().transpose(1, 2) for part in step)


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=by_name)
@pytest.mark.parametrize("kv_dtype", [None, "int4", "coded3"])
@pytest.mark.parametrize(
    ("layout", "head_dim"),
    [
        ("interleaved", 64),
        *(
            pytest.param(*rest, marks=pytest.mark.full)
            for rest in (("plain", 64), ("heads first", 64), ("interleaved", 256))
        ),
    ],
)
def test_no_step_allocates_more_than_it_declares(policy, kv_dtype, layout, head_dim):
    """Beside the workspace, which is there already. Smaller steps than the worst one too."""
    geometry = CacheGeometry(1, TINY.heads, head_dim, "bfloat16", "bfloat16")
    policy = made_for(policy, 1, head_dim)
    options = CacheOptions(
        policy=policy,
        budget=TINY.budget,
        kv_dtype=kv_dtype,
        coding=even_coding(geometry),
        workspace=1,
    )
    cache = PagedKVCache(geometry, TINY.schedule, options, softmax_scale=0.1)
    plan = cache.plan(TINY.rows)
    steps = random_steps(TINY.schedule, TINY.rows, TINY.heads, head_dim, "bfloat16")
    if layout != "plain":
        steps = [laid_out(step, layout) for step in steps]
    with cache.open(TINY.rows) as generation:
        cache._workspaces.give_back(Workspace(plan.scratch_bytes, torch.device("cpu")))
        for scale, step in enumerate(steps):
            shape = plan.shape(scale, 0, plan.chunk_rows)
            declared = plan.regions(shape).torch_bytes + output_bytes(shape, TINY.rows)
            peak = peak_allocated_bytes(lambda step=step: generation.attend(0, *step))
            assert peak <= declared, f"scale {scale}, {shape.kind}"


@pytest.mark.parametrize(
    "policy", ["full", "scalekv", pytest.param("centroid", marks=pytest.mark.full)]
)
def test_pictures_of_the_bundled_model(policy):
    model = load_model(torch.bfloat16)
    labels = torch.arange(2)
    with kvruntime.attach(model, policy, 0.10, kv_dtype="int4") as cache:
        first = peak_allocated_bytes(lambda: model.generate(labels))
        again = peak_allocated_bytes(lambda: model.generate(labels))
        stats = cache.stats
    assert 0.95 <= first / (stats.page_bytes + stats.workspace_bytes) <= 1.0
    assert again <= stats.workspace_bytes, "a second generation makes no pool"


def test_what_is_not_declared_is_seen(monkeypatch):
    """Negative control: a step that keeps a copy of its queries is above the plan."""
    attend = kvruntime.Generation._serve
    kept = []

    def wasteful(self, layer, q, k, v):
        kept.append(q.clone())
        return attend(self, layer, q, k, v)

    monkeypatch.setattr(kvruntime.Generation, "_serve", wasteful)
    assert measure(TINY, make_policy("scalekv"), "float32", None, 1)["ratio"] > 1.02


def test_allocations_are_in_order_and_end():
    """What is made outside of the runtime is not counted; what it gives back is."""
    geometry = CacheGeometry(1, 1, 8, "float32", "float32")
    cache = PagedKVCache(geometry, TINY.schedule, CacheOptions("full"), softmax_scale=1.0)

    def draw():
        outside = torch.empty(2**20)
        with cache.open(1) as generation:
            generation.attend(0, *random_steps(TINY.schedule, 1, 1, 8, "float32")[0])
        cache.let_go()
        del outside

    changes = allocations(draw)
    times = [when for when, _, _ in changes]
    assert times == sorted(times)
    assert max(size for _, size, _ in changes) < 2**20
    assert sum(size for _, size, _ in changes) == 0, "all of it is given back"
    assert peak_allocated_bytes(lambda: torch.empty(2**20)) == 0


def test_the_limits_of_the_process_count_as_memory_that_is_not_free():
    """ulimit -d and -v, in a process that has them."""
    code = (
        "import resource, torch; from kvruntime.storage.memory import free_bytes\n"
        "cpu = torch.device('cpu'); before = free_bytes(cpu); print(before)\n"
        "import psutil; used = psutil.Process().memory_info()\n"
        "limit = used.data + 10**8\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)); print(free_bytes(cpu))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert before > 2 * 10**8 and 0.8 * 10**8 < after <= 10**8, done.stderr
