"""The bytes of a pool read as tokens, or as records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvruntime.storage.layout import Records
from policies.scratch import wide


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """A pool's bytes seen through a layout.

    keys, values: [num_pages, page_size, width], tokens or records. planes: float16 [num_pages,
        places, planes], at least page_size places; None if tokens have none.
    """

    keys: Tensor
    values: Tensor
    planes: Tensor | None
    records: Records | None

    @property
    def page_size(self) -> int:
        return int(self.keys.shape[1])


def read(pages: Tensor, slots: Tensor, out: Tensor) -> None:
    """Tokens or records at these slots of pages [num_pages, page_size, width] into out
    [*slots.shape, width].
    """
    source, target = wide(pages, out)
    torch.ops.aten.index.Tensor_out(flat(source), [slots], out=target)


def write(pages: Tensor, slots: Tensor, new: Tensor) -> None:
    """Put new [*slots.shape, width] at these slots of pages [num_pages, page_size, width]."""
    target, source = wide(pages, new)
    flat(target).index_put_((slots,), source)


def copy_pages(parts: Iterable[Tensor], old: Tensor, new: Tensor, scratch: Tensor) -> None:
    """Copy whole pages of these bytes [num_pages, size], so that a shared one can be written,
    through scratch, bytes [n]. No page is old and new.
    """
    for part in parts:
        size = part.shape[1]
        width = min(size, scratch.numel())
        for left in range(0, size, width or 1):
            columns = part[:, left : left + width]
            count = scratch.numel() // columns.shape[1]
            for first in range(0, old.numel(), count):
                source, target = old[first : first + count], new[first : first + count]
                held = scratch[: source.numel() * columns.shape[1]].view(source.numel(), -1)
                those, through = wide(columns, held)
                torch.index_select(those, 0, source, out=through)
                those.index_copy_(0, target, through)


def flat(pages: Tensor) -> Tensor:
    """The same places in one row, [num_pages * page_size, width]; never a copy."""
    return pages.view(pages.shape[0] * pages.shape[1], pages.shape[2])


def planes_of(part: Tensor, count: int) -> Tensor | None:
    """Bytes [num_pages, plane_bytes] as float16 [num_pages, places, count], as many places as there
    is room for; None for no planes.
    """
    if not count:
        return None
    halves = part.view(torch.float16)
    num_pages, width = halves.shape
    return halves.as_strided((num_pages, width // count, count), (width, count, 1))
