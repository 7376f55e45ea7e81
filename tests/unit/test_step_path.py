"""A step never waits for the device: the pages it reads and those it takes go up, nothing else;
nothing is read back, and nothing loops over rows. Proven on torch's meta device, which has no
numbers to read.
"""

import gc
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvruntime.storage.transfer
from kvruntime import CacheOptions, PagedKVCache, Pool
from kvruntime.storage.transfer import upload
from policies import CacheGeometry, ScaleSchedule
from policies.scratch import wide

SCHEDULE = ScaleSchedule.of([1, 2, 3, 4, 6, 8])
LAYERS, HEADS, DIM = 2, 3, 32


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Autocast does not know the meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())


class Uploads(TorchDispatchMode):
    """Counts copies from the host to the device and the numbers in them, and whether the host waits
    for them.
    """

    def __init__(self):
        super().__init__()
        self.copies, self.waits, self.numbers = 0, 0, 0
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = str(function)
        came = [part for part in args if isinstance(part, torch.Tensor)]
        if name.startswith(("aten._to_copy", "aten.copy_")):
            result = out if isinstance(out, torch.Tensor) else came[0]
            sent = [part for part in came if part.device.type == "cpu"]
            if sent and result.device.type == "meta":
                self.copies += 1
                self.waits += not kwargs.get("non_blocking", False)
                self.numbers += sent[0].numel()
                self.dtypes.add(sent[0].dtype)
        return out


def steps(rows, device):
    for n in SCHEDULE.tokens:
        for layer in range(LAYERS):
            yield layer, torch.zeros(3, rows, n, HEADS, DIM, device=device)


def generate(cache, rows, device="meta"):
    with cache.open(rows) as generation:
        for layer, qkv in steps(rows, device):
            generation.attend(layer, *qkv)


def make(policy, kv_dtype=None, device="meta", budget=20, observer=None, pool=None, **options):
    geometry = CacheGeometry(LAYERS, HEADS, DIM, "float32", "float32")
    chosen = CacheOptions(policy, budget, kv_dtype=kv_dtype, **options)
    return PagedKVCache(
        geometry, SCHEDULE, chosen, softmax_scale=1.0, device=device, observer=observer, pool=pool
    )


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
@pytest.mark.parametrize("policy", ["full", "scalekv", "streaming_llm", "ams_kv", "centroid"])
@pytest.mark.parametrize("workspace", [1, None])
@pytest.mark.parametrize("budget", [20, "25%", "256KiB"])
def test_pages_read_and_pages_taken_go_up_and_nothing_comes_back(
    policy, kv_dtype, workspace, budget
):
    cache = make(policy, kv_dtype, budget=1.0 if policy == "full" else budget, workspace=workspace)
    generate(cache, 2)  # constants of the schedule go up once
    plan = cache.plan(2)
    chunks = 2 // plan.chunk_rows
    assert chunks == (2 if workspace else 1)
    last = 0
    with cache.open(2) as generation:
        for layer, qkv in steps(2, "meta"):
            scale = generation.scale
            with Uploads() as uploads:
                generation.attend(layer, *qkv)
            shape = plan.shape(scale, layer, 2)
            reads = 2 * HEADS * shape.table
            takes = 2 * HEADS * shape.new_table
            assert uploads.copies <= chunks * ((reads > 0) + (takes > 0)) <= 2 * chunks
            assert uploads.numbers in (reads, reads + takes) and uploads.waits == 0
            assert uploads.dtypes <= {torch.int32}
            last += uploads.copies
    assert last >= chunks * LAYERS * (len(SCHEDULE) - 1)


def test_pages_that_stay_are_not_sent_twice():
    """A window that is full takes no pages: only those it reads go up."""
    cache = make("sliding_window", budget=16)
    generate(cache, 2)
    with cache.open(2) as generation:
        for layer, qkv in steps(2, "meta"):
            with Uploads() as uploads:
                generation.attend(layer, *qkv)
            assert uploads.copies == 1, "the page taken at scale 0, the page read at others"
    assert generation.stats.live_pages == 0


