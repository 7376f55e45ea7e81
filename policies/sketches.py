"""Sketches of keys: how far they go in the few directions in which most of them differ. What is
near in them is near; they are compared in a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from policies.base import Candidates, StepSizes
from policies.scoring import float32_blocks
from policies.scratch import Region, lasting, part_of

_SAMPLE = 256  # most candidates that tell in which directions keys differ


def sketch_size(head_dim: int, kept: int) -> int:
    """Numbers in the sketch of a key of head_dim channels: the last one is 1. Where few seeds are
    compared with, keys are their own sketches: finding directions saves little time then.
    """
    return head_dim + 1 if kept <= 3 * head_dim else max(8, head_dim // 4)


def sketch_scratch(sizes: StepSizes) -> list[Region]:
    """What ``sketch`` works in, beside ``block_scratch``."""
    lanes, dim = sizes.rows * sizes.heads, sizes.head_dim
    size = sketch_size(dim, sizes.kept)
    sample, ways = min(_SAMPLE, sizes.candidates), size - 1
    both = [
        Region("sample", (lanes, sample, dim), "float32"),
        Region("centre", (lanes, 1, dim), "float32"),
        Region("sketches", (lanes, sizes.candidates, size), "float32"),
    ]
    if ways == dim:
        return both
    return [
        *both,
        Region("mixtures", (lanes, sample, ways), "float32"),
        Region("directions", (2, lanes, ways, dim), "float32"),
        Region("overlaps", (2, lanes, ways, ways), "float32"),
        Region("status", (lanes,), "int32"),
        Region("sketched_centre", (lanes, 1, ways), "float32"),
    ]


def sketch(candidates: Candidates) -> Tensor:
    """The keys [rows, heads, n, head_dim] less a centre of theirs, in the orthonormal directions
    of ``_directions`` where there are fewer of these, and 1: [lanes, n, sketch_size].
    """
    keys, scratch = candidates.keys, candidates.scratch
    rows, heads, count, dim = keys.shape
    size = sketch_size(dim, int(candidates.keep.max()))
    sketches = part_of(scratch["sketches"], rows * heads, count, size)
    places = sketches[:, :, :-1]
    sample, centre = _sample(candidates)
    if size == dim + 1:
        places.copy_(keys.flatten(0, 1)).sub_(centre)
    else:
        turn = _directions(sample, size - 1, scratch).transpose(1, 2)
        for start, end, block in float32_blocks(keys, scratch):
            torch.bmm(block, turn, out=places[:, start:end])
        places.sub_(torch.bmm(centre, turn, out=scratch["sketched_centre"]))
    sketches[:, :, -1] = 1.0
    return sketches


@lru_cache(maxsize=16)
def _random(head_dim: int, ways: int, device: torch.device) -> Tensor:
    """Normal numbers, always the same, [head_dim, ways]."""
    numbers = np.random.default_rng(0).standard_normal((head_dim, ways))
    return lasting(numbers.astype(np.float32), device)


def _sample(candidates: Candidates) -> tuple[Tensor, Tensor]:
    """Some of the keys less their mean, [lanes, at most _SAMPLE, head_dim], and that, [lanes, 1,
    head_dim].
    """
    keys, scratch, lacks = candidates.keys, candidates.scratch, candidates.log_weights
    rows, heads, count, head_dim = keys.shape
    stride = -(-count // _SAMPLE)
    sampled = keys[:, :, ::stride]
    sample = part_of(scratch["sample"], rows, heads, sampled.shape[2], head_dim).copy_(sampled)
    if lacks is not None:  # what lies where no token is must not count
        sample.masked_fill_(lacks[..., ::stride].transpose(2, 3).isneginf(), 0.0)
    sample = sample.flatten(0, 1)
    centre = torch.mean(sample, dim=1, keepdim=True, out=scratch["centre"])
    return sample.sub_(centre), centre


def _directions(sample: Tensor, ways: int, scratch: Mapping[str, Tensor]) -> Tensor:
    """In which directions most of the keys differ, judged by a sample: [lanes, ways, head_dim].

    Random mixtures of the covariance's columns, made orthonormal by Cholesky's factor of their
    overlaps: a randomized range finder (Halko, Martinsson and Tropp 2011, section 4). Where keys
    differ in fewer directions, the others add nothing to a distance.
    """
    lanes, count, head_dim = sample.shape
    turn = _random(head_dim, ways, sample.device).expand(lanes, -1, -1)
    mixtures = part_of(scratch["mixtures"], lanes, count, ways)
    torch.bmm(sample, turn, out=mixtures)
    mixed, directions = scratch["directions"]
    overlaps, by_columns = scratch["overlaps"]
    factor = by_columns.transpose(1, 2)  # else LAPACK's result is copied
    torch.bmm(mixtures.transpose(1, 2), sample, out=mixed)
    torch.bmm(mixed, mixed.transpose(1, 2), out=overlaps)
    diagonal = overlaps.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal.sum(dim=1, keepdim=True), alpha=1e-6).add_(1e-30)
    torch.linalg.cholesky_ex(overlaps, out=(factor, scratch["status"]))
    torch.linalg.solve_triangular(factor, mixed, upper=False, out=directions)
    found: Tensor = directions
    return found
