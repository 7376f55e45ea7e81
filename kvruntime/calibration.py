"""One observing pass over an attached model: the profile that the policies take their roles
from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvruntime.adapters import Embedding, attach, view_of
from kvruntime.reference import FOLDER, load_model
from kvruntime.sizes import check_positive
from policies import Profile, ScaleSchedule

_BLOCK_NUMBERS = 2**23  # most attention weights held at a time: 32 MiB in float32


def calibrate(
    model: Any,
    draw: Callable[[], object],
    pictures: int,
    name: str,
    embedding: Embedding | None = None,
    top_share: float = 0.1,
) -> Profile:
    """Run ``draw()`` on the model's uncompressed cache and measure every scale and layer.

    draw: calls the model's own sampler once or more; all rows of all calls are averaged over.
    pictures: how many it draws, for the record. top_share: K' of ScaleKV's index as a share of the
    history (K' is not published). Costs about one more attention pass. Holds, beside the whole
    cache, one scale's keys of all layers, float32 copies of one layer's, and 14 bytes for each of
    at most 2^23 attention weights at a time (112 MiB).
    """
    if not 0.0 < top_share <= 1.0:
        raise ValueError(f"top_share must be in (0, 1], got {top_share}")
    check_positive("pictures", pictures)
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must say which model it is, got {name!r}")
    view = view_of(model, embedding)
    made: list[_Statistics] = []

    def observe(scale: int, layer: int, first_row: int, q: Tensor, keys: Tensor) -> None:
        schedule = attached.schedule
        if not made:
            layers = len(view.attentions)
            made.append(_Statistics(schedule, layers, view.softmax_scale, top_share))
        if made[0].schedule != schedule:
            raise ValueError("draw() drew in two schedules: a profile is of one")
        made[0](scale, layer, first_row, q, keys)

    with attach(model, "full", 1.0, embedding=embedding, observer=observe) as attached:
        draw()
    if not made:
        raise ValueError("draw() did not run the model's sampler")
    return made[0].profile(name, pictures)


class _Statistics:
    """Sums over observed steps, [scales][layers]. They stay on the device until ``profile`` reads
    them: no step waits for it.
    """

    def __init__(
        self, schedule: ScaleSchedule, layers: int, softmax_scale: float, top_share: float
    ) -> None:
        self.schedule = schedule
        self._softmax_scale = softmax_scale
        self._top_share = top_share
        self._rows = torch.zeros(len(schedule), layers, dtype=torch.float64)
        self._sums: Tensor | None = None  # cached mass, mass of the best, similarity
        self._last_keys: dict[tuple[int, int], Tensor] = {}

    def __call__(self, scale: int, layer: int, first_row: int, q: Tensor, keys: Tensor) -> None:
        rows = q.shape[0]
        fresh = keys[:, :, -q.shape[1] :]
        if self._sums is None:
            shape = (3, *self._rows.shape)
            with torch.inference_mode(False):  # it outlives a caller's inference_mode
                self._sums = torch.zeros(shape, dtype=torch.float64, device=q.device)
        self._rows[scale, layer] += rows
        if scale:
            last = self._last_keys.pop((layer, first_row))
            mass, best = self._attention(q, keys)
            similarity = self._key_similarity(scale, last.float(), fresh.float())
            sums = self._sums[:, scale, layer]
            for place, mean in enumerate((mass, best, similarity)):
                sums[place] += rows * mean
        if scale + 1 < len(self.schedule):  # nobody compares with the last scale's
            self._last_keys[layer, first_row] = fresh.clone()

    def _attention(self, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Mass on the cached tokens and on the K' best of them, means over rows, heads, queries."""
        rows, fresh, heads, _ = q.shape
        cached = keys.shape[2] - fresh
        best = max(1, math.ceil(self._top_share * cached))
        block = max(1, _BLOCK_NUMBERS // (rows * heads * keys.shape[2]))
        turned = keys.transpose(2, 3)
        history, top = torch.zeros(2, dtype=torch.float64, device=q.device)
        for start in range(0, fresh, block):
            part = q[:, start : start + block].transpose(1, 2) * self._softmax_scale
            weights = (part @ turned).softmax(dim=-1, dtype=torch.float32)[..., :cached]
            history += weights.sum()
            top += weights.topk(best, dim=-1, sorted=False).values.sum()
        count = rows * fresh * heads
        return history / count, top / count

    def _key_similarity(self, scale: int, last: Tensor, fresh: Tensor) -> Tensor:
        """Minus the mean distance of this scale's keys from the last scale's, resized (AMS-KV
        section 2.1).

        Linear interpolation, mean over rows, heads and tokens: neither is published.
        """
        rows, heads, _, dim = last.shape
        sizes = self.schedule.sizes[scale - 1], self.schedule.sizes[scale]
        grid = last.transpose(2, 3).reshape(rows, heads * dim, *sizes[0])
        mode = "bilinear" if len(sizes[1]) == 2 else "trilinear"
        resized = F.interpolate(grid, sizes[1], mode=mode, align_corners=False)
        resized = resized.reshape(rows, heads, dim, -1).transpose(2, 3)
        distance: Tensor = (resized - fresh).norm(dim=-1).mean()
        return -distance

    def profile(self, name: str, pictures: int) -> Profile:
        """ASI = E[mass on the current map] x E[mass of the K' best cached tokens] / E[cached mass].

        ScaleKV's eq. 2 has no quotient; without it a layer that never looks back scores like a
        drafter.
        """
        if self._sums is None or not self._rows.all():
            raise ValueError("draw() did not run every scale and layer of the model's sampler")

        def table(values: Tensor) -> tuple[tuple[float, ...], ...]:
            return tuple(tuple(round(x, 6) for x in line) for line in values.tolist())

        mass, best, similarity = self._sums.cpu() / self._rows
        return Profile(
            version=1,
            model=name,
            sizes=self.schedule.sizes,
            pictures=pictures,
            selectivity=table((1.0 - mass) * best / mass.clamp_min(1e-12)),
            similarity=table(similarity),
            cached_mass=table(mass),
        )


def main() -> None:
    """Write the bundled model's profile: ``python -m kvruntime.calibration``."""
    model = load_model()
    labels = torch.arange(model.num_classes)
    profile = calibrate(model, lambda: model.generate(labels, seed=10_000), len(labels), "emoji64")
    profile.save(FOLDER / "profile.json")


if __name__ == "__main__":
    main()
