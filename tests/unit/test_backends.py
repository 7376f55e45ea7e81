"""Which attention back end a cache gets, why, and what it is told when it cannot have one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvruntime
from kvruntime import BackendUnavailable, CacheOptions, PagedKVCache
from kvruntime.attention import choose_backend
from kvruntime.attention.base import last_line
from policies import CacheGeometry, ScaleSchedule
from tests.support import every_attribute

ROOT = Path(__file__).resolve().parents[2]

SCHEDULE = ScaleSchedule.of([1, 2, 3])


def make(dtype="float32", head_dim=32, device="cpu", **options):
    geometry = CacheGeometry(1, 2, head_dim, dtype, dtype)
    chosen = CacheOptions("full", 1.0, **options)
    return PagedKVCache(geometry, SCHEDULE, chosen, softmax_scale=1.0, device=device)


def test_auto_on_a_cpu_is_sdpa_and_says_why():
    facts = make().facts
    assert facts["backend"] == "torch-sdpa"
    assert facts["backend_reason"] == "auto: the device is cpu, xformers needs cuda"
    assert make(backend="sdpa").facts["backend_reason"] == "asked for"
    stats = make().open(1).stats
    assert (stats.backend, stats.backend_reason) == ("torch-sdpa", facts["backend_reason"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT RUN: there is a GPU")
def test_a_back_end_for_cuda_where_torch_sees_none():
    """The reason is that; a float32 model's would be its dtype."""
    plan, cuda = make().plan(1), torch.device("cuda")
    backend, why = choose_backend("auto", cuda, plan, 256)
    assert backend.name == "torch-sdpa"
    assert why == "auto: xformers cannot run here: torch sees no CUDA device"
    with pytest.raises(BackendUnavailable, match="torch sees no CUDA device") as caught:
        choose_backend("xformers", cuda, plan, 256)
    assert (caught.value.backend, caught.value.reasons) == (
        "xformers",
        ("torch sees no CUDA device",),
    )


def test_xformers_on_a_cpu_is_refused_in_its_own_words():
    """In a process of its own: where Triton interprets its kernels a CPU will do."""
    pytest.importorskip("xformers")
    code = (
        "from tests.unit.test_backends import make\n"
        "from kvruntime import BackendUnavailable\n"
        "try:\n    make('float16', backend='xformers')\n"
        "except BackendUnavailable as error:\n    print(error, len(error.reasons))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert re.search(r"xformers cannot run here: .*cpu", done.stdout), done.stderr


def test_without_xformers_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvruntime.attention.xformers", None)
    monkeypatch.delattr("kvruntime.attention.xformers", raising=False)
    with pytest.raises(BackendUnavailable, match=r"pip install 'kvruntime\[xformers\]'"):
        make("float16", backend="xformers")


def test_the_last_line_of_an_error():
    assert last_line("Traceback\n  deep\nKeyError: 3\n\n") == "KeyError: 3"
    assert last_line(" \n") == "no message"


def test_sdpa_never_reads_pages_and_adds_what_it_is_given():
    backend, _ = choose_backend("sdpa", torch.device("cpu"), make().plan(1), 256)
    assert not backend.reads_pages(None, 1, False)
    with pytest.raises(NotImplementedError, match="no attention over pages"):
        backend.attend_pages(None, None, None, None, 1.0)
    q = torch.randn(2, 3, 4, 8)
    keys, values = torch.randn(2, 2, 4, 5, 8)
    bias = torch.randn(2, 4, 1, 5)
    bias[..., 2] = -torch.inf
    out = backend.attend(q, keys, values, bias, 0.7)
    logits = q.transpose(1, 2).double() @ keys.double().transpose(2, 3) * 0.7 + bias
    wanted = (logits.softmax(-1) @ values.double()).transpose(1, 2)
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(backend.attend(q, keys, values, bias[:1].expand_as(bias), 0.7)[:1], out[:1])


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "flash"},
        {"paged_queries": -1},
        {"kv_dtype": "int3"},
        {"kv_dtype": "int4", "kv_groups": 8},
        {"kv_groups": 2},
        {"kv_dtype": "int4", "kv_start": 99},
        {"page_size": 0},
        {"budget": "nothing"},
        {"workspace": -1},
    ],
)
def test_bad_options_leave_a_model_as_it_was(tiny_model, options):
    before = every_attribute(tiny_model)
    with pytest.raises(ValueError):
        with kvruntime.attach(tiny_model, "full", **({"budget": 1.0} | options)):
            pass
    assert every_attribute(tiny_model) == before


def test_a_default_device_does_not_matter():
    q = torch.zeros(1, 1, 2, 32, device="cpu")
    torch.set_default_device("meta")
    try:
        for policy in ("full", "scalekv", "centroid", "streaming_llm", "ams_kv"):
            cache = PagedKVCache(
                CacheGeometry(1, 2, 32, "float32", "float32"),
                ScaleSchedule.of([1, 4, 4, 4]),
                CacheOptions(policy, 20, kv_dtype="int4"),
                softmax_scale=1.0,
            )
            with cache.open(1) as generation:
                for n in (1, 16, 16, 16):
                    part = q[:, :1].expand(1, n, 2, 32)
                    assert generation.attend(0, part, part, part).device.type == "cpu"
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
    late = len(attached._view.schedule({})) - 1
    with kvruntime.attach(tiny_model, "full", 1.0, kv_dtype="int2", kv_start=late):
        assert torch.equal(tiny_model.generate(labels, seed=1), own), "never handed over"
