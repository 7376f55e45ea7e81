"""Codings: what transform-coded pages need to know of a model, from one observing pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvruntime.storage.coding import KEYS, VALUES, Transform
from policies import CacheGeometry, ScaleSchedule
from policies.profile import check_regular

MAX_FILE_BYTES = 4 * 2**30
_KIND = "kvruntime coding 1"
_LEAST_METRIC = 1e-6  # of the largest direction of the queries
_LEAST_VARIANCE = 1e-8  # of the largest coordinate


@dataclass(frozen=True, eq=False)
class Coding:
    """How K and V of a model are turned before they are coded (storage.coding), K first.

    forward: float32 [2, layers, heads, head_dim, head_dim]. mean: float32 [2, layers, heads,
    head_dim]. Raises ValueError for what is not that, not finite, or cannot be turned back.
    Costs ``num_bytes`` on the device, once for all caches that are given the same object.
    """

    model: str
    forward: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)
    _inverse: Tensor = field(init=False, repr=False)
    _layers: dict[tuple[int, torch.device], tuple[Transform, Transform]] = field(
        init=False, default_factory=dict, repr=False
    )

    def __post_init__(self) -> None:
        shape, mean = self.forward.shape, self.mean.shape
        if len(shape) != 5 or shape[0] != 2 or shape[3] != shape[4] or mean != shape[:4]:
            raise ValueError(
                "a coding is forward [2, layers, heads, head_dim, head_dim] and mean [2, layers, "
                f"heads, head_dim], got {tuple(shape)} and {tuple(mean)}"
            )
        if {self.forward.dtype, self.mean.dtype} != {torch.float32}:
            raise ValueError(
                f"a coding is in float32, got {self.forward.dtype} and {self.mean.dtype}"
            )
        if not (self.forward.isfinite().all() and self.mean.isfinite().all()):
            raise ValueError("a coding has numbers that are not finite")
        inverse, failed = torch.linalg.inv_ex(self.forward.double())
        if failed.any() or not inverse.float().isfinite().all():
            raise ValueError("a coding has a matrix that cannot be inverted")
        object.__setattr__(self, "_inverse", inverse.float())

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes on a device."""
        parts = (self.forward, self._inverse, self.mean)
        return sum(part.numel() * part.element_size() for part in parts)

    def check(self, geometry: CacheGeometry) -> None:
        """Raise ValueError unless it is of a model of this geometry."""
        shape = (geometry.layers, geometry.heads, geometry.head_dim)
        if self.mean.shape[1:] != shape:
            raise ValueError(
                f"the coding of {self.model} has layers, heads and head dimension "
                f"{tuple(self.mean.shape[1:])}, the model {shape}"
            )

    def layer(self, layer: int, device: torch.device) -> tuple[Transform, Transform]:
        """The transforms of a layer's K and V, on the device, copied there once."""
        place = (layer, device)
        if place not in self._layers:
            with torch.inference_mode(False):  # they outlive a caller's inference_mode
                keys, values = (
                    Transform(
                        part,
                        self.forward[part, layer].to(device),
                        self._inverse[part, layer].to(device),
                        self.mean[part, layer, :, None].to(device),
                    )
                    for part in (KEYS, VALUES)
                )
            self._layers[place] = keys, values
        return self._layers[place]

    def save(self, path: Path | str) -> None:
        """Write a safetensors file."""
        tensors = {"forward": self.forward.contiguous(), "mean": self.mean.contiguous()}
        save_file(tensors, path, metadata={"kind": _KIND, "model": self.model})


def load_coding(path: Path | str) -> Coding:
    """Read and validate a coding. Raises ValueError that names the file and what is wrong with
    it.
    """
    path = Path(path)
    check_regular(path)
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: {size} bytes, at most {MAX_FILE_BYTES} are read")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("kind") != _KIND:
                raise ValueError(f"its kind is {about.get('kind')!r}, not {_KIND!r}")
            if set(file.keys()) != {"forward", "mean"}:
                raise ValueError(f"it holds {', '.join(sorted(file.keys()))}, not forward, mean")
            forward, mean = file.get_tensor("forward"), file.get_tensor("mean")
        return Coding(about.get("model", "a model"), forward, mean)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


class Moments:
    """Sums over the cached tokens of an observed drawing, and over the queries that see them;
    float64, on the device. A scale of n tokens counts sqrt(n): early ones are few, and seen by all.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._tokens = self._queries = 0.0

    def add(
        self, schedule: ScaleSchedule, scale: int, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """One step's q, k, v [rows, n, heads, head_dim]."""
        rows, fresh, heads, head_dim = q.shape
        if self._sums is None:
            self._sums = _zeros(self._layers, heads, head_dim, q.device)
        means, squares, metric = self._sums
        weight = fresh**-0.5
        if scale + 1 < len(schedule):  # nobody caches the last scale's
            self._tokens += weight * rows * fresh if layer == 0 else 0.0
            for part, tokens in ((KEYS, k), (VALUES, v)):
                by_head = tokens.float().permute(2, 0, 1, 3).flatten(1, 2)
                means[part, layer] += weight * by_head.sum(dim=1)
                squares[part, layer] += weight * (by_head.transpose(1, 2) @ by_head)
        if scale:  # the first scale's see no cached token
            self._queries += weight * rows * fresh if layer == 0 else 0.0
            by_head = q.float().permute(2, 0, 1, 3).flatten(1, 2)
            metric[layer] += weight * (by_head.transpose(1, 2) @ by_head)

    def coding(self, model: str) -> Coding:
        """Raises ValueError where nothing was cached."""
        if self._sums is None or not self._tokens or not self._queries:
            raise ValueError("draw() did not run the model's sampler through two scales")
        means, squares, metric = (part.cpu() for part in self._sums)
        mean = means / self._tokens
        covariance = squares / self._tokens - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        forward = torch.stack(
            (_turn(covariance[KEYS], metric / self._queries), _turn(covariance[VALUES], None))
        )
        return Coding(model, forward.float(), mean.float())


def _zeros(
    layers: int, heads: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, second moments of K and V, and of queries."""
    shapes = (
        (2, layers, heads, head_dim),
        (2, layers, heads, head_dim, head_dim),
        (layers, heads, head_dim, head_dim),
    )
    with torch.inference_mode(False):  # they outlive a caller's inference_mode
        first, second, third = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes
        )
    return first, second, third


def _turn(covariance: Tensor, metric: Tensor | None) -> Tensor:
    """Into coordinates that are uncorrelated, of variance 1, ordered by what they add to e^T metric
    e; all float64 [..., head_dim, head_dim]. metric None: |e|^2.
    """
    root = None
    if metric is not None:
        values, vectors = torch.linalg.eigh(metric)
        values = torch.maximum(values, values[..., -1:] * _LEAST_METRIC).clamp_min(1e-30)
        root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)
        covariance = root @ covariance @ root
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(-1), directions.flip(-1)
    least = (variances[..., :1] * _LEAST_VARIANCE).clamp_min(1e-24)
    turn = directions.transpose(-1, -2)
    turn = turn if root is None else turn @ root
    turned: Tensor = turn / torch.maximum(variances, least).sqrt().unsqueeze(-1)
    return turned
