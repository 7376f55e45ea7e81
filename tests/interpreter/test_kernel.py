"""xformers' kernel over our pages against float64 attention over the same tokens."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvruntime.storage.layout import RecordFormat
from tests.interpreter.cached import EXACT, Cached, filled_pages, make
from tests.interpreter.pairwise import pairwise
from tests.support import dense_attention

LENGTHS = [133, 64, 0, 1]  # a ragged last page, full ones, no token, one
AXES = {
    "page_size": (16, 32, 64, 128),
    "head_dim": (16, 32, 64, 128),
    "groups": (None, 1, 2, 4, 8),  # None: exact pages
    "num_queries": (1, 9, 17),
    "weighted": (False, True),
}


def is_readable(case):
    """The kernel wants 16 numbers of a group."""
    _, head_dim, groups, _, _ = case
    return groups is None or head_dim // groups >= 16


EVERY_FORMAT = [
    case for case in product(*(AXES | {"num_queries": (9,)}).values()) if is_readable(case)
]


@pytest.fixture(autouse=True)
def some_device(monkeypatch):
    """At head dimension 128 xformers asks which GPU there is before it chooses block sizes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))


def records_of(groups):
    return None if groups is None else RecordFormat(4, groups)


@pytest.mark.parametrize(tuple(AXES), pairwise(AXES.values(), is_readable))
def test_pages(xformers, page_size, head_dim, groups, num_queries, weighted):
    cached = Cached(page_size, head_dim, records_of(groups), LENGTHS, weighted)
    assert cached.worst_error(xformers, num_queries) < cached.bound


@pytest.mark.parametrize(
    ("number", "groups"),
    [
        pytest.param(number, (None, 1)[number % 2], marks=[pytest.mark.full] * (number % 3 > 0))
        for number in range(7)
    ],
)
def test_every_tile_attends_alike(xformers, monkeypatch, number, groups):
    """More queries than a tile, and fewer; 17 and 70 are no multiple of any."""
    from kvruntime.attention.operators import TILES

    cached = Cached(16, 32, records_of(groups), LENGTHS, weighted=True)
    monkeypatch.setattr("kvruntime.attention.operators.tile_for", lambda n: TILES[number])
    for num_queries in (1, 17, 70):
        assert cached.worst_error(xformers, num_queries) < cached.bound


def test_the_tile_takes_all_queries_of_a_lane(xformers):
    from kvruntime.attention.operators import tile_for

    tiles = {queries: tile_for(queries) for queries in (1, 2, 16, 17, 32, 33, 64, 65, 128, 4096)}
    assert [tile.queries for tile in tiles.values()] == [16, 16, 16, 32, 32, 64, 64, 128, 128, 128]
    assert [tile.warps for tile in tiles.values()] == [2] + [4] * 9


@pytest.mark.full
@pytest.mark.parametrize(tuple(AXES), EVERY_FORMAT)
def test_every_format(xformers, page_size, head_dim, groups, num_queries, weighted):
    cached = Cached(page_size, head_dim, records_of(groups), LENGTHS, weighted)
    assert cached.worst_error(xformers, num_queries) < cached.bound


@pytest.mark.parametrize(
    "records", [None, pytest.param(RecordFormat(4, 2), marks=pytest.mark.full)]
)
def test_three_hundred_queries(xformers, records):
    cached = Cached(64, 32, records, [40, 3], weighted=records is None)
    assert cached.worst_error(xformers, 300) < cached.bound


any_lanes = given(
    page_size=st.sampled_from(AXES["page_size"]),
    head_dim=st.sampled_from([16, 32, 64]),
    groups=st.sampled_from([None, 1, 2, 4]),
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=2),
    num_queries=st.one_of(st.integers(1, 40), st.integers(1, 120)),
    weighted=st.booleans(),
)


def check_any_lanes(xformers, page_size, head_dim, groups, lengths, num_queries, weighted):
    if groups is not None and head_dim // groups < 16:
        groups = 1
    both = [*lengths, *reversed(lengths)]
    cached = Cached(page_size, head_dim, records_of(groups), both, weighted)
    assert cached.worst_error(xformers, num_queries) < cached.bound


