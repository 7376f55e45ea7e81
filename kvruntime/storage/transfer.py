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
