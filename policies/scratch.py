"""Tensors that a step works in, declared before they are made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 64  # bytes; where regions begin

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Region:
    """One named tensor of a step's workspace. The plan adds up what the step takes.

    by_torch: torch allocates it inside one of its functions; counted, but not part of the
        workspace that is made beforehand.
    stays: its content lasts to the end of the step, beyond the phase that it is declared for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    by_torch: bool = False
    stays: bool = False

    @property
    def num_bytes(self) -> int:
        """What it takes in the workspace, padded to where the next region may begin."""
        exact = math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize
        return -(-exact // ALIGNMENT) * ALIGNMENT


def held_bytes(regions: Iterable[Region]) -> int:
    """Bytes that regions in use at the same time take of the workspace."""
    return sum(region.num_bytes for region in regions if not region.by_torch)


def torch_bytes(regions: Iterable[Region]) -> int:
    """Bytes that torch allocates itself at the worst of these, which come one after another."""
    return max((region.num_bytes for region in regions if region.by_torch), default=0)


def part_of(region: Tensor, *shape: int) -> Tensor:
    """The front of a region as a contiguous tensor of this shape."""
    return region if region.shape == shape else region.view(-1)[: math.prod(shape)].view(shape)


def lend(regions: Iterable[Region], device: torch.device) -> dict[str, Tensor]:
    """The regions as tensors of their own, for whoever has no workspace."""
    return {
        region.name: torch.empty(region.shape, dtype=TORCH_DTYPES[region.dtype], device=device)
        for region in regions
        if not region.by_torch
    }


def lasting(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """Numbers as a tensor on the device, which outlives a caller's inference_mode."""
    with torch.inference_mode(False):
        return torch.from_numpy(numbers).to(device)


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same bytes as 16-byte numbers where all of the tensors allow it, so that indexing, which
    copies number by number, has fewer of them to copy; else as integers of their own size, which
    torch copies as they are.
    """
    for tensor in tensors:
        *strides, last = tensor.stride()
        if last != 1:
            return tensors
        offsets = tensor.shape[-1] | int(tensor.storage_offset())
        for stride in strides:
            offsets |= stride
        if offsets % (16 // tensor.element_size()):  # a power of two divides all or not their "or"
            return tuple(part.view(_INTEGERS[part.element_size()]) for part in tensors)
    return tuple(tensor.view(torch.complex128) for tensor in tensors)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