@settings(max_examples=6)
@any_lanes
def test_any_lanes(xformers, **case):
    check_any_lanes(xformers, **case)


@pytest.mark.full
@settings(max_examples=60)
@any_lanes
def test_many_lanes(xformers, **case):
    check_any_lanes(xformers, **case)


@pytest.mark.parametrize("weighted", [False, True])
def test_lanes_of_no_tokens_at_all(xformers, weighted):
    """Attention is then over the fresh tokens alone."""
    cached = Cached(16, 32, None, [0, 0], weighted)
    assert cached.worst_error(xformers, 3) < EXACT


def test_the_parts_are_weighed_by_their_sums(xformers):
    """Negative control: with the merge's weights swapped, the error is not small."""
    cached = Cached(16, 32, None, [90, 90])
    sigmoid = torch.sigmoid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "sigmoid", lambda x: sigmoid(-x))
        assert cached.worst_error(xformers, 9) > 10 * EXACT
    assert cached.worst_error(xformers, 9) < EXACT


@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_depends_on_what_lies_behind_a_lane(xformers, weighted):
    cached = Cached(16, 32, None, [20, 5], weighted)
    for index, length in enumerate(cached.lengths):
        places = cached.tables[index].repeat_interleave(16) * 16 + torch.arange(32) % 16
        for part in (cached.pages.keys, cached.pages.values):
            part.view(-1, 32)[places[length:]] = torch.nan
        cached.pages.planes.view(-1)[places[length:]] = torch.nan
    assert cached.worst_error(xformers, 3) < EXACT


def test_unreadable_formats_are_gathered(xformers):
    backend = make(xformers, 256)
    for page_size, records in (
        (8, None),
        (64, RecordFormat(4, 4)),
        (64, RecordFormat(2, 1)),
        (64, RecordFormat(8, 1)),
    ):
        assert not backend.reads_pages(filled_pages(page_size, 32, records, 1), 1, False)
    pages = Cached(16, 32, None, [1, 1]).pages
    assert backend.reads_pages(pages, 256, False) and not backend.reads_pages(pages, 257, False)
    assert backend.reads_pages(pages, 257, True), "ragged lanes are never gathered where need not"


def test_splits_stop_where_the_gpu_is_full(xformers):
    """Infinity-2B, one picture, whole history: xformers would keep 50 results of all queries."""
    from xformers.ops.fmha import triton_splitk

    lanes, n, places = 32, 256, 101 * 64
    ours, theirs = xformers.paged_operator(64, 1), triton_splitk.FwOp
    assert theirs.get_split_k(lanes, 1, 1, places, lanes * n, 64, True) == 50
    assert ours.get_split_k(lanes, 1, 1, places, lanes * n, 64, True) == 2
    assert ours.get_split_k(1, 1, 1, places, 1, 64, True) > 10, "few queries need them"


@pytest.mark.parametrize("rows_of_bias", [0, 1, 2])
def test_gathered_tokens(xformers, rows_of_bias):
    """With no bias, one that all rows share, and one for each row; 50 is no multiple of 8."""
    rows, heads = 2, 3
    q, k, v = (torch.randn(rows, n, heads, 32).half() for n in (20, 50, 50))
    bias = None
    if rows_of_bias:
        bias = torch.randn(rows_of_bias, heads, 1, 50)
        bias[..., 7:9] = -torch.inf  # as where a shorter head holds no token
    out = make(xformers, 0).attend(q, k.transpose(1, 2), v.transpose(1, 2), bias, 0.2)
    for r, h in np.ndindex(rows, heads):
        log_weights = None if bias is None else bias[r % rows_of_bias, h, 0]
        wanted = dense_attention(q[r, :, h], k[r, :, h], v[r, :, h], 0.2, log_weights)
        assert (out[r, :, h].double() - wanted).abs().max() < EXACT
