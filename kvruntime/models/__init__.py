"""build(): a published model from its authors' code and weights."""

from __future__ import annotations

from pathlib import Path

import torch

from kvruntime.models import emoji, infinity, var
from kvruntime.models.checkout import Built, Wanted

BUILDERS = {
    "emoji64": emoji.build,
    **{f"var-d{depth}": var.build for depth in (16, 20, 24, 30, 36)},
    **{f"infinity-{size}": infinity.build for size in ("125m", "2b", "8b")},
}


def build(
    name: str,
    repo: str | Path | None = None,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    stand_ins: bool = False,
    depth: int | None = None,
    text_encoder: str | Path | None = None,
) -> Built:
    """A published model in the code of a checkout of its authors' repository.

    name: of the catalogue, var-d16 to var-d36 or infinity-125m, -2b, -8b; emoji64, the bundled one,
        needs nothing else.
    weights: a folder with the files as published; None: random ones under which the cache matters,
        for trying out. Files are mapped, and no code in them runs.
    dtype: what it draws in: float32, or that of autocast, for which Infinity's blocks are
        converted, as its authors do.
    stand_ins: where the code imports what is not installed and drawing can do without
        (models.stand_ins), put something in its place, and log it. depth: of a smaller model, with
        random weights.
    text_encoder: for Infinity's prompts, a folder with google/flan-t5-xl; needs the extra "text".

    Raises ValueError for an unknown name, FileNotFoundError that says where a file is published,
    and ImportError that names what is not installed.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(BUILDERS)}")
    if depth is not None and weights is not None:
        raise ValueError(f"depth {depth} goes with random weights")
    if repo is None and name != "emoji64":
        raise ValueError(f"{name} is built by its authors' code: give repo, a checkout of it")
    folder = None if weights is None else Path(weights)
    encoder = None if text_encoder is None else Path(text_encoder)
    wanted = Wanted(
        name, Path(repo or "."), folder, torch.device(device), dtype, stand_ins, depth, encoder
    )
    return BUILDERS[name](wanted)


__all__ = ["BUILDERS", "Built", "build"]
