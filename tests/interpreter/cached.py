"""Lanes over pages of random tokens, and what attention over them should be."""

from dataclasses import dataclass

import torch

from kvruntime.attention.base import Lanes
from kvruntime.storage.layout import PageLayout, RecordFormat
from kvruntime.storage.pool import Pool
from kvruntime.storage.records import dequantize, quantize
from tests.support import dense_attention

EXACT, INT4 = 2e-3, 5e-3
HEADS = 2


def make(xformers, paged_queries, head_dim=32):
    return xformers.XFormers(torch.device("cpu"), torch.float16, head_dim, paged_queries)


def filled_pages(page_size, head_dim, records, num_pages):
    """Pages full of random tokens with random log weights, of which many are zero."""
    token = records.num_bytes(head_dim) if records else 2 * head_dim
    layout = PageLayout(page_size, page_size * token, head_dim, "float16", records, 1)
    pool = Pool(num_pages=num_pages, page_bytes=2 * layout.half_bytes, plane_bytes=2 * page_size)
    pages = pool.view(layout)
    for part in (pages.keys, pages.values):
        tokens = torch.randn(num_pages * page_size, head_dim).half()
        part.copy_((quantize(tokens, records) if records else tokens).view(part.shape))
    pages.planes.copy_((5 * torch.rand(num_pages, page_size, 1) - 1).clamp(min=0))
    return pages


@dataclass
class Cached:
    """Pages full of random tokens, and lanes with shuffled tables over some of them."""

    page_size: int
    head_dim: int
    records: RecordFormat | None
    lengths: list[int]
    weighted: bool = False

    def __post_init__(self):
        torch.manual_seed(self.page_size + self.head_dim + sum(self.lengths))
        width = max(1, -(-max(self.lengths) // self.page_size))
        num_pages = width * len(self.lengths) + 3
        self.pages = filled_pages(self.page_size, self.head_dim, self.records, num_pages)
        shuffled = torch.randperm(num_pages)[: width * len(self.lengths)]
        self.tables = shuffled.view(len(self.lengths), width)

    @property
    def bound(self):
        return INT4 if self.records else EXACT

    def lane(self, index):
        """K and V of a lane as the kernel should see them, [2, tokens, head_dim]."""
        parts = []
        for pages in (self.pages.keys, self.pages.values):
            tokens = pages[self.tables[index]].flatten(0, 1)[: self.lengths[index]]
            if self.records is not None:
                plain = torch.empty(1, len(tokens), self.head_dim, dtype=torch.float16)
                dequantize(tokens[None], self.records, plain)
                tokens = plain[0]
            parts.append(tokens)
        return torch.stack(parts)

    def log_weights(self, index):
        """Of a lane, [tokens]."""
        kept = self.pages.planes[self.tables[index]].flatten()[: self.lengths[index]]
        return kept * self.weighted

    def lanes(self):
        lengths = torch.tensor(self.lengths)
        return Lanes(self.pages, self.tables, lengths, max(self.lengths), self.weighted)

    def worst_error(self, xformers, num_queries):
        """Of attention over the pages, against float64."""
        rows = len(self.lengths) // HEADS
        q, k, v = torch.randn(3, rows, num_queries, HEADS, self.head_dim).half()
        backend = make(xformers, 10**6, self.head_dim)
        assert backend.reads_pages(self.pages, num_queries, True)
        scale = self.head_dim**-0.5
        out = backend.attend_pages(q, k, v, self.lanes(), scale)
        assert out.shape == q.shape and out.dtype == q.dtype
        errors = []
        for index in range(len(self.lengths)):
            r, h = divmod(index, HEADS)
            keys, values = torch.cat((self.lane(index), torch.stack((k[r, :, h], v[r, :, h]))), 1)
            log_weights = torch.cat((self.log_weights(index), torch.zeros(num_queries)))
            wanted = dense_attention(q[r, :, h], keys, values, scale, log_weights)
            errors.append(float((out[r, :, h].double() - wanted).abs().max()))
        return max(errors)
