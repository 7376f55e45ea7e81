"""A step never waits for the device: one upload a layer and chunk, nothing read back, no loops
over rows. Proven on torch's meta device, which has no numbers to read.
"""

import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvruntime.pool
from kvruntime import PagedKVCache
from kvruntime.pool import upload
from policies import CacheGeometry, ScaleSchedule

SCHEDULE = ScaleSchedule.of([1, 2, 3, 4, 6, 8])
LAYERS, HEADS, DIM = 2, 3, 32


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Autocast does not know the meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())


class Uploads(TorchDispatchMode):
    """Counts copies from the host to the device, and whether the host waits for them."""

    def __init__(self):
        super().__init__()
        self.copies, self.waits = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = str(function)
        came = [part for part in args if isinstance(part, torch.Tensor)]
        if name.startswith(("aten._to_copy", "aten.copy_")):
            result = out if isinstance(out, torch.Tensor) else came[0]
            if any(part.device.type == "cpu" for part in came) and result.device.type == "meta":
                self.copies += 1
                self.waits += not kwargs.get("non_blocking", False)
        return out


def generate(cache, rows, device="meta"):
    with cache.open(rows):
        for n in SCHEDULE.tokens:
            for layer in range(LAYERS):
                q, k, v = torch.zeros(3, rows, n, HEADS, DIM, device=device)
                cache.attend(layer, q, k, v)


def make(policy, kv_dtype=None, device="meta", **options):
    geometry = CacheGeometry(LAYERS, HEADS, DIM, "float32", "float32")
    return PagedKVCache(geometry, SCHEDULE, policy, 20, kv_dtype=kv_dtype, device=device, **options)


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
@pytest.mark.parametrize("policy", ["full", "scalekv", "streaming_llm", "ams_kv"])
@pytest.mark.parametrize("limit", [1, 2**28])
def test_one_upload_for_each_layer_and_chunk_and_nothing_comes_back(policy, kv_dtype, limit):
    cache = make(policy, kv_dtype, workspace_limit=limit)
    generate(cache, 2)  # constants of the schedule go up once
    with Uploads() as uploads:
        generate(cache, 2)
    chunks = 2 if limit == 1 else 1
    assert uploads.copies == chunks * LAYERS * len(SCHEDULE)
    assert uploads.waits == 0


def test_negative_control_a_readback_is_noticed():
    cache = make("scalekv", observer=lambda *step: step[4].sum().item())
    with pytest.raises(RuntimeError, match="meta"):
        generate(cache, 1)


@pytest.mark.parametrize("policy", ["full", "scalekv", "streaming_llm"])
def test_python_does_not_work_row_by_row(policy):
    cache = make(policy, "int4", device="cpu")

    def calls(rows):
        generate(cache, rows, "cpu")
        count = 0

        def watch(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        with cache.open(rows):
            run = cache._run
            steps = [
                (layer, torch.zeros(3, rows, n, HEADS, DIM))
                for n in SCHEDULE.tokens
                for layer in range(LAYERS)
            ]
            assert len(run.chunks) == 1
            sys.setprofile(watch)
            try:
                for layer, step in steps:
                    cache.attend(layer, *step)
            finally:
                sys.setprofile(None)
        return count

    assert calls(2) == calls(9) > 1000


def test_uploads_are_pinned_and_packed(monkeypatch):
    made = []

    class Pinned:
        def __init__(self, size, dtype, device, pin_memory):
            assert dtype is torch.int64 and device == "cpu" and pin_memory
            self.tensor = torch.zeros(size, dtype=dtype)

        def numpy(self):
            return self.tensor.numpy()

        def to(self, device, non_blocking):
            assert device.type == "cuda" and non_blocking
            made.append(self)
            return self.tensor.clone()

    with monkeypatch.context() as patch:
        patch.setattr(kvruntime.pool.torch, "empty", Pinned)
        arrays = [np.arange(6).reshape(2, 3), np.empty((4, 0), dtype=np.int64), np.array([9])]
        parts = upload(torch.device("cuda"), arrays)
    assert len(made) == 1
    assert all((part.numpy() == array).all() for part, array in zip(parts, arrays, strict=True))
    assert [part.shape for part in parts] == [(2, 3), (4, 0), (1,)]
