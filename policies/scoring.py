"""How much attention the candidates get from a few queries of the newest scale, and the best of
them; in float32, in tensors that the workspace lends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.base import Candidates, Seen, StepSizes
from policies.schedule import Lengths
from policies.scratch import Region, lasting, part_of, wide

BLOCK = 256  # tokens of a lane that are turned into float32 at a time


def patch_centres(size: tuple[int, ...], grid: int) -> NDArray[np.int64]:
    """Token numbers of the centres of a grid x grid split of a scale; fewer if the scale is
    smaller.

    A (t, h, w) scale is read as t * h lines of w.
    """
    height, width = int(np.prod(size[:-1])), size[-1]

    def centres(side: int) -> NDArray[np.int64]:
        return np.unique(np.maximum(0, ((2 * np.arange(grid) + 1) * side - grid) // (2 * grid)))

    return (centres(height)[:, None] * width + centres(width)).ravel()


@lru_cache(maxsize=64)
def centres_on(size: tuple[int, ...], grid: int, device: torch.device) -> Tensor:
    """patch_centres on the device, copied there once and not in every step."""
    return lasting(patch_centres(size, grid), device)


@lru_cache(maxsize=256)
def evenly_spread(count: int, among: int, device: torch.device) -> Tensor:
    """``count`` of the numbers 0..among - 1 at equal distances, int64, on the device."""
    return lasting(((2 * np.arange(count) + 1) * among) // (2 * count), device)


def block_scratch(sizes: StepSizes) -> list[Region]:
    """What ``float32_blocks`` works in."""
    if sizes.dtype == "float32":
        return []
    block = min(BLOCK, sizes.candidates)
    return [Region("block", (sizes.rows * sizes.heads, block, sizes.head_dim), "float32")]


def float32_blocks(
    tokens: Tensor, scratch: Mapping[str, Tensor]
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, end, tokens [lanes, end - start, head_dim] in float32) over [rows, heads, n,
    head_dim], BLOCK at a time; a view of all of them where they are float32 already.
    """
    lanes = tokens.flatten(0, 1)
    if lanes.dtype == torch.float32:
        yield 0, lanes.shape[1], lanes
        return
    for start in range(0, lanes.shape[1], BLOCK):
        end = min(start + BLOCK, lanes.shape[1])
        part = lanes[:, start:end]
        yield start, end, part_of(scratch["block"], *part.shape).copy_(part)


def query_scratch(sizes: StepSizes, queries: int) -> list[Region]:
    """What ``pick_queries`` works in."""
    rows, heads, dim = sizes.rows, sizes.heads, sizes.head_dim
    return [
        Region("window", (rows * heads, queries, dim), "float32"),
        Region("picked", (rows, queries, heads, dim), sizes.dtype),
    ]


def pick_queries(queries: Tensor, which: Tensor, scratch: Mapping[str, Tensor]) -> Tensor:
    """Some of the queries [rows, fresh, heads, head_dim], in float32: [lanes, n, head_dim]."""
    rows, _, heads, head_dim = queries.shape
    count = which.numel()
    picked = part_of(scratch["picked"], rows, count, heads, head_dim)
    # index_select would copy all queries first where they are a view of q, k and v together
    torch.ops.aten.index.Tensor_out(queries, [None, which], out=picked)
    window = part_of(scratch["window"], rows * heads, count, head_dim)
    window.view(rows, heads, count, head_dim).copy_(picked.transpose(1, 2))
    return window


def attention_scratch(sizes: StepSizes, queries: int) -> list[Region]:
    """What ``attention_received`` works in."""
    lanes, candidates = sizes.rows * sizes.heads, sizes.candidates
    block = min(BLOCK, candidates)
    return [
        *block_scratch(sizes),
        *query_scratch(sizes, queries),
        Region("logits", (lanes, queries, block), "float32"),
        Region("weights", (lanes, queries, candidates), "float32"),
        Region("sums", (2, lanes, queries), "float32"),
        Region("scores", (lanes, candidates), "float32"),
        Region("torch: missing", (lanes, candidates), "bool", by_torch=True),
    ]


def seen_scratch(sizes: StepSizes, queries: int) -> list[Region]:
    """What ``look`` works in: that of ``attention_received``, and what stays."""
    lanes, dim = sizes.rows * sizes.heads, sizes.head_dim
    stay = {"window", "scores"}
    return [
        *(
            replace(region, stays=region.name in stay)
            for region in attention_scratch(sizes, queries)
        ),
        Region("normaliser", (lanes, queries, 1), "float32", stays=True),
        Region("outputs", (lanes, queries, dim), "float32", stays=True),
    ]


def attention_received(candidates: Candidates, centres: Tensor) -> Tensor:
    """Softmax attention of the queries at ``centres``, summed over them: [rows, heads,
    candidates], in scratch "scores". A candidate's log weight counts; one that is not there gets
    -1.
    """
    window = pick_queries(candidates.queries, centres, candidates.scratch)
    weights, _, total = _attention(candidates, window.mul_(candidates.softmax_scale))
    return _received(candidates, weights, total.reciprocal_())


