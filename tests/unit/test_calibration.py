"""Calibration against whole attention matrices, which it never forms itself."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import kvruntime.calibration
from benchmarks.memory import peak_allocated_bytes
from kvruntime import PagedKVCache
from kvruntime.calibration import calibrate
from kvruntime.fold_errors import FoldMeasurement
from kvruntime.reference.tokenizer import PATCH_SIDES
from kvruntime.reference.transformer import SelfAttention
from policies import ScaleSchedule
from tests.look_alikes.described import PAINTER
from tests.look_alikes.painter import SIDES, Painter

LABELS = torch.tensor([0, 1])


def captured_steps(model, monkeypatch):
    """Queries and keys of every step, [scale][layer], from the model's own cache."""
    steps = [[] for _ in PATCH_SIDES]
    forward = SelfAttention.forward

    def record(self, x):
        out = forward(self, x)
        q, _, _ = self.project(x)
        steps[PATCH_SIDES.index(int(x.shape[1] ** 0.5))].append((q, self.cached_k.clone()))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(SelfAttention, "forward", record)
        model.generate(LABELS)
    return steps


@pytest.mark.parametrize("block_numbers", [2**23, 50_000])
def test_statistics(tiny_model, monkeypatch, block_numbers):
    monkeypatch.setattr(kvruntime.calibration, "_BLOCK_NUMBERS", block_numbers)
    profile = calibrate(tiny_model, lambda: tiny_model.generate(LABELS), 2, "tiny", top_share=0.2)
    assert profile.layers == 2 and profile.pictures == 2 and profile.model == "tiny"
    assert profile.selectivity[0] == profile.similarity[0] == (0.0, 0.0)
    last = {}
    for scale, layers in enumerate(captured_steps(tiny_model, monkeypatch)):
        for layer, (q, keys) in enumerate(layers):
            fresh = q.shape[1]
            cached = keys.shape[2] - fresh
            if scale:
                weights = (q.transpose(1, 2) @ keys.transpose(2, 3)).softmax(-1)
                current = weights[..., cached:].sum(-1).mean()
                history = weights[..., :cached]
                best = -(-cached // 5)  # ceil(0.2 * cached)
                top = history.topk(best).values.sum(-1).mean() / history.sum(-1).mean()
                assert profile.selectivity[scale][layer] == pytest.approx(
                    float(current * top), abs=1e-5
                )
                assert profile.cached_mass[scale][layer] == pytest.approx(
                    float(1 - current), abs=1e-5
                )
                side, old = PATCH_SIDES[scale], PATCH_SIDES[scale - 1]
                grid = last[layer].permute(0, 1, 3, 2).reshape(4, 32, old, old)
                resized = F.interpolate(grid, (side, side), mode="bilinear").flatten(2)
                now = keys[:, :, cached:].permute(0, 1, 3, 2).reshape(4, 2, 16, -1)
                distance = (resized.view(4, 2, 16, -1) - now).norm(dim=2).mean()
                assert profile.similarity[scale][layer] == pytest.approx(-float(distance), abs=1e-5)
            last[layer] = keys[:, :, cached:]


@pytest.mark.parametrize("block_numbers", [2**23, 50_000])
def test_statistics_of_heads(tiny_model, monkeypatch, block_numbers):
    """Mass by source scale, variance of what a key gets at the last scale, mean queries."""
    monkeypatch.setattr(kvruntime.calibration, "_BLOCK_NUMBERS", block_numbers)
    profile = calibrate(tiny_model, lambda: tiny_model.generate(LABELS), 2, "tiny")
    mass, variance = profile.per_head("test")
    queries = torch.tensor(profile.query_means)
    starts = [0, *itertools.accumulate(side * side for side in PATCH_SIDES)]
    for scale, layers in enumerate(captured_steps(tiny_model, monkeypatch)):
        for layer, (q, keys) in enumerate(layers):
            weights = (q.transpose(1, 2) @ keys.transpose(2, 3)).softmax(-1)
            for source in range(scale + 1):
                part = weights[..., starts[source] : starts[source + 1]].sum(-1).mean((0, 2))
                assert mass[scale, source, layer] == pytest.approx(part.tolist(), abs=1e-5)
            assert not mass[scale, scale + 1 :].any()
            assert (queries[scale, layer] - q.mean((0, 1))).abs().max() < 1e-5
            if scale + 1 == len(PATCH_SIDES):
                spread = weights.double().var(2, correction=0).sum(-1).mean(0)
                assert variance[layer] == pytest.approx(spread.tolist(), abs=2e-6)


def test_two_generations_are_averaged(tiny_model):
    def draw(*labels):
        for label in labels:
            tiny_model.generate(torch.tensor([label]), seed=label)

    one = calibrate(tiny_model, lambda: draw(0), 1, "tiny")
    two = calibrate(tiny_model, lambda: draw(1), 1, "tiny")
    both = calibrate(tiny_model, lambda: draw(0, 1), 2, "tiny")
    mean = (one.cached_mass[5][1] + two.cached_mass[5][1]) / 2
    assert both.cached_mass[5][1] == pytest.approx(mean, abs=2e-6)


def test_row_chunks_do_not_change_the_profile(tiny_model, monkeypatch):
    def profile():
        labels = torch.tensor([0, 1, 2])
        return calibrate(tiny_model, lambda: tiny_model.generate(labels), 3, "tiny")

    whole = profile()
    chunks = []

    def cache(geometry, schedule, options, **others):
        plan = PagedKVCache(geometry, schedule, options, **others).plan(6)
        limit = plan.for_rows(4).workspace_bytes  # four rows, then two
        limited = PagedKVCache(geometry, schedule, replace(options, workspace=limit), **others)
        chunks.append(limited.plan(6).chunk_rows)
        return limited

    monkeypatch.setattr("kvruntime.adapters.caches.PagedKVCache", cache)
    chunked = profile()
    assert chunks and all(1 < rows < 6 for rows in chunks), "several chunks"
    for name in ("selectivity", "similarity", "cached_mass"):
        for ours, theirs in zip(getattr(chunked, name), getattr(whole, name), strict=True):
            assert ours == pytest.approx(theirs, abs=2e-6)


def test_refusals(tiny_model):
    with pytest.raises(ValueError, match="did not run the model's sampler"):
        calibrate(tiny_model, lambda: None, 1, "tiny")
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="top_share must be in"):
            calibrate(tiny_model, lambda: None, 1, "tiny", top_share=share)


