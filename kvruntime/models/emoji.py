"""The bundled model, its weights included."""

from __future__ import annotations

import torch
from torch import Tensor

from kvruntime.models.checkout import Built, Wanted
from kvruntime.reference import FOLDER, load_model


def build(wanted: Wanted) -> Built:
    """As the package's ``build``. Raises ValueError for another depth."""
    if wanted.depth is not None:
        raise ValueError(f"{wanted.name} comes as it is, got depth {wanted.depth}")
    model = load_model(wanted.dtype, wanted.weights or FOLDER).to(wanted.device)

    def draw(pictures: int, seed: int, labels: Tensor | None = None) -> Tensor:
        """Of classes seed, seed + 1 and so on unless labels are given."""
        chosen = torch.arange(seed, seed + pictures) % model.num_classes
        return model.generate((chosen if labels is None else labels).to(wanted.device), seed)

    return Built(model, model.tokenizer, draw)