def look(candidates: Candidates, window: Tensor) -> Seen:
    """What queries ``window`` [lanes, n, head_dim], times the softmax scale, see of the candidates,
    in scratch that stays.
    """
    scratch, lanes, count = candidates.scratch, window.shape[0], window.shape[1]
    weights, most, total = _attention(candidates, window)
    normaliser = part_of(scratch["normaliser"], lanes, count, 1)
    torch.log(total, out=normaliser).add_(most)
    outputs = part_of(scratch["outputs"], lanes, count, window.shape[2]).zero_()
    for start, end, block in float32_blocks(candidates.values, scratch):
        outputs.baddbmm_(weights[:, :, start:end], block)
    received = _received(candidates, weights, total.reciprocal_())
    return Seen(window, normaliser, outputs.mul_(total), received.flatten(0, 1))


def _attention(candidates: Candidates, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of the window's logits before it is divided by its sum, [lanes, n, candidates], and
    what was subtracted from the logits, and the sums, [lanes, n, 1].
    """
    scratch, keys = candidates.scratch, candidates.keys
    rows, heads, count, _ = keys.shape
    lanes, queries = window.shape[:2]
    weights = part_of(scratch["weights"], lanes, queries, count)
    if keys.dtype == torch.float32:
        torch.bmm(window, keys.flatten(0, 1).transpose(1, 2), out=weights)
    else:
        for start, end, block in float32_blocks(keys, scratch):
            logits = part_of(scratch["logits"], lanes, queries, end - start)
            weights[:, :, start:end] = torch.bmm(window, block.transpose(1, 2), out=logits)
    if candidates.log_weights is not None:
        weights.view(rows, heads, queries, count).add_(candidates.log_weights)
    most, total = (part_of(part, lanes, queries, 1) for part in scratch["sums"])
    torch.amax(weights, dim=-1, keepdim=True, out=most)
    weights.sub_(most).exp_()
    torch.sum(weights, dim=-1, keepdim=True, out=total)
    return weights, most, total


def _received(candidates: Candidates, weights: Tensor, shares: Tensor) -> Tensor:
    """Weights [lanes, n, candidates] times shares [lanes, n, 1], summed over queries."""
    rows, heads, count, _ = candidates.keys.shape
    scores = part_of(candidates.scratch["scores"], rows * heads, 1, count)
    torch.bmm(shares.transpose(1, 2), weights, out=scores)
    scores = scores.view(rows, heads, count)
    if candidates.log_weights is not None:
        scores.masked_fill_(candidates.log_weights.squeeze(2).isneginf(), -1.0)
    return scores


def best_scratch(sizes: StepSizes) -> list[Region]:
    """What ``best`` and ``ascending`` work in."""
    lanes, kept = (sizes.rows, sizes.heads), sizes.kept
    return [
        Region("best_scores", (*lanes, kept), "float32"),
        Region("best_places", (*lanes, kept), "int64"),
        Region("counted", (*lanes, sizes.candidates + 1), "int64"),
        Region("ranks", (*lanes, kept), "int64"),
        Region("ascending", (*lanes, kept), "int64"),
    ]


def best(scores: Tensor, keep: Lengths, scratch: Mapping[str, Tensor]) -> Tensor:
    """Places of each head's ``keep`` highest scores [rows, heads, candidates], ascending: int64
    [rows, heads, m]. Heads that keep fewer than others have theirs first.
    """
    rows, heads, count = scores.shape
    most = int(keep.max())
    is_even = bool((keep == most).all())
    found = [part_of(scratch[part], rows, heads, most) for part in ("best_scores", "best_places")]
    torch.topk(scores, most, dim=-1, sorted=not is_even, out=found)
    places = found[1]
    if not is_even:
        places.masked_fill_(beyond(tuple(keep.tolist()), places.device), count)
    return ascending(places, count, scratch)[0]


def ascending(places: Tensor, count: int, scratch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Distinct places in 0..count - 1, and ``count`` as often as need be, [rows, heads, m]: in
    ascending order, and for each where it went. By counting: sorting takes five times as long.
    """
    rows, heads, _ = places.shape
    counted = part_of(scratch["counted"], rows, heads, count + 1).zero_()
    counted.scatter_(2, places, 1).cumsum_(2)
    ranks = part_of(scratch["ranks"], *places.shape)
    torch.gather(counted, 2, places, out=ranks).sub_(1)
    ordered = part_of(scratch["ascending"], *places.shape).fill_(count)
    return ordered.scatter_(2, ranks, places), ranks


def take(tokens: Tensor, places: Tensor, out: Tensor) -> Tensor:
    """Tokens [lanes, n, width] at places [lanes, m] into out [lanes, m, width]. torch.gather would
    make a float32 copy of half numbers.
    """
    source, target = wide(tokens, out)
    lane = torch.arange(places.shape[0], device=places.device).unsqueeze(1)
    torch.ops.aten.index.Tensor_out(source, [lane, places], out=target)
    return out


@lru_cache(maxsize=4096)
def beyond(keep: tuple[int, ...], device: torch.device) -> Tensor:
    """Places of [heads, max(keep)] that a head does not use, bool, on the device."""
    return lasting(np.arange(max(keep)) >= np.array(keep)[:, None], device)
