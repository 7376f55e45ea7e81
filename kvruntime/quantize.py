"""Quantised rows: one token's K or V of one lane in 2, 4 or 8 bits.

The layout is that of xformers' paged kernel (ops/fmha/triton_splitk.py, which reads 4 bits). A row
is int32 [groups + head_dim * bits / 32]: for each group one int32 with scale (low half) and shift
(high half) in float16, then the codes, 32 / bits of them in an int32, the first one lowest. Groups
are equal runs of the head dimension; a value is code * scale + shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvruntime.formats import RowFormat

_LARGEST_HALF = 65504.0
_LARGEST_SCALE = {2: _LARGEST_HALF, 4: 127.0, 8: _LARGEST_HALF}  # the kernel takes 512 x of 4 bits


def quantize(values: Tensor, row: RowFormat) -> Tensor:
    """Rows int32 [..., words] of values [..., head_dim] in any floating number format.

    Asymmetric, rounded to nearest: an error of half a step, (max - min) / (2^bits - 1) / 2 of each
    group, and the rounding of shift to float16. Numbers beyond float16, and groups of 4 bits wider
    than 1905, saturate. Takes 5 bytes of scratch a value.
    """
    levels = 2**row.bits - 1
    codes = torch.unflatten(values.to(torch.float32, copy=True), -1, (row.groups, -1))
    low, high = codes.aminmax(dim=-1, keepdim=True)
    shift = low.clamp_(-_LARGEST_HALF, _LARGEST_HALF).half()
    scale = ((high - low) / levels).clamp_(0.0, _LARGEST_SCALE[row.bits]).half()
    inverse = scale.float().reciprocal_().masked_fill_(scale == 0, 0.0)
    codes.sub_(shift).mul_(inverse).round_().clamp_(0, levels)
    small = codes.flatten(-2).to(torch.uint8)
    per_byte = 8 // row.bits
    packed = small[..., ::per_byte].clone(memory_format=torch.contiguous_format)
    for place in range(1, per_byte):
        packed |= small[..., place::per_byte] << row.bits * place
    coefficients = torch.cat((scale, shift), -1).view(torch.int32).squeeze(-1)
    return torch.cat((coefficients, packed.view(torch.int32)), -1)


def dequantize(rows: Tensor, row: RowFormat, out: Tensor) -> None:
    """Write the values of rows [..., words] into out [..., head_dim].

    In float16 as the kernel does, else in float32, and rounded to bfloat16 once, at the end. Takes
    a byte of scratch for 8 / bits values, and four a value for bfloat16.
    """
    values = out
    if out.dtype == torch.bfloat16:
        values = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    packed = rows[..., row.groups :].view(torch.uint8)
    per_byte = 8 // row.bits
    for place in range(per_byte):
        codes = packed >> row.bits * place if place else packed
        if place < per_byte - 1:
            codes = codes & (2**row.bits - 1)
        values[..., place::per_byte] = codes
    pairs = torch.unflatten(rows[..., : row.groups].view(torch.float16), -1, (row.groups, 2))
    coefficients = pairs.to(values.dtype)
    grouped = torch.unflatten(values, -1, (row.groups, -1))
    grouped.mul_(coefficients[..., :1]).add_(coefficients[..., 1:])
    if values is not out:
        out.copy_(values)