def test_generations_on_one_pool_wait_no_more():
    pool = Pool(num_pages=500, page_bytes=4096, plane_bytes=64, device="meta")
    caches = [make("scalekv", pool=pool), make("centroid", pool=pool)]
    for cache in caches:
        generate(cache, 2)
    generations = [cache.open(2) for cache in caches]
    with Uploads() as uploads:
        for layer, qkv in steps(2, "meta"):
            for generation in generations:
                generation.attend(layer, *qkv)
        for generation in generations:
            generation.close()
    assert uploads.waits == 0 and uploads.copies <= 2 * 2 * LAYERS * len(SCHEDULE)


def test_forks_and_dropped_rows_read_nothing_back():
    cache = make("full", pool=Pool(num_pages=900, page_bytes=4096, device="meta"))
    generation = cache.open(2)
    for layer, qkv in list(steps(2, "meta"))[: 3 * LAYERS]:
        generation.attend(layer, *qkv)
    twin = generation.fork()
    generation.keep_rows(1)
    for layer, qkv in list(steps(2, "meta"))[3 * LAYERS :]:
        twin.attend(layer, *qkv)
        generation.attend(layer, *qkv[:, :1])
    assert generation.stats.live_pages == twin.stats.live_pages == 0


@pytest.mark.parametrize("policy", ["scalekv", "centroid"])
def test_negative_control_a_readback_is_noticed(policy):
    cache = make(policy, observer=lambda *step: step[4].sum().item())
    with pytest.raises(RuntimeError, match="meta"):
        generate(cache, 1)


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
@pytest.mark.parametrize("policy", ["full", "scalekv", "streaming_llm", "centroid"])
def test_python_does_not_work_row_by_row(policy, kv_dtype):
    cache = make(policy, kv_dtype, device="cpu")

    def calls(rows):
        generate(cache, rows, "cpu")
        count = 0

        def watch(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        with cache.open(rows) as generation:
            assert generation.plan.chunk_rows == rows
            todo = list(steps(rows, "cpu"))
            gc.collect()
            gc.disable()  # what other tests left is not this one's work
            sys.setprofile(watch)
            try:
                for layer, qkv in todo:
                    generation.attend(layer, *qkv)
            finally:
                sys.setprofile(None)
                gc.enable()
        return count

    assert calls(2) == calls(9) > 500


def test_uploads_are_pinned_and_packed(monkeypatch):
    made = []

    class Pinned:
        def __init__(self, size, dtype, device, pin_memory):
            assert dtype is torch.int32 and device == "cpu" and pin_memory
            self.tensor = torch.zeros(size, dtype=dtype)

        def numpy(self):
            return self.tensor.numpy()

        def to(self, device, non_blocking):
            assert device.type == "cuda" and non_blocking
            made.append(self)
            return self.tensor.clone()

    arrays = [np.arange(6).reshape(2, 3), np.empty((4, 0)), np.array([9])]
    arrays = [array.astype(np.int32) for array in arrays]
    with monkeypatch.context() as patch:
        patch.setattr(kvruntime.storage.transfer.torch, "empty", Pinned)
        parts = upload(torch.device("cuda"), arrays)
    assert len(made) == 1
    assert all((part.numpy() == array).all() for part, array in zip(parts, arrays, strict=True))
    assert [part.shape for part in parts] == [(2, 3), (4, 0), (1,)]
    here = upload(torch.device("cpu"), arrays)
    assert [part.data_ptr() for part in here[::2]] == [a.ctypes.data for a in arrays[::2]]


def test_wide_sees_the_same_bytes():
    """16 bytes at a time where all of the tensors allow it, else integers of their own size."""
    whole = torch.randn(4, 8, 16).half()
    (wide_one,) = wide(whole)
    assert wide_one.dtype == torch.complex128 and wide_one.shape == (4, 8, 2)
    assert wide_one.data_ptr() == whole.data_ptr()
    for odd in (whole[..., :12], whole.flatten()[1:9][None], torch.randn(3, 5).half()):
        (narrow,) = wide(odd)
        assert narrow.dtype == torch.int16 and torch.equal(narrow.view(torch.half), odd)
        first, second = wide(whole, odd)
        assert first.dtype == second.dtype == torch.int16
    turned = whole.transpose(1, 2)
    assert wide(turned)[0] is turned
