"""What folding costs each head, by budget: what ``centroid_by_head`` shares a layer's tokens by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvruntime.cache import PagedKVCache
from kvruntime.generation import Generation
from kvruntime.options import CacheOptions
from policies import CacheGeometry, Centroid, ScaleSchedule

SHARES = (1 / 60, 1 / 25, 1 / 10, 1 / 4)  # of the history
ROWS = 8  # at most, of one drawing


class FoldMeasurement:
    """Generations of ``centroid``, one for each share of the history, beside the first whole
    drawing on the uncompressed cache: on the same queries, keys and values of some rows.

    Holds 2/5 of these rows' history, in pages of 16 tokens, and a workspace for one step until that
    drawing ends; sums in float64 stay on the device until ``tables`` reads them.
    """

    def __init__(
        self,
        schedule: ScaleSchedule,
        layers: int,
        softmax_scale: float,
        q: Tensor,
    ) -> None:
        dtype = str(q.dtype).removeprefix("torch.")
        geometry = CacheGeometry(layers, q.shape[2], q.shape[3], dtype, dtype)
        self._schedule, self._softmax_scale = schedule, softmax_scale
        tokens = sorted({max(1, round(share * schedule.history)) for share in SHARES})
        self.tokens = tuple(tokens) if len(tokens) > 1 else ()
        self._caches = [
            PagedKVCache(
                geometry,
                schedule,
                CacheOptions(Centroid(), budget, page_size=16),
                softmax_scale=softmax_scale,
                device=q.device,
            )
            for budget in self.tokens
        ]
        self._open: list[Generation] = []
        self._has_seen_all = False
        with torch.inference_mode(False):  # they outlive a caller's inference_mode
            shape = (len(self.tokens), len(schedule), layers, geometry.heads)
            self._errors = torch.zeros(shape, dtype=torch.float64, device=q.device)
            self._squares = torch.zeros(shape[1:3], dtype=torch.float64, device=q.device)

    def __call__(self, scale: int, layer: int, q: Tensor, keys: Tensor, values: Tensor) -> None:
        """A step of the drawing's first rows: q [rows, n, heads, head_dim], keys and values [rows,
        heads, cached + n, head_dim].
        """
        q, keys, values = (part[:ROWS] for part in (q, keys, values))
        if scale == layer == 0 and not self._has_seen_all:
            self.close()
            self._errors.zero_()
            self._squares.zero_()
            self._open = [cache.open(q.shape[0]) for cache in self._caches]
        if not self._open:
            return
        k, v = (part[:, :, -q.shape[1] :].transpose(1, 2) for part in (keys, values))
        whole = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, scale=self._softmax_scale
        ).transpose(1, 2)
        self._squares[scale, layer] += whole.double().square().sum()
        for place, (cache, generation) in enumerate(zip(self._caches, self._open, strict=True)):
            if q.shape[0] < generation.rows:
                generation.keep_rows(q.shape[0])
            error = generation.attend(layer, q, k, v).double().sub_(whole).square_()
            self._errors[place, scale, layer] += error.sum(dim=(0, 1, 3))
            cache.let_go()  # of its workspace: one is there at a time
        if self._open[0].scale == len(self._schedule):
            self._has_seen_all = True
            self.close()

    def close(self) -> None:
        """End the generations. Twice is allowed."""
        for generation in self._open:
            generation.close()
        self._open = []
        for cache in self._caches:
            cache.let_go()

    def tables(self) -> Tensor:
        """Squared errors over the layer's squares, [budgets, scales, layers, heads]."""
        return (self._errors / self._squares.clamp_min(1e-30).unsqueeze(-1)).cpu()
