"""attach(): P1 on a whole model, P6 no leak, P10 undo, and what it refuses."""

import gc
import weakref

import pytest
import torch
from torch import nn

import kvruntime
from kvruntime import UnsupportedModel, WillNeverFit
from kvruntime.catalogue import VAR_256
from kvruntime.step import shift
from policies import ScaleKV, ScaleSchedule
from tests.profiles import profile_of
from tests.support import PLAIN_POLICIES, every_attribute

LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_draws_the_same_pictures(tiny_model, dtype):
    model = tiny_model.to(dtype)
    own = model.generate(LABELS, seed=3)
    with kvruntime.attach(model, "full", 1.0) as attached:
        ours = model.generate(LABELS, seed=3)
    assert torch.equal(ours, own)
    stats = attached.stats
    assert stats.planned_pages == stats.peak_pages > 0 and stats.live_pages == 0


def test_negative_control_a_wrong_cache_changes_the_picture(tiny_model, monkeypatch):
    own = tiny_model.generate(LABELS, seed=3)
    write = shift.write
    monkeypatch.setattr(shift, "write", lambda pages, slots, new: write(pages, slots, -new))
    with kvruntime.attach(tiny_model, "full", 1.0):
        assert not torch.equal(tiny_model.generate(LABELS, seed=3), own)


@pytest.mark.parametrize("policy", PLAIN_POLICIES)
def test_every_policy_twice_in_a_row_and_undone(tiny_model, policy):
    own = tiny_model.generate(LABELS, seed=1)
    before = every_attribute(tiny_model)
    with kvruntime.attach(tiny_model, policy, 0.10) as attached:
        assert every_attribute(tiny_model) != before
        first = tiny_model.generate(LABELS, seed=1)
        assert attached.stats.live_pages == 0
        assert torch.equal(tiny_model.generate(LABELS, seed=1), first)
        tiny_model.generate(LABELS[:1], seed=1)
        assert attached.stats.rows == 2
    assert every_attribute(tiny_model) == before
    with kvruntime.attach(tiny_model, policy, 0.10):
        assert torch.equal(tiny_model.generate(LABELS, seed=1), first)
    assert torch.equal(tiny_model.generate(LABELS, seed=1), own)
    assert all(block.attention.cached_k is None for block in tiny_model.blocks)


class Broken(Exception):
    pass


@pytest.mark.parametrize("place", ["feed_forward", "qkv", "head"])
@pytest.mark.parametrize("after", [0, 7])
def test_a_generation_that_raises_leaks_nothing(tiny_model, place, after):
    block = tiny_model.blocks[1]
    module = {
        "feed_forward": block.feed_forward,
        "qkv": block.attention.qkv,
        "head": tiny_model.head,
    }[place]
    before = every_attribute(tiny_model)
    own = tiny_model.generate(LABELS, seed=1)
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise Broken

    with kvruntime.attach(tiny_model, "full", 1.0) as attached:
        hook = module.register_forward_hook(fail)
        with pytest.raises(Broken):
            tiny_model.generate(LABELS, seed=1)
        assert attached.stats.live_pages == 0
        assert torch.equal(tiny_model.generate(LABELS, seed=1), own)
        hook.remove()
        calls = 0
        hook = module.register_forward_hook(fail)
        with pytest.raises(Broken):
            tiny_model.generate(LABELS, seed=1)
    hook.remove()
    assert attached.stats.live_pages == 0
    assert torch.equal(tiny_model.generate(LABELS, seed=1), own)
    assert every_attribute(tiny_model) == before


def test_a_generation_abandoned_by_a_hand_written_sampler_is_closed_by_the_next(tiny_model):
    """Somebody's own loop calls the blocks and dies; nobody tells us but the next start."""
    with kvruntime.attach(tiny_model, "full", 1.0) as attached:
        attention = tiny_model.blocks[0].attention
        for block in tiny_model.blocks:
            block.attention.use_cache(True)
        attention(torch.randn(2, 1, 32))
        assert attached.stats.live_pages > 0
        attention.use_cache(True)
        assert attached.stats.live_pages == 0


def test_inference_mode_then_plain_then_gradients(tiny_model):
    """One pool serves them all, and no generation is kept alive by autograd."""
    own = tiny_model.generate(LABELS, seed=1)
    with kvruntime.attach(tiny_model, "full", 1.0) as attached:
        with torch.inference_mode():
            assert torch.equal(tiny_model.generate(LABELS, seed=1), own)
        assert torch.equal(tiny_model.generate(LABELS, seed=1), own)
        attention = tiny_model.blocks[0].attention
        attention.use_cache(True)
        with torch.enable_grad():
            attention(torch.randn(4, 1, 32, requires_grad=True))
        pool, workspaces = (
            attached._outside.generation._runner.pool,
            attached._caches.latest._workspaces,
        )
        tensors = [pool.keys, pool.values, *workspaces.tensors]
        assert len(tensors) == 3 and not any(tensor.requires_grad for tensor in tensors)
        attention.use_cache(False)
        assert torch.equal(tiny_model.generate(LABELS, seed=1), own)


def test_a_model_that_changes_its_number_format_while_attached(tiny_model):
    with kvruntime.attach(tiny_model, "full", 1.0):
        tiny_model.generate(LABELS, seed=1)
        tiny_model.bfloat16()
        ours = tiny_model.generate(LABELS, seed=1)
    assert torch.equal(ours, tiny_model.generate(LABELS, seed=1))


