"""Reading pages waits for nothing: the host code of xformers and ours, on tensors of no numbers."""

import pytest
import torch

from kvruntime.attention.base import Lanes
from kvruntime.storage.layout import PageLayout, RecordFormat
from kvruntime.storage.pool import Pool


class NoKernel:
    """Takes a launch and counts it."""

    launches = 0

    def __getitem__(self, grid):
        NoKernel.launches += 1
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("records", [None, RecordFormat(4, 2)])
@pytest.mark.parametrize(("rows", "weighted"), [(1, False), (40, False), (40, True)])
def test_nothing_is_read_back(xformers, monkeypatch, records, rows, weighted):
    from xformers.ops.fmha._triton import splitk_kernels

    meta = torch.device("meta")
    backend = xformers.XFormers(torch.device("cpu"), torch.float16, 32, 100)
    monkeypatch.setattr(splitk_kernels, "_splitK_reduce", NoKernel())
    groups = records.groups if records else 1
    for operator in (
        xformers.paged_operator(64, 1),
        xformers.paged_operator(64, groups, weighted, None),
    ):
        monkeypatch.setattr(operator, "SUPPORTED_DEVICES", {"meta"})
        monkeypatch.setattr(operator, "get_kernel", classmethod(lambda cls: NoKernel()))
    token = records.num_bytes(32) if records else 64
    layout = PageLayout(64, 64 * token, 32, "float16", records, planes=1)
    pool = Pool(num_pages=8, page_bytes=2 * layout.half_bytes, plane_bytes=128, device=meta)
    q, k, v = torch.empty(3, rows, 9, 3, 32, dtype=torch.float16, device=meta)
    tables = torch.zeros(rows * 3, 2, dtype=torch.int64, device=meta)
    NoKernel.launches = 0
    lanes = Lanes(pool.view(layout), tables, tables[:, 0].contiguous(), 100, weighted)
    out = backend.attend_pages(q, k, v, lanes, 0.2)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert 1 <= NoKernel.launches <= 2, "a kernel for the pages, and the sum of its splits"
