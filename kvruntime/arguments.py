"""What users give to a generation, checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def check_tensor(
    name: str,
    part: Tensor,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise ValueError unless it is of this shape [rows, n, heads, head_dim], dtype and device."""
    if not isinstance(part, Tensor):
        raise ValueError(f"{name} must be a tensor, got {part!r}")
    if part.shape != shape or part.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {shape}, got {part.dtype} {tuple(part.shape)}")
    if part.device != device:
        raise ValueError(f"{name} is on {part.device}, the pool on {device}")


def refuse_transposed(name: str, part: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Raise ValueError for [rows, heads, n, head_dim] where it can be told from ``shape``."""
    rows, tokens, heads, dim = shape
    if tuple(part.shape) == (rows, heads, tokens, dim) and tokens != heads:
        raise ValueError(
            f"{name} is {tuple(part.shape)}: it looks transposed, [rows, heads, n, head_dim]; pass "
            f"[rows, n, heads, head_dim], here {shape}"
        )


def row_numbers(rows: int | Sequence[int] | NDArray[Any] | Tensor, count: int) -> NDArray[np.int64]:
    """Distinct numbers of some of ``count`` rows; of the first ones for an int."""
    given = rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    if given.size and (given.ndim > 1 or not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(
            "rows must be an int or a flat list of row numbers; of a mask give mask.nonzero()[0] "
            f"(numpy) or mask.nonzero().flatten() (torch), got {given.dtype} {given.shape}"
        )
    kept = np.arange(int(given)) if given.ndim == 0 else given.astype(np.int64)
    if not kept.size or kept.min() < 0 or kept.max() >= count:
        raise ValueError(f"rows must be some of 0..{count - 1}, got {given.tolist()}")
    if np.unique(kept).size != kept.size:
        raise ValueError(f"rows must be distinct, got {kept.tolist()}")
    return kept
