"""RUN.json: what a run drew, planned and used. Written by ``kvruntime demo`` and ``sample``, read
by ``kvruntime report``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
    model_validator,
)

MOST_BYTES = 2**25  # of a file that is read
MOST_PICTURES = 64
Text = Annotated[str, StringConstraints(max_length=2000)]
PNG = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]+=*$", max_length=2**23)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Picture(Strict):
    """data: of the file, in base64, also ``own``, what the model's own cache draws from the same
    seed; None: not drawn. psnr_db: None also of equal ones.
    """

    title: Text
    kind: Literal["png", "jpeg"] = "png"
    data: PNG
    own: PNG | None = None
    psnr_db: FiniteFloat | None = None
    is_equal: bool = False


class Layer(Strict):
    """Tokens that a layer holds before the last scale, of the first row and head: the scale they
    were drawn in, their place in the picture from the left and from the top in (0, 1), and how many
    they stand for; of folded ones the means.
    """

    layer: NonNegativeInt
    scale: list[FiniteFloat]
    column: list[FiniteFloat]
    line: list[FiniteFloat]
    weight: list[FiniteFloat]

    @model_validator(mode="after")
    def _as_long(self) -> Layer:
        if len({len(self.scale), len(self.column), len(self.line), len(self.weight)}) != 1:
            raise ValueError("scale, column, line and weight must be equally long")
        return self


class Curves(Strict):
    """Bytes at each step, layer by layer within a scale: of pages by the plan, of pages that were
    live after it, and of the model's own cache while torch.cat copies.
    """

    planned: list[NonNegativeInt]
    used: list[NonNegativeInt]
    own: list[NonNegativeInt]


class Bytes(Strict):
    """At the peak. kept: of the tokens that the policy keeps; pages hold them, planes with them."""

    kept: NonNegativeInt
    pages: NonNegativeInt
    planes: NonNegativeInt
    workspace: NonNegativeInt
    own: NonNegativeInt
    own_copying: NonNegativeInt


class Quality(Strict):
    """Against the model's own cache, means over all pictures that differ; kl: teacher-forced."""

    psnr_db: FiniteFloat | None
    kl: FiniteFloat | None


class Other(Strict):
    """The same pictures with another policy, for comparison."""

    policy: Text
    page_bytes: NonNegativeInt
    quality: Quality


class Run(Strict):
    """tokens: kept of a lane after each scale by each layer, [scales][layers], means over heads.
    roles: the same of what the policy takes a layer for, where it has some. history_share: page
    bytes of those of the whole history in bfloat16.
    """

    version: Literal[1] = 1
    command: Literal["demo", "sample"]
    model: Text
    dtype: Text
    sizes: list[list[PositiveInt]] = Field(min_length=1, max_length=200)
    layers: PositiveInt
    heads: PositiveInt
    head_dim: PositiveInt
    rows: PositiveInt
    pictures_drawn: PositiveInt
    policy: Text
    budget: int | float | Text
    budget_tokens: PositiveInt
    history_tokens: NonNegativeInt
    history_share: NonNegativeFloat
    kv_dtype: Text | None
    kv_start: NonNegativeInt | None
    page_size: PositiveInt
    backend: Text
    backend_reason: Text
    profile: Text
    roles: list[list[Text]]
    seconds: NonNegativeFloat
    tokens: list[list[NonNegativeFloat]]
    curves: Curves
    bytes: Bytes
    quality: Quality | None
    others: list[Other]
    pictures: list[Picture] = Field(max_length=MOST_PICTURES)
    origin: list[Layer] = Field(max_length=64)
    versions: dict[str, Text | None]

    @model_validator(mode="after")
    def _of_one_shape(self) -> Run:
        scales, steps = len(self.sizes), len(self.sizes) * self.layers
        if [len(line) for line in self.tokens] != [self.layers] * scales:
            raise ValueError(f"tokens must be {scales} lists of {self.layers}")
        if self.roles and [len(line) for line in self.roles] != [self.layers] * scales:
            raise ValueError(f"roles must be {scales} lists of {self.layers}, or none")
        for name in ("planned", "used", "own"):
            if len(getattr(self.curves, name)) != steps:
                raise ValueError(f"curves.{name} must be {steps} numbers")
        return self


def save_run(run: Run, path: Path) -> None:
    path.write_text(json.dumps(run.model_dump(), allow_nan=False) + "\n")


def load_run(path: Path) -> Run:
    """Raises ValueError for a file that is too large or no run, with the place that is wrong."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path}: {size} bytes, at most {MOST_BYTES} are read")
    try:
        return Run.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "as a whole"
        raise ValueError(f"{path} is no run, {place}: {first['msg']}") from None
