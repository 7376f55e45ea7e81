"""FoundationVision/VAR d16 from its own repository, random weights, unmodified.

    KVRUNTIME_VAR=/path/to/VAR python -m pytest tests/integration -s

wants a checkout. Upstream's first weights hide attention (adaLN gammas of 1e-5, a near-zero head),
so larger ones are drawn. CI skips this, and says so.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import pytest
import torch

import kvruntime
from kvruntime.calibration import calibrate
from kvruntime.models import build
from tests.support import every_attribute

CHECKOUT = os.environ.get("KVRUNTIME_VAR", "")
pytestmark = [
    pytest.mark.skipif(
        not CHECKOUT, reason="NOT RUN: set KVRUNTIME_VAR to a checkout of FoundationVision/VAR"
    ),
    pytest.mark.filterwarnings("default"),
]
PICTURES, SEED = 1, 7


@pytest.fixture(scope="module")
def var():
    """With xformers installed and a stand-in for flash-attn, which raises when it is called."""
    torch.manual_seed(0)
    model = build("var-d16", CHECKOUT, stand_ins=True).model
    assert sys.modules["models.basic_var"].memory_efficient_attention is not None
    assert sys.modules["models.basic_var"].flash_attn_func is not None
    return model


def own_attention(model):
    """Without a GPU, upstream's xformers path dies; its own slow path is the reference."""
    for block in model.blocks:
        block.attn.using_xform = block.attn.using_flash = False


def draw(model, seed=SEED):
    return model.autoregressive_infer_cfg(
        B=PICTURES, label_B=207, g_seed=seed, cfg=4.0, top_k=900, top_p=0.95
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_full_is_bit_identical_and_detach_restores(var, autocast):
    """In float32, and as upstream's demo runs it, under autocast (K float32, V bfloat16)."""
    own_attention(var)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own = draw(var)
        for block in var.blocks:  # attach() must not depend on what upstream found
            block.attn.using_xform = block.attn.using_flash = True
        before = every_attribute(var)
        for _ in range(2):
            with kvruntime.attach(var, "full", 1.0) as attached:
                assert torch.equal(draw(var), own)
                assert torch.equal(draw(var), own)
                stats = attached.stats
                assert stats.planned_pages == stats.peak_pages > 0 == stats.live_pages
            assert every_attribute(var) == before
        own_attention(var)
        parity = kvruntime.check(var, lambda: draw(var))
        assert (parity.steps, parity.max_error) == (160, 0.0)
        assert torch.equal(draw(var), own)


def test_negative_control_a_wrong_cache_changes_the_picture(var, monkeypatch):
    own_attention(var)
    own = draw(var)
    write = kvruntime.step.shift.write
    monkeypatch.setattr(
        kvruntime.step.shift, "write", lambda pages, slots, new: write(pages, slots, -new)
    )
    with kvruntime.attach(var, "full", 1.0):
        wrong = draw(var)
    psnr = float(-10 * (wrong - own).square().mean().log10())
    print(f"\nvalues of the wrong sign in the cache: {psnr:.1f} dB from the right picture")
    assert psnr < 35


def test_scalekv_at_a_tenth(var, tmp_path):
    own_attention(var)
    own = draw(var)
    profile = calibrate(var, lambda: draw(var, 1), PICTURES, "var-d16")
    profile.save(tmp_path / "var-d16.json")
    for given in (None, tmp_path / "var-d16.json"):
        with kvruntime.attach(var, policy="scalekv", budget=0.10, profile=given) as attached:
            first = draw(var)
            assert torch.equal(draw(var), first)
        stats = attached.stats
        assert stats.planned_pages == stats.peak_pages and stats.live_pages == 0
        assert stats.token_bytes <= 0.1 * stats.baseline_bytes * 424 / 680
        psnr = float(-10 * (first - own).square().mean().log10())
        print(
            f"\nscalekv 10 %, profile {stats.profile}: {psnr:.1f} dB, "
            f"{stats.token_bytes / 2**20:.1f} of {stats.baseline_bytes / 2**20:.1f} MiB"
        )
    assert torch.equal(draw(var), own)


@pytest.mark.parametrize(
    ("policy", "kv_dtype", "share"), [("full", "int8", 0.266), ("full", "int4", 0.141)]
)
def test_quantised_pages(var, policy, kv_dtype, share):
    """Of float32: (64 x bits / 8 + 4) / 256 bytes."""
    own_attention(var)
    own = draw(var)
    before = every_attribute(var)
    with kvruntime.attach(var, policy, 1.0, kv_dtype=kv_dtype) as attached:
        first = draw(var)
        assert torch.equal(draw(var), first)
    stats = attached.stats
    assert every_attribute(var) == before
    assert stats.planned_pages == stats.peak_pages and stats.live_pages == 0
    history = stats.baseline_bytes * 424 / 680
    assert stats.token_bytes == pytest.approx(share * history, rel=1e-2)
    psnr = float(-10 * (first - own).square().mean().log10())
    print(f"\n{policy} {kv_dtype} from scale {stats.kv_start}: {psnr:.1f} dB")


def test_centroids_in_two_percent_of_the_bytes(var):
    own_attention(var)
    own = draw(var)
    before = every_attribute(var)
    with kvruntime.attach(var, "centroid", "2%", kv_dtype="int4") as attached:
        first = draw(var)
        assert torch.equal(draw(var), first)
    stats = attached.stats
    assert every_attribute(var) == before
    assert stats.planned_pages == stats.peak_pages and stats.live_pages == 0
    assert 0 < stats.page_bytes <= 0.02 * stats.history_bytes
    psnr = float(-10 * (first - own).square().mean().log10())
    print(f"\ncentroid int4 2 %: {psnr:.1f} dB, {stats.budget_tokens} tokens of a lane")


class Broken(Exception):
    pass


def test_a_generation_that_raises_leaks_nothing(var):
    own_attention(var)
    own = draw(var)
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Broken

    with kvruntime.attach(var, "full", 1.0) as attached:
        hook = var.blocks[3].ffn.register_forward_hook(fail)
        with pytest.raises(Broken):
            draw(var)
        hook.remove()
        assert attached.stats.live_pages == 0
        assert torch.equal(draw(var), own)


def seconds(var):
    began = time.perf_counter()
    draw(var)
    return time.perf_counter() - began


def test_time_of_a_whole_picture(var):
    """Interleaved rounds; attaching counts, but not the first time. Median ratios count."""
    own_attention(var)
    policies = {"full": 1.0, "scalekv": 0.10}
    ratios = {policy: [] for policy in policies}
    for policy, budget in policies.items():
        with kvruntime.attach(var, policy, budget):
            draw(var)
    for _ in range(7):
        own = seconds(var)
        for policy, budget in policies.items():
            began = time.perf_counter()
            with kvruntime.attach(var, policy, budget):
                draw(var)
            ratios[policy].append((time.perf_counter() - began) / own)
    for policy, found in ratios.items():
        median = statistics.median(found)
        print(f"\n{policy} / own time: median {median:.3f}, {min(found):.3f} to {max(found):.3f}")
        assert median <= 1.05
