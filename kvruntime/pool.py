"""The K and V tensors that pages are places in. The only code that writes keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from allocator import BlockTable, PageAllocator
from kvruntime.formats import RowFormat, exact_page_size
from kvruntime.plan import SLICE_TOKENS
from kvruntime.quantize import dequantize
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


def upload(device: torch.device, arrays: list[NDArray[np.int64]]) -> list[Tensor]:
    """The arrays as int64 tensors on the device: in one copy from pinned memory, which the host
    does not wait for; without a copy where the device is the CPU.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    ends = np.cumsum([array.size for array in arrays])
    is_cuda = device.type == "cuda"
    host = torch.empty(int(ends[-1]), dtype=torch.int64, device="cpu", pin_memory=is_cuda)
    np.concatenate([array.ravel() for array in arrays], out=host.numpy())
    there = host.to(device, non_blocking=True)  # torch keeps ``host`` until the copy is done
    return [
        there[end - array.size : end].view(array.shape)
        for array, end in zip(arrays, ends.tolist(), strict=True)
    ]


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same bytes as 16-byte numbers where all of the tensors allow it, so that indexing, which
    copies number by number, has fewer of them to copy.
    """
    for tensor in tensors:
        width = 16 // tensor.element_size()
        offsets = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
        if any(offset % width for offset in offsets):
            return tensors
    return tuple(tensor.view(torch.complex128) for tensor in tensors)


@dataclass(frozen=True, slots=True)
class Pages:
    """A pool's bytes seen as pages of one format: K and V, [num_pages, page_size, width].

    row: None for exact tokens, width then is head_dim; else width is row.words(head_dim), int32.
    """

    keys: Tensor
    values: Tensor
    row: RowFormat | None

    @property
    def page_size(self) -> int:
        return int(self.keys.shape[1])

    def gather(self, ids: Tensor, cached: int, keys: Tensor, values: Tensor) -> None:
        """Copy the first ``cached`` tokens of every lane to the front of keys and values [rows,
        heads, tokens, head_dim], out of its pages ids [rows, heads, count].

        Exact pages are copied whole, so that ``tokens`` must have room for them, and what follows
        the tokens of a partly filled last page is whatever that page held before.
        """
        for pages, into in ((self.keys, keys), (self.values, values)):
            if self.row is None:
                wide, places = _wide(pages, into[:, :, : ids.shape[2] * self.page_size])
                if wide.is_contiguous():  # fewer and longer runs to index
                    wide = wide.flatten(1)
                places = places.view(*ids.shape, *wide.shape[1:])
                torch.ops.aten.index.Tensor_out(wide, [ids], out=places)
                continue
            step = max(1, SLICE_TOKENS // self.page_size)
            for first in range(0, ids.shape[2], step):
                start = first * self.page_size
                end = min(cached, start + step * self.page_size)
                rows = pages[ids[:, :, first : first + step]].flatten(2, 3)
                dequantize(rows[:, :, : end - start], self.row, into[:, :, start:end])


@dataclass(frozen=True, slots=True)
class Lanes:
    """What some lanes hold: of the pages that int64 tables [lanes, width] name, in order, the first
    ``lengths`` tokens, int64 [lanes]; at most ``longest``.
    """

    pages: Pages
    tables: Tensor
    lengths: Tensor
    longest: int


class Pool:
    """One run of bytes for all layers, in equally large pages, and who owns which page.

    A lane's tokens lie in the pages of its table row, in order; only owners write, and a page with
    two owners is copied before it is written. Slots number the token places of all pages.

    whole: K and V as they were allocated. exact: pages of tokens as the model makes them.
    quantised: the same bytes as pages of rows, or None; ``row`` then asks for none.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        geometry: CacheGeometry,
        device: torch.device,
        row: RowFormat | None = None,
    ) -> None:
        self.allocator = PageAllocator(num_pages)
        self.quantised: Pages | None = None
        dtypes = TORCH_DTYPES[geometry.key_dtype], TORCH_DTYPES[geometry.value_dtype]
        head_dim = geometry.head_dim
        if row is None:
            shape = (num_pages, page_size, head_dim)
            keys, values = (torch.empty(shape, dtype=dtype, device=device) for dtype in dtypes)
            self.whole = keys, values
            self.exact = Pages(keys, values, None)
            return
        shape = (num_pages, page_size, row.words(head_dim))
        keys, values = (torch.empty(shape, dtype=torch.int32, device=device) for _ in dtypes)
        self.whole = keys, values
        self.quantised = Pages(keys, values, row)
        size = exact_page_size(geometry, row, page_size)
        exact = (
            part.view(num_pages, size, -1).view(dtype)[:, :, :head_dim]
            for part, dtype in zip((keys, values), dtypes, strict=True)
        )
        self.exact = Pages(next(exact), next(exact), None)

    def slots(self, table: BlockTable, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slots [rows, heads, m] of these places of every lane, which may be written then."""
        if places.size:
            self._own(table, int(places.min()))
        return slots_of(table.pages, table.page_size, places)

    def ragged_slots(
        self, table: BlockTable
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Slots [rows, n] of all places of all heads, and the head and the place [n] of each."""
        self._own(table, 0)
        longest = int(table.lengths.max(initial=0))
        heads, places = np.nonzero(np.arange(longest) < table.lengths[:, None])
        pages = table.pages[:, heads, places // table.page_size].astype(np.int64)
        return pages * table.page_size + places % table.page_size, heads, places

    def _own(self, table: BlockTable, first_token: int) -> None:
        """Copy-on-write: give the table pages of its own from ``first_token`` on."""
        old, new = table.replace_shared(first_token)
        if old.size:
            ids = [old.astype(np.int64), new.astype(np.int64)]
            source, target = upload(self.whole[0].device, ids)
            for pages in self.whole:
                pages[target] = pages[source]


def slots_of(
    pages: NDArray[np.int32], page_size: int, places: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Slots [rows, heads, m] of these places of lanes whose pages are [rows, heads, count]."""
    return pages.take(places // page_size, axis=2) * np.int64(page_size) + places % page_size


def read(pages: Tensor, slots: Tensor) -> Tensor:
    """Tokens or rows [*slots.shape, width] of pages [num_pages, page_size, width]."""
    return _places(*_wide(pages))[slots].view(pages.dtype)


def write(pages: Tensor, slots: Tensor, new: Tensor) -> None:
    """Put new [*slots.shape, width] at these slots of pages [num_pages, page_size, width]."""
    pages, new = _wide(pages, new)
    _places(pages)[slots] = new


def _places(pages: Tensor) -> Tensor:
    """The same places in one row, [num_pages * page_size, width]; never a copy."""
    return pages.view(pages.shape[0] * pages.shape[1], pages.shape[2])
