"""Which attention back end a cache gets, why, and what it is told when it cannot have one."""

import sys

import pytest
import torch

import kvruntime
from kvruntime import BackendUnavailable, PagedKVCache
from policies import CacheGeometry, ScaleSchedule
from tests.support import every_attribute

SCHEDULE = ScaleSchedule.of([1, 2, 3])


def make(dtype="float32", head_dim=32, **options):
    geometry = CacheGeometry(1, 2, head_dim, dtype, dtype)
    return PagedKVCache(geometry, SCHEDULE, "full", 1.0, **options)


def test_auto_on_a_cpu_is_sdpa_and_says_why():
    stats = make().stats
    assert stats.backend == "torch-sdpa"
    assert stats.backend_reason == "auto: the device is cpu, xformers needs cuda"
    assert make(backend="sdpa").stats.backend_reason == "asked for"


def test_auto_on_cuda_falls_back_aloud():
    """Where torch sees no GPU the reason is that; a float32 model's would be its dtype."""
    if torch.cuda.is_available():
        pytest.skip("NOT RUN: there is a GPU")
    stats = make(device="cuda").stats
    assert stats.backend == "torch-sdpa"
    assert stats.backend_reason == "auto: xformers cannot run here: torch sees no CUDA device"
    with pytest.raises(BackendUnavailable, match="torch sees no CUDA device") as caught:
        make(device="cuda", backend="xformers")
    assert caught.value.backend == "xformers"


def test_without_xformers_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvruntime.attention.xformers", None)
    monkeypatch.delattr("kvruntime.attention.xformers", raising=False)
    with pytest.raises(BackendUnavailable, match=r"pip install 'kvruntime\[xformers\]'"):
        make("float16", backend="xformers")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "flash"}, "'flash' is not one of auto, sdpa, xformers"),
        ({"paged_queries": -1}, "got -1"),
        ({"paged_queries": 1.5}, r"got 1\.5"),
        ({"paged_queries": True}, "got True"),
        ({"kv_dtype": "int3"}, "not one of int2, int4, int8"),
        ({"kv_dtype": "int4", "kv_groups": 8}, "take fewer groups"),
        ({"kv_groups": 2}, "goes with a kv_dtype"),
        ({"kv_dtype": "int4", "kv_start": 3}, r"a scale in 0\.\.2, got 3"),
        ({"kv_dtype": "int4", "kv_start": True}, "got True"),
        ({"kv_dtype": "int4", "page_size": 4}, "page_size must be a multiple of 8"),
        ({"kv_start": 0}, "goes with a kv_dtype"),
        ({"kv_dtype": "int4", "page_size": 2048}, "at most 1024 tokens, got 2048"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(tiny_model, options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)
    if "page_size" in options or "kv_start" in options:
        return  # the model's head dimension and schedule are others
    before = every_attribute(tiny_model)
    with pytest.raises(ValueError), kvruntime.attach(tiny_model, "full", 1.0, **options):
        pass
    assert every_attribute(tiny_model) == before


def test_a_default_device_does_not_matter():
    q = torch.zeros(1, 1, 2, 32)
    torch.set_default_device("meta")
    try:
        with make().open(1) as cache:
            assert cache.attend(0, q, q, q).device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_attach_hands_the_options_on(tiny_model):
    labels = torch.arange(2)
    own = tiny_model.generate(labels, seed=1)
    options = {"kv_dtype": "int4", "kv_start": 4, "backend": "sdpa", "page_size": 32}
    with kvruntime.attach(tiny_model, "full", 1.0, **options) as attached:
        drawn = tiny_model.generate(labels, seed=1)
        stats = attached.stats
    assert (stats.kv_dtype, stats.kv_groups, stats.kv_start) == ("int4", 1, 4)
    assert stats.planned_pages == stats.peak_pages > 0 == stats.live_pages
    assert stats.backend_reason == "asked for" and stats.page_steps == 0
    assert stats.gather_steps == 10 * len(tiny_model.blocks)
    assert not torch.equal(drawn, own), "4 bits are not exact"
    late = len(attached._view.schedule) - 1
    with kvruntime.attach(tiny_model, "full", 1.0, kv_dtype="int2", kv_start=late):
        assert torch.equal(tiny_model.generate(labels, seed=1), own), "never handed over"
