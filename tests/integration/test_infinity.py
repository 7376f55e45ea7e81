"""FoundationVision/Infinity from its own repository, 12 layers of 125M, random weights, unmodified.

    KVRUNTIME_INFINITY=/path/to/Infinity python -m pytest tests/integration/test_infinity.py -s

wants a checkout (its folders infinity/ and tools/ are enough) and what its code imports beyond what
has stand-ins: einops, pytz, tqdm. CI skips this, and says so.
"""

from __future__ import annotations

import os

import pytest
import torch

import kvruntime
from kvruntime.calibration import calibrate
from kvruntime.catalogue import infinity_schedule
from kvruntime.models import build
from tests.support import every_attribute

CHECKOUT = os.environ.get("KVRUNTIME_INFINITY", "")
pytestmark = [
    pytest.mark.skipif(
        not CHECKOUT,
        reason="NOT RUN: set KVRUNTIME_INFINITY to a checkout of FoundationVision/Infinity",
    ),
    pytest.mark.filterwarnings("default"),
]
SCHEDULES = {
    "0.06M": infinity_schedule("0.06M"),
    "0.06M 1.5": infinity_schedule("0.06M", "1.500"),
    "0.25M": infinity_schedule("0.25M"),
}
POLICIES = {
    "scalekv": ("scalekv", 0.10, {}),
    "ams_kv": ("ams_kv", 0.10, {}),
    "centroid int4": ("centroid", "4%", {"kv_dtype": "int4"}),
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def infinity(request):
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its norms are compiled; not needed here
    torch.manual_seed(0)
    built = build("infinity-125m", CHECKOUT, dtype=request.param, stand_ins=True)
    built.vae.decode = lambda codes: codes.new_zeros(codes.shape[0], 3, 1, 1)  # the slow part
    return built


@pytest.fixture
def draw(infinity, monkeypatch):
    """Draws a picture's bit codes, those of every scale."""
    codes, quantizer = [], infinity.vae.quantizer.lfq
    look_up = quantizer.indices_to_codes

    def note(bits, *args, **kwargs):
        codes.append(bits.clone())
        return look_up(bits, *args, **kwargs)

    monkeypatch.setattr(quantizer, "indices_to_codes", note)

    def draw(schedule, seed=7, **settings):
        codes.clear()
        infinity.draw(1, seed, schedule=schedule, **settings)
        return list(codes)

    return draw


def attributes(built):
    blocks = {id(block): every_attribute(block) for block in built.model.unregistered_blocks}
    return blocks, every_attribute(built.model)


def same(ours, own):
    assert len(ours) == len(own)
    return all(torch.equal(*pair) for pair in zip(ours, own, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_full_gives_the_same_bits_of_every_scale(infinity, draw, name):
    schedule = SCHEDULES[name]
    own, before = draw(schedule), attributes(infinity)
    for _ in range(2):
        with kvruntime.attach(infinity.model, "full", 1.0) as attached:
            assert same(draw(schedule), own)
            assert same(draw(schedule), own)
            stats = attached.stats
            assert stats.planned_pages == stats.peak_pages > 0 == stats.live_pages
        assert attributes(infinity) == before
    assert same(draw(schedule), own)
    is_cast = next(infinity.model.unregistered_blocks[0].parameters()).dtype != torch.float32
    numbers = 2 * 12 * 8 * 96 * schedule.total
    assert stats.baseline_bytes == numbers * (4 + 2 if is_cast else 8)  # K stays in float32
    parity = kvruntime.check(infinity.model, lambda: draw(schedule))
    assert parity.max_error == 0.0 and parity.steps == 12 * len(schedule)


@pytest.mark.parametrize("settings", ["no guidance", "guidance inside", "two pictures"])
def test_full_gives_the_same_bits_in_other_settings(infinity, draw, settings):
    schedule = SCHEDULES["0.06M 1.5"]
    chosen = {
        "no guidance": {"cfg_list": [1.0] * len(schedule)},
        "guidance inside": {"cfg_insertion_layer": [-5]},
        "two pictures": {},
    }[settings]

    def codes():
        if settings != "two pictures":
            return draw(schedule, **chosen)
        draw(schedule)
        infinity.draw(2, 3, schedule=schedule)
        return draw(schedule)

    own = codes()
    with kvruntime.attach(infinity.model, "full", 1.0) as attached:
        assert same(codes(), own)
    assert attached.stats.rows == (1 if settings == "no guidance" else 2)
    assert attached.stats.planned_pages == attached.stats.peak_pages


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_draw_twice_and_are_undone(infinity, draw, policy, name):
    schedule, (kind, budget, options) = SCHEDULES[name], POLICIES[policy]
    own, before = draw(schedule), attributes(infinity)
    with kvruntime.attach(infinity.model, kind, budget, **options) as attached:
        first = draw(schedule)
        assert same(draw(schedule), first)
        stats = attached.stats
    assert stats.planned_pages == stats.peak_pages > 0 == stats.live_pages
    assert stats.page_bytes < 0.2 * stats.history_bytes
    assert attributes(infinity) == before
    assert same(draw(schedule), own)
    alike = [float((a == b).float().mean()) for a, b in zip(first, own, strict=True)]
    print(f"\n{policy} {name}: bits alike {alike[-1]:.4f} at the last scale")
    assert alike[-1] > 0.95


def test_a_wrong_cache_changes_the_bits(infinity, draw, monkeypatch):
    """Negative control: values of the wrong sign."""
    own = draw(SCHEDULES["0.06M"])
    write = kvruntime.step.shift.write
    monkeypatch.setattr(
        kvruntime.step.shift, "write", lambda pages, slots, new: write(pages, slots, -new)
    )
    with kvruntime.attach(infinity.model, "full", 1.0):
        wrong = draw(SCHEDULES["0.06M"])
    alike = float((wrong[-1] == own[-1]).float().mean())
    print(f"\nvalues of the wrong sign: {alike:.4f} of the last scale's bits alike")
    assert not same(wrong, own)


class Broken(Exception):
    pass


def test_a_run_that_fails_leaks_nothing(infinity, draw):
    schedule = SCHEDULES["0.06M"]
    own, before, calls = draw(schedule), attributes(infinity), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 4:
            raise Broken

    with kvruntime.attach(infinity.model, "full", 1.0) as attached:
        hook = infinity.model.unregistered_blocks[5].ffn.register_forward_hook(fail)
        with pytest.raises(Broken):
            draw(schedule)
        hook.remove()
        assert attached.stats.live_pages == 0 < attached.stats.peak_pages
        assert same(draw(schedule), own)
        assert same(draw(schedule, trunk_scale=3), own[:3])
        assert attached.stats.live_pages == 0
    assert attributes(infinity) == before


def test_calibrated_roles(infinity, draw, tmp_path):
    schedule = SCHEDULES["0.06M"]
    profile = calibrate(infinity.model, lambda: draw(schedule, seed=1), 1, "infinity-125m")
    profile.save(tmp_path / "profile.json")
    with kvruntime.attach(
        infinity.model, "scalekv", 0.10, profile=tmp_path / "profile.json", check=True
    ) as attached:
        draw(schedule)
    assert attached.stats.profile == "given"
    assert attached.stats.planned_pages == attached.stats.peak_pages
