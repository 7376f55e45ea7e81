"""Data files of the policies: profiles that calibration measured, and published presets. All
validated.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    FiniteFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from policies.schedule import ScaleSchedule

MAX_FILE_BYTES = 64 * 2**20  # Infinity-8B has 26 MiB


Table = tuple[tuple[FiniteFloat, ...], ...]


class DataFile(BaseModel):
    """What was measured or published for one model and schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    sizes: tuple[tuple[PositiveInt, ...], ...]  # the schedule it was made for

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule(self.sizes)


class Profile(DataFile):
    """Statistics that policies take roles and budgets from.

    Per scale and layer, [scales][layers]:
    selectivity: ScaleKV's Attention Selectivity Index; 0 at scale 0, which has no history.
    similarity: AMS-KV's inter-scale key similarity, a negative distance; 0 at scale 0.
    cached_mass: attention that goes to cached tokens, in [0, 1]; 0 at scale 0.

    Per head, since version 2; empty in files of version 1:
    mass: attention that a query of a scale gives to all tokens of a scale, its own or an earlier
        one, in [0, 1], [scales][source scales][layers][heads]: scale n has n + 1 sources, whose
        masses sum to 1.
    column_variance: HACK's head score, [layers][heads]: at the last scale the variance over queries
        of the attention that a key gets, summed over keys.
    query_means: mean query, [scales][layers][heads][head_dim], as the model hands it to attention.
    fold_errors: what folding costs, [budgets][scales][layers][heads]: squared error of attention at
        a scale where each lane was folded to ``fold_tokens[budget]`` centroids before, over the
        squares of its layer. Both may be empty.
    """

    version: Literal[1, 2]
    kind: Literal["profile"] = "profile"
    pictures: PositiveInt
    selectivity: Table
    similarity: Table
    cached_mass: Table
    mass: tuple[tuple[Table, ...], ...] = ()
    column_variance: Table = ()
    query_means: tuple[tuple[Table, ...], ...] = ()
    fold_tokens: tuple[PositiveInt, ...] = ()
    fold_errors: tuple[tuple[Table, ...], ...] = ()

    @model_validator(mode="after")
    def _shapes(self) -> Profile:
        _ = self.schedule  # raises ValueError for sizes that are no schedule
        scales, layers = len(self.sizes), len(self.selectivity[0]) if self.selectivity else 0
        for name in ("selectivity", "similarity", "cached_mass"):
            if not _has_shape(getattr(self, name), scales, layers):
                raise ValueError(f"{name} must be {scales} scales of {layers} layers")
        if layers == 0:
            raise ValueError("a profile needs at least one layer")
        if self.version == 1:
            by_head = self.mass, self.column_variance, self.query_means
            if any((*by_head, self.fold_tokens, self.fold_errors)):
                raise ValueError("a profile of version 1 has no statistics per head")
            return self
        heads = len(self.column_variance[0]) if self.column_variance else 0
        shape = f"{layers} layers of {heads} heads"
        if not heads or not _has_shape(self.column_variance, layers, heads):
            raise ValueError(f"column_variance must be {layers} layers of so many heads each")
        if [len(sources) for sources in self.mass] != list(range(1, scales + 1)):
            raise ValueError("mass must be of 1, 2, ... source scales, one more at each scale")
        if not all(_has_shape(line, len(line), layers, heads) for line in self.mass):
            raise ValueError(f"mass of each source scale must be {shape}")
        dim = len(self.query_means[0][0][0]) if self.query_means and self.query_means[0] else 0
        if not _has_shape(self.query_means, scales, layers, heads, dim):
            raise ValueError(f"query_means must be of {scales} scales, {shape}")
        self._check_fold_errors(scales, layers, heads)
        return self

    def _check_fold_errors(self, scales: int, layers: int, heads: int) -> None:
        tokens, errors = self.fold_tokens, self.fold_errors
        if list(tokens) != sorted(set(tokens)) or len(tokens) == 1:
            raise ValueError(f"fold_tokens must be two budgets or more, ascending, got {tokens}")
        if not _has_shape(errors, len(tokens), scales, layers, heads):
            raise ValueError(
                f"fold_errors must be of {len(tokens)} budgets, {scales} scales, "
                f"{layers} layers of {heads} heads"
            )
        if any(x < 0 for line in errors for table in line for row in table for x in row):
            raise ValueError("fold_errors must not be negative")

    @property
    def layers(self) -> int:
        return len(self.selectivity[0])

    def per_head(self, policy: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """mass, [scales, source scales, layers, heads], 0 where a source is later than the scale,
        and column_variance, [layers, heads]. Raises ValueError for a profile of version 1.
        """
        if self.version == 1:
            raise ValueError(
                f"{policy} needs statistics per head, which a profile of version 1 has not: "
                "calibrate again"
            )
        variance = np.array(self.column_variance)
        mass = np.zeros((len(self.sizes), len(self.sizes), *variance.shape))
        for scale, sources in enumerate(self.mass):
            mass[scale, : scale + 1] = sources
        return mass, variance

    def save(self, path: Path | str) -> None:
        Path(path).write_text(self.model_dump_json(indent=1) + "\n")


def _has_shape(values: Sequence[Any], size: int, *sizes: int) -> bool:
    """Whether the nested tuples are an array of these sizes."""
    return len(values) == size and (not sizes or all(_has_shape(each, *sizes) for each in values))


class Preset(DataFile):
    """Published ScaleKV roles and budgets; index n is what the cache holds when scale n reads it.

    drafters: layers that are drafters, for each scale of ``sizes`` from ``first_scale`` on.
    budgets: (drafter, refiner) tokens for the same scales, at a mean of ``budget_tokens``.
    """

    version: Literal[1]
    kind: Literal["scalekv-preset"] = "scalekv-preset"
    source: str
    layers: PositiveInt
    first_scale: PositiveInt
    budget_tokens: PositiveInt
    drafters: tuple[tuple[int, ...], ...]
    budgets: tuple[tuple[PositiveInt, PositiveInt], ...]

    @model_validator(mode="after")
    def _shapes(self) -> Preset:
        count = len(self.sizes) - self.first_scale
        early = self.schedule.seen[self.first_scale - 2] if self.first_scale > 1 else 0
        if early > self.budget_tokens:
            raise ValueError(
                f"scale {self.first_scale - 1} reads {early} tokens, more than the budget of "
                f"{self.budget_tokens}, and the budgets start one scale later"
            )
        if len(self.drafters) != count or len(self.budgets) != count:
            raise ValueError(f"drafters and budgets must name {count} scales")
        for layers, (drafter, refiner) in zip(self.drafters, self.budgets, strict=True):
            if any(not 0 <= layer < self.layers for layer in layers):
                raise ValueError(f"drafters {layers} are not all in 0..{self.layers - 1}")
            total = len(set(layers)) * drafter + (self.layers - len(set(layers))) * refiner
            if total != self.budget_tokens * self.layers:
                raise ValueError(f"budgets {drafter}/{refiner} do not average {self.budget_tokens}")
        return self


_File = TypeVar("_File", bound=BaseModel)


def load_profile(path: Path | str) -> Profile:
    """Read and validate a profile. Raises ValueError that names the file and what is wrong with
    it.
    """
    return load_file(Path(path), Profile)


def load_preset(model: str) -> Preset | None:
    """The published ScaleKV preset of a catalogue model, or None if there is none."""
    path = Path(__file__).parent / "presets" / f"scalekv-{model}.json"
    return load_file(path, Preset) if path.exists() else None


def preset_names() -> tuple[str, ...]:
    """The models whose published presets are shipped."""
    paths = (Path(__file__).parent / "presets").glob("scalekv-*.json")
    return tuple(sorted(path.stem.removeprefix("scalekv-") for path in paths))


def check_regular(path: Path) -> None:
    """Raise ValueError unless it is a file: a pipe may never end, nor a device."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: not a regular file")


def load_file(path: Path, kind: type[_File]) -> _File:
    """Read and validate a JSON file. Raises ValueError that names it and what is wrong with it."""
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: at most {MAX_FILE_BYTES} bytes are read")
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "file"
        raise ValueError(f"{path}: {place}: {first['msg']}") from None
