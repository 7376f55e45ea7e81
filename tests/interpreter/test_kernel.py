"""xformers' kernel over our pages against float32 attention over the same tokens."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvruntime.formats import RowFormat
from kvruntime.pool import Lanes, Pool
from kvruntime.quantize import dequantize, quantize
from policies import CacheGeometry
from tests.support import dense_attention

EXACT, INT4 = 2e-3, 5e-3
HEADS = 2


def make(xformers, paged_queries):
    return xformers.XFormers(torch.device("cpu"), torch.float16, 32, paged_queries)


@dataclass
class Cached:
    """Pages full of random tokens, and lanes with shuffled tables over some of them."""

    page_size: int
    head_dim: int
    row: RowFormat | None
    lengths: list[int]

    def __post_init__(self):
        torch.manual_seed(self.page_size + self.head_dim + sum(self.lengths))
        width = max(1, -(-max(self.lengths) // self.page_size))
        num_pages = width * len(self.lengths) + 3
        geometry = CacheGeometry(1, 1, self.head_dim, "float16", "float16")
        pool = Pool(num_pages, self.page_size, geometry, torch.device("cpu"), self.row)
        self.pages = pool.exact if self.row is None else pool.quantised
        values = torch.randn(2, num_pages, self.page_size, self.head_dim).half()
        for part, tokens in zip((self.pages.keys, self.pages.values), values, strict=True):
            part.copy_(tokens if self.row is None else quantize(tokens, self.row))
        shuffled = torch.randperm(num_pages)[: width * len(self.lengths)]
        self.tables = shuffled.view(len(self.lengths), width)

    def lane(self, index):
        """K and V of a lane as the kernel should see them, [2, tokens, head_dim]."""
        parts = []
        for pages in (self.pages.keys, self.pages.values):
            tokens = pages[self.tables[index]].flatten(0, 1)[: self.lengths[index]]
            if self.row is not None:
                plain = torch.empty(len(tokens), self.head_dim, dtype=torch.float16)
                dequantize(tokens, self.row, plain)
                tokens = plain
            parts.append(tokens)
        return torch.stack(parts)

    def worst_error(self, xformers, num_queries):
        rows = len(self.lengths) // HEADS
        q, k, v = torch.randn(3, rows, num_queries, HEADS, self.head_dim).half()
        backend = make(xformers, 10**6)
        assert backend.reads_pages(self.pages, num_queries, True)
        scale = self.head_dim**-0.5
        lengths, longest = torch.tensor(self.lengths), max(self.lengths)
        out = backend.attend_pages(q, k, v, Lanes(self.pages, self.tables, lengths, longest), scale)
        assert out.shape == q.shape and out.dtype == q.dtype
        errors = []
        for index in range(len(self.lengths)):
            r, h = divmod(index, HEADS)
            keys, values = torch.cat((self.lane(index), torch.stack((k[r, :, h], v[r, :, h]))), 1)
            wanted = dense_attention(q[r, :, h], keys, values, scale)
            errors.append(float((out[r, :, h].double() - wanted).abs().max()))
        return max(errors)


@pytest.fixture(autouse=True)
def some_device(monkeypatch):
    """At head dimension 128 xformers asks which GPU there is before it chooses block sizes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))


LENGTHS = [20, 133, 1, 64, 0, 7]  # ragged last pages, a full page, one token, none


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("num_queries", [1, 17])
def test_exact_pages(xformers, page_size, head_dim, num_queries):
    assert Cached(page_size, head_dim, None, LENGTHS).worst_error(xformers, num_queries) < EXACT


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize(("head_dim", "groups"), [(32, 1), (32, 2), (64, 4), (128, 1), (128, 8)])
def test_int4_pages(xformers, page_size, head_dim, groups):
    cached = Cached(page_size, head_dim, RowFormat(4, groups), LENGTHS)
    assert cached.worst_error(xformers, 9) < INT4


@pytest.mark.parametrize(("row", "most"), [(None, EXACT), (RowFormat(4, 2), INT4)])
def test_three_hundred_queries(xformers, row, most):
    assert Cached(64, 32, row, [40, 3]).worst_error(xformers, 300) < most


@settings(max_examples=30)
@given(
    page_size=st.sampled_from([16, 32, 64, 128]),
    head_dim=st.sampled_from([16, 32, 64]),
    groups=st.sampled_from([None, 1, 2, 4]),
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=2),
    num_queries=st.one_of(st.integers(1, 40), st.integers(1, 120)),
)
def test_any_lanes(xformers, page_size, head_dim, groups, lengths, num_queries):
    if groups is not None and head_dim // groups < 16:
        groups = 1
    row = None if groups is None else RowFormat(4, groups)
    cached = Cached(page_size, head_dim, row, [*lengths, *reversed(lengths)])
    assert cached.worst_error(xformers, num_queries) < (EXACT if row is None else INT4)


def test_the_parts_are_weighed_by_their_sums(xformers):
    """Negative control: with the merge's weights swapped, the error is not small."""
    cached = Cached(16, 32, None, [90, 90])
    sigmoid = torch.sigmoid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "sigmoid", lambda x: sigmoid(-x))
        assert cached.worst_error(xformers, 9) > 10 * EXACT
    assert cached.worst_error(xformers, 9) < EXACT


def test_nothing_depends_on_what_lies_behind_a_lane(xformers):
    cached = Cached(16, 32, None, [20, 5])
    for index, length in enumerate(cached.lengths):
        places = cached.tables[index].repeat_interleave(16) * 16 + torch.arange(32) % 16
        for part in (cached.pages.keys, cached.pages.values):
            part.view(-1, 32)[places[length:]] = torch.nan
    assert cached.worst_error(xformers, 3) < EXACT


def test_unreadable_formats_are_gathered(xformers):
    backend = make(xformers, 256)
    for page_size, head_dim, row in (
        (8, 32, None),
        (64, 32, RowFormat(4, 4)),
        (64, 32, RowFormat(2, 1)),
        (64, 32, RowFormat(8, 1)),
    ):
        geometry = CacheGeometry(1, 1, head_dim, "float16", "float16")
        pool = Pool(1, page_size, geometry, torch.device("cpu"), row)
        assert not backend.reads_pages(pool.quantised or pool.exact, 1, False)
    pages = Cached(16, 32, None, [1, 1]).pages
    assert backend.reads_pages(pages, 256, False) and not backend.reads_pages(pages, 257, False)
    assert backend.reads_pages(pages, 257, True), "ragged lanes cannot be gathered"


def test_splits_stop_where_the_gpu_is_full(xformers):
    """Infinity-2B, one picture, whole history: xformers would keep 50 results of all queries."""
    lanes, n, places = 32, 256, 101 * 64
    ours, theirs = xformers._operator(64, 1), xformers.triton_splitk.FwOp
    assert theirs.get_split_k(lanes, 1, 1, places, lanes * n, 64, True) == 50
    assert ours.get_split_k(lanes, 1, 1, places, lanes * n, 64, True) == 2
    assert ours.get_split_k(1, 1, 1, places, 1, 64, True) > 10, "few queries need them"


def test_gathered_tokens(xformers):
    q, k, v = (torch.randn(2, n, 3, 32).half() for n in (20, 50, 50))
    backend = make(xformers, 0)
    out = backend.attend(q, k.transpose(1, 2), v.transpose(1, 2), None, 0.2)
    for r, h in np.ndindex(2, 3):
        wanted = dense_attention(q[r, :, h], k[r, :, h], v[r, :, h], 0.2)
        assert (out[r, :, h].double() - wanted).abs().max() < EXACT
