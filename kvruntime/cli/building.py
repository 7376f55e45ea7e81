"""Options of the commands that build a model, and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kvruntime.catalogue import ASPECT_RATIOS, RESOLUTIONS, infinity_schedule
from kvruntime.models import BUILDERS, Built, build
from kvruntime.models.infinity import SIZES
from policies import DTYPE_BYTES, TORCH_DTYPES

Name = Annotated[str, typer.Argument(help=f"One of {', '.join(BUILDERS)}.")]
Repo = Annotated[Path | None, typer.Option(help="A checkout of its authors' repository.")]
Weights = Annotated[
    Path | None, typer.Option(help="A folder with the published files; without, random weights.")
]
Device = Annotated[str, typer.Option(help="Where torch computes: cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPE_BYTES)}; autocast's.")]
TextEncoder = Annotated[
    Path | None, typer.Option(help="Infinity: a folder with google/flan-t5-xl, for prompts.")
]
StandIns = Annotated[
    bool, typer.Option(help="Put something in the place of packages that are not installed.")
]
Resolution = Annotated[str | None, typer.Option(help=f"Infinity: {', '.join(RESOLUTIONS)}.")]
Aspect = Annotated[str, typer.Option(help=f"Infinity: {', '.join(ASPECT_RATIOS)}.")]


def built_model(
    name: str,
    repo: Path | None,
    weights: Path | None,
    device: str,
    dtype: str,
    resolution: str | None,
    aspect: str,
    stand_ins: bool,
    text_encoder: Path | None = None,
) -> tuple[Built, dict[str, Any]]:
    """The model, and settings for its ``draw``. Raises ValueError for what does not fit."""
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    settings: dict[str, Any] = {}
    if name in SIZES:
        settings["schedule"] = infinity_schedule(resolution or SIZES[name].resolution, aspect)
    elif resolution or aspect != "1.000":
        raise ValueError(f"{name} has one schedule: resolution and aspect ratio are for Infinity")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from error
    try:
        built = build(
            name,
            repo,
            weights,
            device,
            TORCH_DTYPES[dtype],
            stand_ins=stand_ins,
            text_encoder=text_encoder,
        )
    except ImportError as error:
        raise ValueError(str(error)) from error
    return built, settings
