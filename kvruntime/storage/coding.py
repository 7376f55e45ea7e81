"""Transform coding: K and V in the directions in which they matter, with bits where they matter.

For each layer and head calibration measures mean and covariance of K and of V, and how much an
error counts in each direction: for K the second moment of the queries, since an error e of a key
moves a logit by q . e. ``forward`` turns a token less the mean into coordinates that are
uncorrelated, of variance 1, and ordered by how much they count. Eight equal runs of them
(octiles) have 8, 6, 4, 2 or no bits each, by a pattern that is the same for all heads; a coordinate
is rounded to the middle of a step of a fixed width, so a record has no scale of its own.

The classical reverse water-filling (Goyal 2001, IEEE Signal Processing Magazine 18(5)); for KV
caches at rest KVTC (arXiv 2511.01815) does the like without the queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvruntime.storage.layout import CodedFormat
from policies import Region
from policies.scratch import lasting, part_of

SLICE_TOKENS = 8192  # tokens, over all lanes, that are coded at a time
OCTILES = 8
_KEY_BITS = {
    8: (8, 8, 8, 8, 8, 8, 8, 8),
    6: (8, 8, 8, 6, 6, 4, 4, 4),
    5: (8, 8, 6, 6, 4, 4, 2, 2),
    4: (8, 6, 6, 4, 4, 2, 2, 0),
    3: (8, 6, 4, 4, 2, 0, 0, 0),
    2: (6, 4, 4, 2, 0, 0, 0, 0),
}
_VALUE_BITS = {
    8: (8, 8, 8, 8, 8, 8, 8, 8),
    6: (8, 8, 6, 6, 6, 6, 4, 4),
    5: (8, 6, 6, 4, 4, 4, 4, 4),
    4: (6, 6, 4, 4, 4, 4, 2, 2),
    3: (6, 4, 4, 2, 2, 2, 2, 2),
    2: (4, 4, 2, 2, 2, 2, 0, 0),
}
BITS = (_KEY_BITS, _VALUE_BITS)  # of the octiles, by bits of a number on average
KEYS, VALUES = 0, 1
# steps of Max (1960, table I) for a normal number of variance 1; from 4 bits on 1.15 times as wide,
# since K and V have heavier tails
_STEPS = {0: 1.0, 2: 0.9957, 4: 0.3855, 6: 0.1197, 8: 0.0354}
_LARGEST_HALF = 65504.0


class Digits(NamedTuple):
    """A run of coordinates that have ``width`` bits, from bit ``shift`` on, side by side in a
    record from ``first_byte`` on.
    """

    start: int
    end: int
    shift: int
    width: int
    first_byte: int

    @property
    def per_byte(self) -> int:
        return 8 // self.width

    @property
    def last_byte(self) -> int:
        return self.first_byte + (self.end - self.start) // self.per_byte


@lru_cache(maxsize=64)
def digits(pattern: tuple[int, ...], head_dim: int) -> tuple[Digits, ...]:
    """The digits of a record whose octiles have so many bits, which never rise."""
    octile, found, byte = head_dim // OCTILES, [], 0
    for has, width, shift in (
        ({8}, 8, 0),
        ({6, 4}, 4, 0),
        ({6}, 2, 4),
        ({2}, 2, 0),
    ):
        places = [place for place, bits in enumerate(pattern) if bits in has]
        if places:
            run = Digits(places[0] * octile, (places[-1] + 1) * octile, shift, width, byte)
            found.append(run)
            byte = run.last_byte
    return tuple(found)


@lru_cache(maxsize=256)
def _levels(
    pattern: tuple[int, ...], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each coordinate: its step, its highest code, and the middle of its codes, where 0 is,
    [head_dim].
    """
    bits = np.repeat(np.array(pattern), head_dim // OCTILES)
    steps = np.array([_STEPS[each] for each in bits.tolist()])
    most = 2.0**bits - 1
    step, highest, middle = (
        lasting(each.astype(np.float32), device) for each in (steps, most, most / 2)
    )
    return step, highest, middle


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """Of the K or the V of some heads: coordinates = forward (token - mean).

    forward, inverse: float32 [heads, head_dim, head_dim]. mean: float32 [heads, 1, head_dim].
    part: KEYS or VALUES.
    """

    part: int
    forward: Tensor
    inverse: Tensor
    mean: Tensor

    def of(self, heads: slice) -> Transform:
        return Transform(self.part, self.forward[heads], self.inverse[heads], self.mean[heads])

    def _slices(
        self, source: Tensor, target: Tensor, lengths: tuple[int, ...]
    ) -> Iterator[tuple[Transform, Tensor, Tensor]]:
        """Some heads' transforms, and so many of their tokens in both tensors [rows, n, width] that
        scratch has room for, [rows, heads, m, width].
        """
        for heads, first, last in _runs(lengths):
            count = heads.stop - heads.start
            some, into = (_by_head(part, first, last, count) for part in (source, target))
            size = max(1, SLICE_TOKENS // (some.shape[0] * count))
            for start in range(0, some.shape[2], size):
                end = start + size
                yield self.of(heads), some[:, :, start:end], into[:, :, start:end]

    def encode(
        self,
        tokens: Tensor,
        lengths: tuple[int, ...],
        records: CodedFormat,
        out: Tensor,
        scratch: Mapping[str, Tensor],
    ) -> Tensor:
        """Records of tokens [rows, n, head_dim], which lie head by head, into out [rows, n, words].

        lengths: tokens of each head, n in all. Coordinates beyond the outermost steps saturate.
        """
        for part, some, into in self._slices(tokens, out, lengths):
            part._encode_some(some, records, into, scratch)
        return out

    def _encode_some(
        self, tokens: Tensor, records: CodedFormat, out: Tensor, scratch: Mapping[str, Tensor]
    ) -> None:
        """tokens [rows, heads, n, head_dim] into out [rows, heads, n, words]."""
        rows, heads, count, dim = tokens.shape
        pattern = BITS[self.part][records.bits]
        numbers = part_of(scratch["c_numbers"], heads, rows, count, dim)
        numbers.copy_(tokens.transpose(0, 1)).sub_(self.mean.unsqueeze(1))
        turned = part_of(scratch["c_turned"], heads, rows * count, dim)
        torch.bmm(numbers.flatten(1, 2), self.forward.transpose(1, 2), out=turned)
        step, highest, middle = _levels(pattern, dim, tokens.device)
        turned.div_(step).add_(middle).round_().clamp_(min=0.0)
        codes = part_of(scratch["c_codes"], heads, rows, count, dim)
        codes.copy_(torch.minimum(turned, highest, out=turned).view_as(codes))
        packed = out.view(torch.uint8).transpose(0, 1)
        for run in digits(pattern, dim):
            target = packed[..., run.first_byte : run.last_byte]
            if run.width == 8:
                target.copy_(codes[..., run.start : run.end])
                continue
            digit = part_of(scratch["c_digits"], heads, rows, count, run.end - run.start)
            torch.bitwise_right_shift(codes[..., run.start : run.end], run.shift, out=digit)
            digit.bitwise_and_(2**run.width - 1)
            target.copy_(digit[..., :: run.per_byte])
            for place in range(1, run.per_byte):
                digit[..., place :: run.per_byte].bitwise_left_shift_(run.width * place)
                target.bitwise_or_(digit[..., place :: run.per_byte])

    def decode(
        self,
        stored: Tensor,
        lengths: tuple[int, ...],
        records: CodedFormat,
        out: Tensor,
        scratch: Mapping[str, Tensor],
    ) -> None:
        """Write the tokens of records [rows, n, words], which lie head by head, into out [rows, n,
        head_dim], rounded once at the end. lengths: tokens of each head, n in all.
        """
        for part, some, into in self._slices(stored, out, lengths):
            part.decode_lanes(some, records, into, scratch)

    def decode_lanes(
        self, stored: Tensor, records: CodedFormat, out: Tensor, scratch: Mapping[str, Tensor]
    ) -> None:
        """The same of records [rows, heads, n, words] into out [rows, heads, n, head_dim], all at
        once.
        """
        rows, heads, count, dim = out.shape
        pattern = BITS[self.part][records.bits]
        coded = dim - pattern.count(0) * dim // OCTILES  # coordinates that have bits
        codes = part_of(scratch["c_codes"], heads, rows, count, coded)
        packed = stored.view(torch.uint8).transpose(0, 1)
        for run in digits(pattern, dim):
            source = packed[..., run.first_byte : run.last_byte]
            if run.width == 8:
                codes[..., run.start : run.end].copy_(source)
                continue
            digit = part_of(scratch["c_digits"], *source.shape)
            for place in range(run.per_byte):
                torch.bitwise_right_shift(source, run.width * place, out=digit)
                digit.bitwise_and_(2**run.width - 1)
                target = codes[..., run.start + place : run.end : run.per_byte]
                if run.shift:
                    target.bitwise_or_(digit.bitwise_left_shift_(run.shift))
                else:
                    target.copy_(digit)
        step, _, middle = _levels(pattern, dim, out.device)
        numbers = part_of(scratch["c_numbers"], heads, rows, count, coded).copy_(codes)
        numbers.sub_(middle[:coded]).mul_(step[:coded])
        turned = part_of(scratch["c_turned"], heads, rows * count, dim)
        torch.bmm(numbers.flatten(1, 2), self.inverse.transpose(1, 2)[:, :coded], out=turned)
        turned.add_(self.mean)
        if out.dtype == torch.float16:  # what saturated stays finite
            turned.clamp_(-_LARGEST_HALF, _LARGEST_HALF)
        out.copy_(turned.view(heads, rows, count, dim).transpose(0, 1))


def _runs(lengths: tuple[int, ...]) -> Iterator[tuple[slice, int, int]]:
    """Heads that are coded at a time, and where their tokens begin and end: all heads where these
    have equally many, else one by one.
    """
    if len(set(lengths)) == 1:
        yield slice(0, len(lengths)), 0, sum(lengths)
        return
    end = 0
    for head, length in enumerate(lengths):
        start, end = end, end + length
        if length:
            yield slice(head, head + 1), start, end


def _by_head(tokens: Tensor, first: int, last: int, heads: int) -> Tensor:
    """[rows, n, width], of which so many heads have first to last, as [rows, heads, m, width]."""
    rows, _, width = tokens.shape
    return tokens[:, first:last].view(rows, heads, (last - first) // heads, width)


def coding_scratch(lanes: int, tokens: int, head_dim: int) -> list[Region]:
    """What ``encode`` and ``decode`` work in for so many tokens over all lanes."""
    return lanes_scratch(min(tokens, max(SLICE_TOKENS, lanes)), head_dim)


def lanes_scratch(count: int, head_dim: int) -> list[Region]:
    """What ``decode_lanes`` works in for so many tokens over all lanes."""
    return [
        Region("c_numbers", (count, head_dim), "float32"),
        Region("c_turned", (count, head_dim), "float32"),
        Region("c_codes", (count, head_dim), "uint8"),
        Region("c_digits", (count, head_dim), "uint8"),
    ]
