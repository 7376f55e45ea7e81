"""Transform coding in float64, number by number as its text says, for the dense copies of lanes."""

import numpy as np
import torch

from kvruntime.coding import Coding
from kvruntime.storage.coding import _STEPS, BITS, coding_scratch
from policies.scratch import lend


def coding_of(geometry, seed=0):
    """A coding that turns, stretches and shifts: of no model."""
    rng = np.random.default_rng(seed)
    shape = (2, geometry.layers, geometry.heads, geometry.head_dim)
    turns = np.linalg.qr(rng.standard_normal((*shape, geometry.head_dim)))[0]
    forward = turns * rng.uniform(0.5, 2.0, shape)[..., None]
    mean = rng.normal(0, 0.3, shape)
    return Coding("none", *(torch.from_numpy(part.astype(np.float32)) for part in (forward, mean)))


def lend_scratch(tokens, lengths):
    """What coding tokens [rows, n, head_dim] works in, in tensors of its own."""
    rows, count, dim = tokens.shape
    return lend(coding_scratch(rows * len(lengths), rows * count, dim), tokens.device)


def transforms_of(coding, layer, head):
    """(forward, inverse, mean) of K and of V, float64."""
    parts = []
    for part in range(2):
        forward = coding.forward[part, layer, head].double()
        parts.append((forward, forward.inverse(), coding.mean[part, layer, head].double()))
    return parts


def coded(tokens, records, transforms, error):
    """What records of tokens [2, n, head_dim], known to ``error`` (of the same shape), hold, and
    how far float32 may be off that: a whole step where a coordinate is next to the edge of one.
    """
    stored, slack = [], []
    for part, (forward, inverse, mean) in enumerate(transforms):
        bits = torch.tensor(BITS[part][records.bits]).repeat_interleave(forward.shape[0] // 8)
        step = torch.tensor([_STEPS[each] for each in bits.tolist()], dtype=torch.float64)
        highest = 2.0**bits - 1
        turned = (tokens[part].double() - mean) @ forward.t()
        place = turned / step + highest / 2
        code = torch.minimum(place.round().clamp(min=0), highest)
        to_edge = (0.5 - (place - place.round()).abs()) * step
        near = to_edge <= error[part].double() @ forward.abs().t() + 1e-5 * (1 + turned.abs())
        stored.append((code - highest / 2) * step @ inverse.t() + mean)
        slack.append((near * step) @ inverse.abs().t() + 1e-5 * (1 + stored[-1].abs()))
    return torch.stack(stored), torch.stack(slack)
