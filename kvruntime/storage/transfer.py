"""From the host to the device, without waiting."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(device: torch.device, arrays: list[NDArray[np.int32]]) -> list[Tensor]:
    """The arrays as int32 tensors on the device: in one copy from pinned memory, which the host
    does not wait for; without a copy where the device is the CPU.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    ends = np.cumsum([array.size for array in arrays])
    is_cuda = device.type == "cuda"
    host = torch.empty(int(ends[-1]), dtype=torch.int32, device="cpu", pin_memory=is_cuda)
    np.concatenate([array.ravel() for array in arrays], out=host.numpy())
    there = host.to(device, non_blocking=True)  # torch keeps ``host`` until the copy is done
    return [
        there[end - array.size : end].view(array.shape)
        for array, end in zip(arrays, ends.tolist(), strict=True)
    ]


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same bytes as 16-byte numbers where all of the tensors allow it, so that indexing, which
    copies number by number, has fewer of them to copy; else as integers of their own size, which
    torch copies as they are.
    """
    for tensor in tensors:
        width = 16 // tensor.element_size()
        offsets = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
        if tensor.stride(-1) != 1:
            return tensors
        if any(offset % width for offset in offsets):
            return tuple(part.view(_INTEGERS[part.element_size()]) for part in tensors)
    return tuple(tensor.view(torch.complex128) for tensor in tensors)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
