"""What people, logs, traces and Prometheus are told."""

import json
import logging
from collections import Counter
from itertools import pairwise

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import kvruntime
from kvruntime import Admission, PagedKVCache, Pool
from kvruntime.reference import load_model
from kvruntime.telemetry import Collector, HostMemory
from kvruntime.tracing import PHASES, PREFIX
from policies import ScaleKV
from tests.unit.test_rows import GEOMETRY, SCHEDULE, cache_of, draw, steps


def pool_for(cache, generations=1):
    pages = generations * cache.plan(2).peak_pages
    return Pool(num_pages=pages, page_bytes=cache.page_bytes, plane_bytes=cache.plane_bytes)


def on(cache, pool=None, admission=None):
    shared = {"softmax_scale": 0.25, "pool": pool, "admission": admission}
    return PagedKVCache(GEOMETRY, SCHEDULE, cache.options, **shared)


def test_a_snapshot_of_a_pool_and_who_draws_in_it():
    plain = cache_of()
    pool = pool_for(plain, 2)
    cache = on(plain, pool)
    assert kvruntime.snapshot(pool).generations == ()
    with cache.open(2) as first, cache.open(1) as second:
        draw(first, SCHEDULE, [0, 1])
        now = kvruntime.snapshot(pool)
        assert now.pool == pool.stats and now.admission is None
        by_rows = {stats.rows: stats for stats in now.generations}
        assert by_rows == {2: first.stats, 1: second.stats}
        assert sum(stats.live_pages for stats in now.generations) == now.pool.live_pages > 0
    assert isinstance(now.host, HostMemory) and now.host.resident_bytes > 2**20
    assert now.device == "cpu" and now.torch is None and now.driver is None
    told = json.loads(json.dumps(now.as_dict()))
    assert (
        told["generations"][0]["policy"] == "full" and told["pool"]["num_pages"] == pool.num_pages
    )
    with pytest.raises(ValueError, match="of a Pool or an Admission, got 3"):
        kvruntime.snapshot(3)


def test_prometheus_reads_what_the_snapshot_says():
    plain = cache_of()
    admission = Admission(pool_for(plain))
    cache, registry = on(plain, admission=admission), CollectorRegistry()
    registry.register(Collector(admission))
    with cache.open(2) as generation:
        draw(generation, SCHEDULE, [0])
        now = kvruntime.snapshot(admission)
        families = text_string_to_metric_families(generate_latest(registry).decode())
        read = {family.name: family.samples[0].value for family in families}
    assert now.admission == admission.stats or now.admission.underway == 1
    for name, value in {
        "pool_pages": now.pool.num_pages,
        "pool_live_pages": now.pool.live_pages,
        "pool_free_pages": now.pool.free_pages,
        "pool_reserved_pages": now.pool.reserved_pages,
        "pool_peak_pages": now.pool.peak_pages,
        "pool_bytes": now.pool.pool_bytes,
        "admission_held_pages": now.admission.held_pages,
        "admission_underway": 1,
        "admission_running": 1,
        "admission_queued": 0,
        "generations": 1,
    }.items():
        assert read[f"kvruntime_{name}"] == value, name
    assert read["kvruntime_host_resident_bytes"] > 2**20
    assert not any("torch" in name or "driver" in name for name in read), "on a CPU there are none"
    bare = CollectorRegistry()
    bare.register(Collector(admission.pool))
    assert b"admission" not in generate_latest(bare)


def test_one_line_at_open_and_none_per_step(caplog):
    cache = cache_of(ScaleKV(grid=1), 25, kv_dtype="int8", page_size=8)
    with caplog.at_level(logging.DEBUG, logger="kvruntime"):
        with cache.open(2) as generation:
            draw(generation, SCHEDULE, range(5))
    (record,) = caplog.records
    plan = cache.plan(2)
    said = record.getMessage()
    assert record.levelno == logging.INFO and "\n" not in said
    for part in (
        "opened: scalekv, 25 of 30 tokens, int8 from scale",
        "2 rows, 2 layers of 2 heads of 16 float32, 5 scales",
        f"{plan.peak_pages} pages of {plan.page_size} tokens, {plan.page_bytes / 1024:.3g} KiB",
        f"in a pool of {plan.peak_pages} on cpu",
        "back end torch-sdpa: auto: the device is cpu",
    ):
        assert part in said
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="kvruntime"):
        cache.open(2).close()
    assert not caplog.records


def test_a_trace_shows_the_phases_of_every_step(tmp_path):
    """As Perfetto reads it: whole events, in order, five a step where the policy chooses."""
    cache = cache_of(ScaleKV(grid=1), 17)
    with torch.profiler.profile() as profiler, cache.open(2) as generation:
        draw(generation, SCHEDULE, range(5))
    trace = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [
        event
        for event in json.loads(trace.read_text())["traceEvents"]
        if event.get("name", "").startswith(PREFIX) and event.get("ph") == "X"
    ]
    counted = Counter(event["name"].removeprefix(PREFIX) for event in events)
    number = len(SCHEDULE) * GEOMETRY.layers
    asked = sum(
        cache.plan(2).shape(scale, layer, 2).asks_policy
        for scale in range(len(SCHEDULE))
        for layer in range(GEOMETRY.layers)
    )
    assert 0 < asked < number
    every = dict.fromkeys(PHASES, number)
    assert counted == every | {"select": asked}
    events.sort(key=lambda event: event["ts"])
    for before, after in pairwise(events):
        assert before["ts"] + before["dur"] <= after["ts"] + 1, "one after the other"
        mine, next_one = (PHASES.index(one["name"].removeprefix(PREFIX)) for one in (before, after))
        assert next_one > mine or (mine, next_one) == (len(PHASES) - 1, 0)


def test_without_a_profiler_no_range_is_opened(monkeypatch):
    def fail(*arguments):
        raise AssertionError("a range")

    monkeypatch.setattr(torch.autograd.profiler, "record_function", fail)
    with cache_of().open(2) as generation:
        generation.attend(0, *steps(SCHEDULE, 2, 0, 0))


def test_the_log_of_an_attached_model(caplog):
    model = load_model()
    with caplog.at_level(logging.INFO, logger="kvruntime"):
        with kvruntime.attach(model, "centroid", "2%", kv_dtype="int4"):
            model.generate(torch.tensor([3]))
            model.generate(torch.tensor([3]))
    assert [record.getMessage().startswith("opened: centroid") for record in caplog.records] == [
        True,
        True,
    ]
