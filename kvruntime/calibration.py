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
from kvruntime.coding import Coding, Moments
from kvruntime.fold_errors import FoldMeasurement
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
    history (K' is not published). Costs about one more attention pass, and folding at four budgets
    for at most 8 rows of one drawing. Holds, beside the whole cache, one scale's keys of all
    layers, float32 copies of one layer's, 14 bytes for each of at most 2^23 attention weights at a
    time (112 MiB), and 2/5 of those rows' history, in pages
    of 16 tokens, with the workspace of one fold.
    """
    if not 0.0 < top_share <= 1.0:
        raise ValueError(f"top_share must be in (0, 1], got {top_share}")
    check_positive("pictures", pictures)
    _check_name(name)
    view = view_of(model, embedding)
    made: list[_Statistics] = []

    def observe(
        scale: int, layer: int, first_row: int, q: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        schedule = attached.schedule
        if not made:
            layers = len(view.attentions)
            made.append(_Statistics(schedule, layers, view.softmax_scale, top_share))
        if made[0].schedule != schedule:
            raise ValueError("draw() drew in two schedules: a profile is of one")
        made[0](scale, layer, first_row, q, keys, values)

    with attach(model, "full", 1.0, embedding=embedding, observer=observe) as attached:
        try:
            draw()
        finally:
            for statistics in made:
                statistics.close()
    if not made:
        raise ValueError("draw() did not run the model's sampler")
    return made[0].profile(name, pictures)


def calibrate_coding(
    model: Any, draw: Callable[[], object], name: str, embedding: Embedding | None = None
) -> Coding:
    """Run ``draw()`` on the model's uncompressed cache and measure what transform-coded pages need
    to know of its keys, values and queries (``kv_dtype="coded3"``).

    Costs three products of n x head_dim x head_dim a head and step. Holds, beside the whole cache,
    float32 copies of a step's queries, keys and values, and for each layer and head 3 x head_dim^2
    sums in float64: 192 MiB for 32 layers of 16 heads of 128. Of several schedules all counts.
    """
    _check_name(name)
    moments = Moments(len(view_of(model, embedding).attentions))

    def observe(
        scale: int, layer: int, first_row: int, q: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        k, v = (part[:, :, -q.shape[1] :].transpose(1, 2) for part in (keys, values))
        moments.add(attached.schedule, scale, layer, q, k, v)

    with attach(model, "full", 1.0, embedding=embedding, observer=observe) as attached:
        draw()
    return moments.coding(name)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must say which model it is, got {name!r}")


class _Statistics:
    """Sums over observed steps. They stay on the device until ``profile`` reads them: no step waits
    for it.
    """

    def __init__(
        self, schedule: ScaleSchedule, layers: int, softmax_scale: float, top_share: float
    ) -> None:
        self.schedule = schedule
        self._layers = layers
        self._softmax_scale = softmax_scale
        self._top_share = top_share
        self._rows = torch.zeros(len(schedule), layers, dtype=torch.float64)
        self._sums: _Sums | None = None
        self._last_keys: dict[tuple[int, int], Tensor] = {}
        self._folds: FoldMeasurement | None = None

    def close(self) -> None:
        """End what a drawing that failed has left open."""
        if self._folds is not None:
            self._folds.close()

    def __call__(
        self, scale: int, layer: int, first_row: int, q: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        rows, fresh = q.shape[0], keys[:, :, -q.shape[1] :]
        if self._sums is None or self._folds is None:
            _, _, heads, dim = q.shape
            self._sums = _Sums(len(self.schedule), self._layers, heads, dim, q.device)
            self._folds = FoldMeasurement(self.schedule, self._layers, self._softmax_scale, q)
        if first_row == 0:
            self._folds(scale, layer, q, keys, values)
        self._rows[scale, layer] += rows
        self._sums.queries[scale, layer] += q.mean(dim=1, dtype=torch.float32).sum(dim=0)
        self._add_attention(self._sums, scale, layer, q, keys)
        if scale:
            last = self._last_keys.pop((layer, first_row))[:rows]  # guidance rows may go
            similarity = self._key_similarity(scale, last.float(), fresh.float())
            self._sums.similarity[scale, layer] += rows * similarity
        if scale + 1 < len(self.schedule):  # nobody compares with the last scale's
            self._last_keys[layer, first_row] = fresh.clone()

    def _add_attention(self, sums: _Sums, scale: int, layer: int, q: Tensor, keys: Tensor) -> None:
        """What each head's queries give to each source scale and to the K' best cached tokens, and
        how much that varies from query to query.
        """
        rows, fresh, heads, _ = q.shape
        count = keys.shape[2]
        best = math.ceil(self._top_share * (count - fresh))
        block = max(1, _BLOCK_NUMBERS // (rows * heads * count))
        turned = keys.transpose(2, 3)
        received = torch.zeros(rows, heads, count, device=q.device)
        squares = torch.zeros(rows, heads, device=q.device)
        for start in range(0, fresh, block):
            part = q[:, start : start + block].transpose(1, 2) * self._softmax_scale
            weights = (part @ turned).softmax(dim=-1, dtype=torch.float32)
            received += weights.sum(dim=2)
            if best:
                history = weights[..., : count - fresh]
                top = history.topk(best, dim=-1, sorted=False).values.sum()
                sums.best[scale, layer] += top / (fresh * heads)
            if scale + 1 == len(self.schedule):
                squares += weights.square_().sum(dim=(2, 3))
        means = received.div_(fresh)
        for source in range(scale + 1):
            start, end = self.schedule.span(source)
            sums.mass[scale, source, layer] += means[:, :, start:end].sum(dim=(0, 2))
        if scale + 1 == len(self.schedule):
            variance = squares / fresh - means.square_().sum(dim=2)
            sums.variance[layer] += variance.sum(dim=0)

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
        sums, rows, folds = self._sums, self._rows, self._folds
        if sums is None or folds is None or not rows.all():
            raise ValueError("draw() did not run every scale and layer of the model's sampler")
        mass = sums.mass.cpu() / rows[:, None, :, None]
        own = mass.diagonal(dim1=0, dim2=1).mean(dim=1).t()  # [scales, layers]
        cached = (mass.sum(dim=1).mean(dim=2) - own).clamp_min(0.0)
        best = sums.best.cpu() / rows
        by_scale = zip(mass, range(1, len(self.schedule) + 1), strict=True)
        return Profile(
            version=2,
            model=name,
            sizes=self.schedule.sizes,
            pictures=pictures,
            selectivity=_table((1.0 - cached) * best / cached.clamp_min(1e-12)),
            similarity=_table(sums.similarity.cpu() / rows),
            cached_mass=_table(cached),
            mass=tuple(tuple(_table(part) for part in line[:count]) for line, count in by_scale),
            column_variance=_table(sums.variance.cpu() / rows[-1][:, None]),
            query_means=tuple(
                tuple(_table(heads) for heads in line)
                for line in sums.queries.cpu() / rows[:, :, None, None]
            ),
            fold_tokens=folds.tokens,
            fold_errors=tuple(
                tuple(_significant(table) for table in line) for line in folds.tables()
            ),
        )


class _Sums:
    """Over rows, float64. mass: [scales, source scales, layers, heads]; variance: [layers, heads];
    best, similarity: [scales, layers]; queries: [scales, layers, heads, head_dim].
    """

    def __init__(
        self, scales: int, layers: int, heads: int, head_dim: int, device: torch.device
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        with torch.inference_mode(False):  # they outlive a caller's inference_mode
            self.mass, self.variance = zeros(scales, scales, layers, heads), zeros(layers, heads)
            self.best, self.similarity = zeros(scales, layers), zeros(scales, layers)
            self.queries = zeros(scales, layers, heads, head_dim)


def _table(values: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(x, 6) for x in line) for line in values.tolist())


def _significant(values: Tensor) -> tuple[tuple[float, ...], ...]:
    """The same of numbers of any size: six digits of each."""
    return tuple(tuple(float(f"{x:.6g}") for x in line) for line in values.tolist())


def main() -> None:
    """Write the bundled model's profile and coding: ``python -m kvruntime.calibration``. The
    classes of odd number are left for what is measured with them.
    """
    model = load_model()
    labels = torch.arange(0, model.num_classes, 2).repeat(2)

    def draw() -> object:
        return model.generate(labels, seed=10_000)

    calibrate(model, draw, len(labels), "emoji64").save(FOLDER / "profile.json")
    calibrate_coding(model, draw, "emoji64").save(FOLDER / "coding.safetensors")


if __name__ == "__main__":
    main()
