"""The bundled model, its weights included."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kvruntime.models.checkout import Built
from kvruntime.reference import FOLDER, load_model


def build(
    name: str,
    repo: Path,
    weights: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    stand_ins: bool,
    depth: int | None = None,
) -> Built:
    """As the package's ``build``. Raises ValueError for another depth."""
    if depth is not None:
        raise ValueError(f"{name} comes as it is, got depth {depth}")
    model = load_model(dtype, weights or FOLDER).to(device)

    def draw(pictures: int, seed: int, labels: Tensor | None = None) -> Tensor:
        """Of classes seed, seed + 1 and so on unless labels are given."""
        chosen = torch.arange(seed, seed + pictures) % model.num_classes
        return model.generate((chosen if labels is None else labels).to(device), seed)

    return Built(model, model.tokenizer, draw)