def test_attached_twice_at_once(tiny_model):
    """The inner one serves; both are undone."""
    before = every_attribute(tiny_model)
    own = tiny_model.generate(LABELS, seed=1)
    with kvruntime.attach(tiny_model, "full", 1.0) as outer:
        with kvruntime.attach(tiny_model, "full", 1.0) as inner:
            assert torch.equal(tiny_model.generate(LABELS, seed=1), own)
        assert inner.stats.rows == 4 and outer.stats.rows == 0
        assert torch.equal(tiny_model.generate(LABELS, seed=1), own)
        assert outer.stats.rows == 4
    assert every_attribute(tiny_model) == before


def test_a_sampler_that_leaves_its_cache_on_is_put_back(tiny_model):
    """Upstream VAR switches caching off at the end only, and not when it raises."""
    before = every_attribute(tiny_model)
    with pytest.raises(Broken):
        with kvruntime.attach(tiny_model, "full", 1.0):
            for block in tiny_model.blocks:
                block.attention.use_cache(True)
            raise Broken
    assert every_attribute(tiny_model) == before
    assert not any(block.attention.caching for block in tiny_model.blocks)


def test_the_tensors_go_and_the_stats_stay(tiny_model):
    with kvruntime.attach(tiny_model, "full", 1.0) as attached:
        tiny_model.generate(LABELS)
        stats = attached.stats
        pool = weakref.ref(attached._caches.latest._idle_pools[0])
        memory = weakref.ref(attached._caches.latest._workspaces.tensors[0])
        assert pool() is not None and memory() is not None
    assert attached.stats == stats and stats.peak_pages > 0
    gc.collect()
    assert pool() is None and memory() is None and attached._caches.latest._workspaces.tensors == []


def test_training_goes_the_models_own_way(tiny_model):
    inputs = torch.randn(2, 679, 16)
    wanted = tiny_model(LABELS, inputs)
    with kvruntime.attach(tiny_model, "scalekv", 0.10):
        assert torch.equal(tiny_model(LABELS, inputs), wanted)


def test_a_patch_of_the_users_own_comes_back(tiny_model):
    attention = tiny_model.blocks[0].attention
    mine = attention.forward
    attention.forward = mine
    with kvruntime.attach(tiny_model, "full", 1.0):
        assert attention.forward is not mine
    assert attention.__dict__["forward"] is mine


def test_memory_is_refused_before_anything_is_drawn(tiny_model):
    with kvruntime.attach(tiny_model, "full", 1.0, memory=1000) as attached:
        with pytest.raises(WillNeverFit, match="1000 allowed"):
            tiny_model.generate(LABELS)
        assert attached.stats.live_pages == 0
    tiny_model.generate(LABELS)


@pytest.mark.parametrize("budget", [0.0, -1, float("nan"), 3, 1.5])
def test_bad_budgets_leave_the_model_alone(tiny_model, budget):
    before = every_attribute(tiny_model)
    with pytest.raises(ValueError, match="budget"):
        with kvruntime.attach(tiny_model, "scalekv", budget):
            pass
    assert every_attribute(tiny_model) == before


def test_profiles_are_used_and_must_fit(tiny_model, tmp_path):
    profile = profile_of(VAR_256, 2)
    profile.save(tmp_path / "profile.json")
    for given in (profile, tmp_path / "profile.json", str(tmp_path / "profile.json")):
        with kvruntime.attach(tiny_model, "scalekv", 0.10, profile=given) as attached:
            tiny_model.generate(LABELS)
        assert attached.stats.profile == "given"
        assert attached.stats.planned_pages == attached.stats.peak_pages
    other = profile_of(ScaleSchedule.of([1, 2, 3]), 2)
    with kvruntime.attach(tiny_model, "scalekv", 0.10, profile=other) as attached:
        assert attached.stats.profile == "given, made for another schedule"
    with kvruntime.attach(tiny_model, ScaleKV(), 0.10) as attached:
        assert attached.stats.profile == "the policy object's own"
    with kvruntime.attach(tiny_model) as attached:
        assert attached.stats.profile == "none: all layers alike"
    with pytest.raises(ValueError, match="3 layers, the model 2"):
        with kvruntime.attach(tiny_model, profile=profile_of(VAR_256, 3)):
            pass


def test_unknown_models_are_told_what_is_missing():
    with pytest.raises(UnsupportedModel, match="Linear is not a model that attach") as caught:
        with kvruntime.attach(nn.Linear(2, 2)):
            pass
    missing = caught.value.missing
    assert missing["FoundationVision/VAR"] == [
        "the class var.VAR, it is torch.nn.modules.linear.Linear"
    ]
    assert set(missing) == {
        "FoundationVision/VAR",
        "FoundationVision/Infinity",
        "kvruntime's bundled model",
    }


def test_the_plan_of_an_attachment(tiny_model):
    with kvruntime.attach(tiny_model, "scalekv", 0.10) as attached:
        planned = attached.plan(2).peak_pages
        tiny_model.generate(LABELS)
        assert attached.stats.planned_pages == planned


def test_a_model_saved_inside_the_block_is_the_models_own(tiny_model, tmp_path):
    own = tiny_model.generate(LABELS, seed=1)
    with kvruntime.attach(tiny_model, "streaming_llm", 0.1):
        torch.save(tiny_model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded.generate(LABELS, seed=1), own)