def test_memory_is_bounded_as_stated(tiny_model, monkeypatch):
    """Beside the whole cache: one scale's keys of all layers, float32 copies of one layer's, 14
    bytes for each weight that is held at a time, and what folding takes.
    """
    block = 20_000
    monkeypatch.setattr(kvruntime.calibration, "_BLOCK_NUMBERS", block)

    def draw():
        tiny_model.generate(LABELS)

    def on_the_whole_cache():
        with kvruntime.attach(tiny_model, "full", 1.0):
            draw()

    whole = peak_allocated_bytes(on_the_whole_cache)
    measured = peak_allocated_bytes(lambda: calibrate(tiny_model, draw, 2, "tiny"))
    keys = 4 * 2 * 16 * 4 * 256  # rows, heads, head_dim, bytes, tokens of the last scale
    schedule = ScaleSchedule.of(PATCH_SIDES)
    folds = FoldMeasurement(schedule, 2, 1.0, torch.zeros(4, 1, 2, 16))
    plans = [cache.plan(4) for cache in folds._caches]
    pages = sum(plan.page_bytes for plan in plans)
    assert pages <= 0.5 * plans[0].baseline_bytes()["history_bytes"]
    outputs = 5 * keys  # ours, the whole one and their difference in float64
    at_once = max(14 * max(block, 4 * 2 * 680), plans[-1].workspace_bytes + outputs)
    assert measured - whole <= 2 * keys + 4 * keys + pages + at_once + 2**16


def test_a_profile_is_of_one_schedule():
    painter = Painter()
    text = torch.zeros(1, 2, 8)

    def draw():
        painter(text)
        painter(text, scales=3)

    with pytest.raises(ValueError, match="drew in two schedules"):
        calibrate(painter, draw, 1, "painter", PAINTER)
    two = torch.zeros(2, 2, 8)  # of whose four rows two go at scale 2
    profile = calibrate(painter, lambda: painter(two, guided=2), 2, "painter", PAINTER)
    assert profile.sizes == tuple((side, side) for side in SIDES) and profile.layers == 2
    with kvruntime.attach(painter, "scalekv", 20, embedding=PAINTER, profile=profile) as attached:
        painter(text)
    assert attached.stats.profile == "given"
