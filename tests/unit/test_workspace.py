"""What steps work in, byte by byte: the plan adds up the regions that the step takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvruntime.planning.regions import WRAPPED_BYTES
from kvruntime.planning.workspace import Workspace, Workspaces
from policies import (
    CacheGeometry,
    Centroid,
    Full,
    Region,
    ScaleKV,
    ScaleSchedule,
    SlidingWindow,
    held_bytes,
    make_policy,
    torch_bytes,
)
from policies.scratch import ALIGNMENT
from tests.support import schedules
from tests.unit.test_plan import made_of

ID = 8  # bytes of a page id, of a slot or of a chosen place


def up(size):
    """Regions begin at multiples of 64 bytes."""
    return -(-size // 64) * 64


def lane(dim, dtype="float32"):
    return CacheGeometry(1, 1, dim, dtype, dtype)


def test_regions():
    held = Region("a", (3, 5), "float32"), Region("b", (1,), "bool"), Region("c", (0, 4), "int64")
    inside = Region("d", (9,), "int64", by_torch=True), Region("e", (1,), "int64", by_torch=True)
    assert [region.num_bytes for region in held] == [64, 64, 0]
    assert held_bytes([*held, *inside]) == 128
    assert torch_bytes([*held, *inside]) == 128
    assert torch_bytes(held) == 0 and ALIGNMENT == 64


def test_a_gather():
    """The last scale reads 32 of 48 tokens and writes nothing."""
    made = made_of(lane(4), ScaleSchedule.of([4, 4, 4]), Full(), page_size=16)
    assert made.scratch_bytes == up(2 * ID) + 2 * 48 * 16
    assert made.workspace_bytes == made.scratch_bytes + WRAPPED_BYTES
    # six scales of a token: the last one gathers five tokens from three pages of two, whole
    made = made_of(lane(16), ScaleSchedule.of([1] * 6), Full(), page_size=2)
    assert made.workspace_bytes == up(3 * ID) + 2 * 6 * 64 + WRAPPED_BYTES
    # four from two pages of three, whole, then one
    made = made_of(lane(16), ScaleSchedule.of([(2, 2), 1]), Full(), page_size=3)
    assert made.workspace_bytes == up(2 * ID) + 2 * 6 * 64 + WRAPPED_BYTES
    # nothing cached: attention looks at what it was given
    made = made_of(lane(4), ScaleSchedule.of([3]), Full())
    assert made.workspace_bytes == made.scratch_bytes == 0


def test_a_shift():
    """A window of 20 over 16 + 16 tokens: 16 fresh ones take the places of the oldest."""
    schedule = ScaleSchedule.of([4, 4, 1])
    made = made_of(lane(4), schedule, SlidingWindow(), 20, page_size=16)
    scratch = up(ID) + 2 * 32 * 16 + up(2 * ID) + up(16 * ID)
    assert made.workspace_bytes == scratch + WRAPPED_BYTES
    # a window of 5: all five are new
    made = made_of(lane(4), schedule, SlidingWindow(), 5, page_size=16)
    assert made.workspace_bytes == up(ID) + 2 * up(21 * 16) + up(ID) + up(5 * ID) + WRAPPED_BYTES
    # four new ones come to 32: 16 cached ones move down, each from its slot to another
    schedule = ScaleSchedule.of([4, 4, 2, 1])
    made = made_of(lane(64), schedule, SlidingWindow(), 16, page_size=16)
    shape = made.shape(2, 0, 1)
    assert (shape.moved, shape.sources, shape.kept) == (0, 4, 16), "what stays is not moved"


def test_survivors_that_move():
    """A lane that shrinks from 20 to 6 tokens: cached survivors go from slots to slots."""

    class Shrinking(SlidingWindow):
        def allocate(self, problem):
            made = SlidingWindow().allocate(problem)
            made.tokens[1] = 6
            return made

    schedule = ScaleSchedule.of([(4, 5), (1, 2), 1])
    made = made_of(lane(64), schedule, Shrinking(), 20, page_size=4)
    shape = made.shape(1, 0, 1)
    assert (shape.moved, shape.sources) == (4, 6)
    regions = {region.name: region.num_bytes for region in made.regions(shape).commit}
    assert regions == {
        "new_ids": up(2 * ID),
        "slots": up(6 * ID),
        "old_slots": up(4 * ID),
        "moved": 2 * 4 * 64 * 4,
    }
    gather = up(5 * ID) + 2 * 22 * 64 * 4
    assert made.regions(shape).num_bytes == gather + sum(regions.values())
    assert made.workspace_bytes == gather + sum(regions.values()) + WRAPPED_BYTES


def test_choosing():
    """One query scores 128 candidates of 64 numbers, 100 are kept."""
    schedule = ScaleSchedule.of([8, 8, 1])
    made = made_of(lane(64), schedule, ScaleKV(grid=1), 100, page_size=16)
    base = up(4 * ID) + 2 * 128 * 256 + up(100 * ID)
    score = 256 + 256 + up(128 * 4) * 3 + 64  # window, picked; logits, weights, scores; sums
    choose = up(100 * 4) + up(129 * ID) + 3 * up(100 * ID)  # counted by place; ranks
    commit = up(7 * ID) + 2 * up(100 * ID) + 100 * 256
    by_torch = up(128) + WRAPPED_BYTES  # where no token is, which of 128 it could be
    shape = made.shape(1, 0, 1)
    assert made.regions(shape).num_bytes == base + max(score + choose, commit)
    assert made.workspace_bytes == base + commit + by_torch
    # one number a token: scoring weighs more than moving
    slim = made_of(lane(1), schedule, ScaleKV(grid=1), 100, page_size=16)
    score = 2 * 64 + 3 * up(128 * 4) + 64
    base = up(4 * ID) + 2 * 128 * 4 + up(100 * ID)
    assert slim.workspace_bytes == base + score + choose + by_torch
    # bfloat16 is turned into float32, and staged as it is
    half = made_of(lane(64, "bfloat16"), schedule, ScaleKV(grid=1), 100, page_size=16)
    score = 128 * 256 + 256 + 128 + up(128 * 4) * 3 + 64
    base = up(4 * ID) + 2 * 128 * 128 + up(100 * ID)
    assert half.workspace_bytes == base + score + choose + by_torch


def test_reading_and_writing_records():
    """int4 of 32 numbers: 20 bytes. In bfloat16 float32 values come between."""
    made = made_of(
        lane(32, "bfloat16"),
        ScaleSchedule.of([4, 4, 4]),
        Full(),
        page_size=16,
        kv_dtype="int4",
        kv_start=0,
    )
    read = 32 * 20 + 32 * 16 + up(32 * 2 * 4) + 32 * 32 * 4
    assert made.workspace_bytes == up(2 * ID) + 2 * 48 * 64 + read + WRAPPED_BYTES
    shape = made.shape(1, 0, 1)
    small = [up(16 * 4)] * 2 + [up(16 * 2)] * 2 + [up(16)]  # low, high; shift, step; flat
    quantise = 16 * 32 * 4 + sum(small) + 16 * 32
    commit = up(2 * ID) + 16 * ID + 16 * 64 + up(16 * 20) + quantise
    read = 16 * 20 + 16 * 16 + up(16 * 2 * 4) + 16 * 32 * 4
    assert made.regions(shape).num_bytes == up(ID) + 2 * 32 * 64 + max(read, commit)


def test_slices_bound_the_scratch():
    """3200 tokens are read, 1024 at a time."""
    schedule = ScaleSchedule.of([40, 40, 40])
    made = made_of(
        lane(32, "bfloat16"), schedule, Full(), page_size=64, kv_dtype="int4", kv_start=0
    )
    read = 1024 * (20 + 16 + 8 + 128)
    assert made.regions(made.shape(2, 0, 1)).num_bytes == up(50 * ID) + 2 * 4800 * 64 + read


def test_weights():
    """Log weights: a float32 for each candidate, a float16 for each place in pages."""
    schedule = ScaleSchedule.of([4, 4, 4])
    made = made_of(lane(16), schedule, Centroid(), 20, 3, page_size=16)
    assert (made.plane_bytes_per_page, made.plane_bytes) == (32, 32 * made.peak_pages)
    assert made.page_bytes == made.peak_pages * (2 * 16 * 16 * 4 + 32)
    regions = made.regions(made.shape(2, 0, 3))
    assert {region.name: region.num_bytes for region in regions.base} == {
        "ids": up(3 * 2 * ID),
        "keys": 3 * 36 * 64,
        "values": 3 * 36 * 64,
        "log_weights": up(3 * 36 * 4),
    }
    assert [region.num_bytes for region in regions.read] == [up(3 * 32 * 2)]


def test_several_chunks_return_one_output():
    schedule = ScaleSchedule.of([8, 8, 1])
    one = made_of(lane(64), schedule, SlidingWindow(), 100, 1)
    three = made_of(lane(64), schedule, SlidingWindow(), 100, 3, workspace=1)
    assert (three.chunk_rows, three.scratch_bytes) == (1, one.scratch_bytes)
    assert three.workspace_bytes == one.workspace_bytes + 3 * 64 * 64 * 4
    for limit in range(one.workspace_bytes, 4 * one.workspace_bytes, 5000):
        made = made_of(lane(64), schedule, SlidingWindow(), 100, 3, workspace=limit)
        assert made.workspace_bytes <= limit or made.chunk_rows == 1
        if made.chunk_rows < 3:
            assert made._step_bytes(made.chunk_rows + 1) > limit


@given(
    schedule=schedules,
    policy=st.sampled_from(["full", "scalekv", "centroid", "ams_kv", "streaming_llm"]),
    kv_dtype=st.sampled_from([None, "int4"]),
    rows=st.integers(1, 3),
)
@settings(max_examples=60)
def test_views_of_a_phase_do_not_overlap(schedule, policy, kv_dtype, rows):
    geometry = CacheGeometry(2, 2, 32, "bfloat16", "bfloat16")
    try:
        made = made_of(geometry, schedule, make_policy(policy), 20, rows, kv_dtype=kv_dtype)
    except ValueError:
        return
    workspace = Workspace(made.scratch_bytes, torch.device("cpu"))
    start, end = workspace.memory.data_ptr(), workspace.memory.data_ptr() + made.scratch_bytes
    for scale in range(len(schedule)):
        shape = made.shape(scale, 1, made.chunk_rows)
        views = workspace.views(shape, made.regions(shape))
        assert workspace.views(shape, made.regions(shape)) is views
        declared = made.regions(shape)
        for name in ("base", "kept", "read", "select", "commit"):
            held = [region for region in getattr(declared, name) if not region.by_torch]
            assert len(getattr(views, name)) == len(held), "two regions of one name"
        for phase in (views.read, views.select, views.commit):
            last = start
            for tensor in [*views.base.values(), *views.kept.values(), *phase.values()]:
                if not tensor.numel():
                    continue
                assert tensor.data_ptr() >= last and (tensor.data_ptr() - start) % 64 == 0
                assert tensor.is_contiguous()
                last = tensor.data_ptr() + tensor.numel() * tensor.element_size()
            assert last <= end


def test_workspaces_are_lent_and_grow():
    pool = Workspaces(torch.device("cpu"))
    first, second = pool.borrow(100), pool.borrow(100)
    assert first is not second and pool.tensors == []
    pool.give_back(first)
    assert pool.borrow(50) is first
    pool.give_back(first)
    larger = pool.borrow(101)
    assert larger is not first and larger.memory.numel() == 101
    pool.give_back(larger)
    pool.give_back(second)
    assert [tensor.numel() for tensor in pool.tensors] == [101, 100]
    pool.clear()
    assert pool.tensors == []


@pytest.mark.parametrize("policy", ["full", "scalekv", "centroid"])
def test_more_rows_never_need_less(policy):
    geometry = CacheGeometry(2, 2, 32, "bfloat16", "bfloat16")
    made = made_of(geometry, ScaleSchedule.of([2, 4, 6, 8]), make_policy(policy), 20)
    sizes = [made._step_bytes(rows) for rows in range(1, 40)]
    assert sizes == sorted(sizes)


def test_a_workspace_serves_again_where_it_is_large_enough():
    workspaces = Workspaces(torch.device("meta"))  # not the default device
    with torch.inference_mode():
        first = workspaces.borrow(64)
    assert first.memory.device.type == "meta" and not first.memory.is_inference()
    workspaces.give_back(first)
    assert workspaces.borrow(64) is first
    workspaces.give_back(first)
    larger = workspaces.borrow(65)
    assert (larger.memory.numel(), larger.memory.device.type) == (65, "meta")
    assert workspaces.tensors == []
