"""Where the tokens that a generation holds come from: pages remember it if they are asked to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvruntime.generation import Generation
from policies import ORIGIN


@dataclass(frozen=True, slots=True, eq=False)
class Provenance:
    """Of each stored token of a layer, float32 [rows, heads, m], m those of the longest lane; NaN
    beyond a shorter one's end.

    scale: number of the scale it was drawn in. line, column: its place in the picture, from the top
    and from the left, in (0, 1). Of a folded token the means over all that it stands for.
    weight: how many tokens it stands for.
    """

    scale: Tensor
    line: Tensor
    column: Tensor
    weight: Tensor


def provenance(generation: Generation, layer: int) -> Provenance:
    """What ``layer`` of an open generation holds now and where it comes from. O(tokens of the
    layer); waits for the device. Raises ValueError unless the cache was made with
    ``CacheOptions(provenance=True)``, and for a layer that is not there.
    """
    plan, runner = generation.plan, generation._runner
    if not set(ORIGIN) <= set(plan.planes):
        raise ValueError("nothing is remembered: make the cache with CacheOptions(provenance=True)")
    if not 0 <= layer < plan.geometry.layers:
        raise ValueError(f"layer {layer} is not one of {plan.geometry.layers}")
    if runner is None:
        raise ValueError("this generation is closed: ask before it ends")
    table = generation._tables[layer]
    scale = generation.scale - (layer >= generation._layer)  # the last one that it has served
    pages = runner.pages(scale, layer)
    assert pages.planes is not None
    lengths = torch.from_numpy(table.lengths.astype(np.int64))
    most = int(lengths.max())
    count = -(-most // pages.page_size)
    ids = torch.from_numpy(table.pages[:, :, :count].astype(np.int64)).to(pages.planes.device)
    held = pages.planes[:, : pages.page_size][ids.clamp(min=0)].flatten(2, 3)[:, :, :most].float()
    beyond = (torch.arange(most) >= lengths.unsqueeze(-1)).to(held.device)
    held.masked_fill_(beyond.unsqueeze(-1), torch.nan)
    planes = dict(zip(plan.planes, held.unbind(-1), strict=True))
    weight = planes["log_weight"].exp() if "log_weight" in planes else planes["scale"] * 0 + 1
    return Provenance(planes["scale"], planes["line"], planes["column"], weight)
