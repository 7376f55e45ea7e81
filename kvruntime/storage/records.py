"""Quantised records: one token's K or V of one lane in 2, 4 or 8 bits.

The layout is that of xformers' paged kernel (ops/fmha/triton_splitk.py, which reads 4 bits). A
record is int32 [groups + head_dim * bits / 32]: for each group one int32 with step size (low half)
and shift (high half) in float16, then the codes, 32 / bits of them in an int32, the first one
lowest. Groups are equal runs of the head dimension; a value is code * step size + shift.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvruntime.storage.layout import RecordFormat
from policies import Region
from policies.scratch import lend, part_of

SLICE_TOKENS = 8192  # tokens, over all lanes, that are quantised or turned back at a time
_LARGEST_HALF = 65504.0
_LARGEST_STEP = {2: _LARGEST_HALF, 4: 127.0, 8: _LARGEST_HALF}  # the kernel takes 512 x of 4 bits


def quantize_scratch(tokens: int, head_dim: int, records: RecordFormat) -> list[Region]:
    """What ``quantize`` works in for so many tokens, over all lanes."""
    count = min(tokens, SLICE_TOKENS)
    groups = (count, records.groups)
    return [
        Region("q_codes", (count, head_dim), "float32"),
        Region("q_low", groups, "float32"),
        Region("q_high", groups, "float32"),
        Region("q_shift", groups, "float16"),
        Region("q_step", groups, "float16"),
        Region("q_flat", groups, "bool"),
        Region("q_small", (count, head_dim), "uint8"),
    ]


def quantize(
    values: Tensor,
    records: RecordFormat,
    out: Tensor | None = None,
    scratch: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Records int32 [tokens, words] of values [tokens, head_dim] in any floating number format.

    Asymmetric, rounded to nearest: an error of half a step, (max - min) / (2^bits - 1) / 2 of each
    group, and the rounding of shift to float16. Numbers beyond float16, and groups of 4 bits wider
    than 1905, saturate; so do infinite ones.
    """
    count, head_dim = values.shape
    if out is None:
        out = torch.empty(count, records.words(head_dim), dtype=torch.int32, device=values.device)
    if scratch is None:
        scratch = lend(quantize_scratch(count, head_dim, records), values.device)
    for start in range(0, count, SLICE_TOKENS):
        end = min(count, start + SLICE_TOKENS)
        _quantize_slice(values[start:end], records, out[start:end], scratch)
    return out


def _quantize_slice(
    values: Tensor, records: RecordFormat, out: Tensor, scratch: Mapping[str, Tensor]
) -> None:
    (count, head_dim), groups, levels = values.shape, records.groups, 2**records.bits - 1
    codes = part_of(scratch["q_codes"], count, head_dim).copy_(values)
    low, high, shift, step, is_flat = (
        part_of(scratch[name], count, groups)
        for name in ("q_low", "q_high", "q_shift", "q_step", "q_flat")
    )
    grouped = codes.view(count, groups, -1)
    torch.aminmax(grouped, dim=-1, out=(low, high))
    shift.copy_(low.clamp_(-_LARGEST_HALF, _LARGEST_HALF))
    step.copy_(high.sub_(low).div_(levels).clamp_(0.0, _LARGEST_STEP[records.bits]))
    torch.eq(step, 0, out=is_flat)
    inverse = high.copy_(step).reciprocal_().masked_fill_(is_flat, 0.0)
    grouped.sub_(low.copy_(shift).unsqueeze(-1)).mul_(inverse.unsqueeze(-1))
    codes.round_().clamp_(0, levels)
    small = part_of(scratch["q_small"], count, head_dim).copy_(codes)
    packed = out.view(torch.uint8)[:, 4 * groups :]
    per_byte = 8 // records.bits
    packed.copy_(small[:, ::per_byte])
    for place in range(1, per_byte):
        packed.bitwise_or_(small[:, place::per_byte].bitwise_left_shift_(records.bits * place))
    coefficients = out.view(torch.float16)[:, : 2 * groups]
    coefficients[:, ::2].copy_(step)
    coefficients[:, 1::2].copy_(shift)


def dequantize_scratch(
    lanes: int, tokens: int, head_dim: int, dtype: str, records: RecordFormat
) -> list[Region]:
    """What ``dequantize`` works in for so many tokens of each lane."""
    numbers = dtype if _is_direct(dtype, records) else "float32"
    shape = (lanes, tokens)
    regions = [
        Region("d_codes", (*shape, head_dim * records.bits // 8), "uint8"),
        Region("d_coefficients", (*shape, 2 * records.groups), numbers),
    ]
    if numbers != dtype:
        regions.append(Region("d_values", (*shape, head_dim), numbers))
    return regions


def dequantize(
    rows: Tensor,
    records: RecordFormat,
    out: Tensor,
    scratch: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the values of records [lanes, tokens, words] into out [lanes, tokens, head_dim].

    4 bits in float16 as the kernel does; else in float32, rounded once at the end.
    """
    lanes, tokens, head_dim = out.shape
    dtype = str(out.dtype).removeprefix("torch.")
    if scratch is None:
        scratch = lend(dequantize_scratch(lanes, tokens, head_dim, dtype, records), out.device)
    values = out
    if not _is_direct(dtype, records):
        values = part_of(scratch["d_values"], lanes, tokens, head_dim)
    packed = rows.view(torch.uint8)[..., 4 * records.groups :]
    codes = part_of(scratch["d_codes"], *packed.shape)
    per_byte, most = 8 // records.bits, 2**records.bits - 1
    for place in range(per_byte):
        if place == 0:
            codes.copy_(packed)
        else:
            torch.bitwise_right_shift(packed, records.bits * place, out=codes)
        if place < per_byte - 1:
            codes.bitwise_and_(most)
        values[..., place::per_byte].copy_(codes)
    coefficients = part_of(scratch["d_coefficients"], lanes, tokens, 2 * records.groups)
    coefficients.copy_(rows.view(torch.float16)[..., : 2 * records.groups])
    pairs = coefficients.view(lanes, tokens, records.groups, 2)
    grouped = values.view(lanes, tokens, records.groups, head_dim // records.groups)
    grouped.mul_(pairs[..., :1]).add_(pairs[..., 1:])
    if values is not out:
        if out.dtype == torch.float16:  # what saturated stays finite
            values.clamp_(-_LARGEST_HALF, _LARGEST_HALF)
        out.copy_(values)


def _is_direct(dtype: str, records: RecordFormat) -> bool:
    """Whether values of this number format are worked out in it."""
    return dtype == "float32" or (dtype == "float16" and records.bits == 4)
