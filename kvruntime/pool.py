"""The K and V tensors that pages are places in. The only code that writes keys and values."""

from __future__ import annotations

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from allocator import BlockTable, PageAllocator
from policies import CacheGeometry

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def free_bytes(device: torch.device) -> int:
    """What the device's driver, or the host's system, says is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _wide(tensor: Tensor) -> Tensor:
    """The same bytes as 16-byte numbers where a token is a multiple of that, so that indexing,
    which copies number by number, has fewer of them to copy.
    """
    width = 16 // tensor.element_size()
    offsets = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    if any(offset % width for offset in offsets):
        return tensor
    return tensor.view(torch.complex128)


class Pool:
    """Two tensors [num_pages, page_size, head_dim], shared by all layers, and who owns which page.

    A lane's tokens lie in the pages of its table row, in order; only owners write, and a page with
    two owners is copied before it is written.
    """

    def __init__(
        self, num_pages: int, page_size: int, geometry: CacheGeometry, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)
        shape = (num_pages, page_size, geometry.head_dim)
        self.keys = torch.empty(shape, dtype=TORCH_DTYPES[geometry.key_dtype], device=device)
        self.values = torch.empty(shape, dtype=TORCH_DTYPES[geometry.value_dtype], device=device)

    def gather(self, table: BlockTable, keys: Tensor, values: Tensor) -> None:
        """Copy every lane's pages to the front of keys and values [rows, heads, tokens, head_dim].

        The tokens of a partly filled last page are followed by whatever that page held before.
        """
        ids = torch.from_numpy(table.pages.astype(np.int64)).to(self.keys.device)
        count, size = ids.shape[2], self.page_size
        for pages, into in ((self.keys, keys), (self.values, values)):
            into = _wide(into[:, :, : count * size])
            places = into.view(*ids.shape, size * into.shape[3])
            torch.ops.aten.index.Tensor_out(_wide(pages).flatten(1), [ids], out=places)

    def write(
        self, table: BlockTable, places: slice | NDArray[np.int64], k: Tensor, v: Tensor
    ) -> None:
        """Put k and v [rows, heads, m, head_dim] at these m places of every lane."""
        if isinstance(places, slice):
            places = np.arange(places.start, places.stop)
        if not places.size:
            return
        self._own(table, int(places.min()))
        slots = table.pages.take(places // self.page_size, axis=2) * np.int64(self.page_size)
        self._put(slots + places % self.page_size, k, v)

    def write_ragged(self, table: BlockTable, k: Tensor, v: Tensor) -> None:
        """Fill every lane from its start: lane (r, h) gets the first lengths[h] tokens of k[r, h]
        and v[r, h].
        """
        self._own(table, 0)
        heads, places = np.nonzero(np.arange(k.shape[2]) < table.lengths[:, None])
        pages = table.pages[:, heads, places // self.page_size].astype(np.int64)
        head, place = torch.from_numpy(heads), torch.from_numpy(places)
        slots = pages * self.page_size + places % self.page_size
        self._put(slots, k[:, head, place], v[:, head, place])

    def _put(self, slots: NDArray[np.int64], k: Tensor, v: Tensor) -> None:
        where = torch.from_numpy(slots).to(self.keys.device)
        for pages, new in ((self.keys, k), (self.values, v)):
            _wide(pages).flatten(0, 1)[where] = _wide(new)

    def _own(self, table: BlockTable, first_token: int) -> None:
        """Copy-on-write: give the table pages of its own from ``first_token`` on."""
        old, new = table.replace_shared(first_token)
        if old.size:
            source, target = torch.from_numpy(old).long(), torch.from_numpy(new).long()
            for pages in (self.keys, self.values):
                pages[target] = pages[source]
