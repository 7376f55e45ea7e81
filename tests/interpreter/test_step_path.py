"""Reading pages waits for nothing: the host code of xformers and ours, on tensors of no numbers."""

import pytest
import torch

from kvruntime.formats import RowFormat
from kvruntime.pool import Lanes, Pool
from policies import CacheGeometry


class NoKernel:
    """Takes a launch and counts it."""

    launches = 0

    def __getitem__(self, grid):
        NoKernel.launches += 1
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("row", [None, RowFormat(4, 2)])
@pytest.mark.parametrize("rows", [1, 40])
def test_nothing_is_read_back(xformers, monkeypatch, row, rows):
    meta = torch.device("meta")
    monkeypatch.setattr(xformers.splitk_kernels, "_splitK_reduce", NoKernel())
    for block, groups in ((64, 1), (64, 2)):
        operator = xformers._operator(block, groups)
        monkeypatch.setattr(operator, "SUPPORTED_DEVICES", {"meta"})
        monkeypatch.setattr(operator, "get_kernel", classmethod(lambda cls: NoKernel()))
    pool = Pool(8, 64, CacheGeometry(1, 3, 32, "float16", "float16"), meta, row)
    pages = pool.quantised or pool.exact
    backend = xformers.XFormers(torch.device("cpu"), torch.float16, 32, 100)
    q, k, v = torch.empty(3, rows, 9, 3, 32, dtype=torch.float16, device=meta)
    tables = torch.zeros(rows * 3, 2, dtype=torch.int64, device=meta)
    NoKernel.launches = 0
    lanes = Lanes(pages, tables, tables[:, 0].contiguous(), 100)
    out = backend.attend_pages(q, k, v, lanes, 0.2)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert 2 <= NoKernel.launches <= 4, "a kernel for the pages, one for the scale, their sums"
