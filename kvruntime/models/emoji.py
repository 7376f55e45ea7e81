"""The bundled model, its weights included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvruntime.models.checkout import Built, Wanted
from kvruntime.models.prompts import class_numbers
from kvruntime.reference import FOLDER, load_classes, load_model


def build(wanted: Wanted) -> Built:
    """As the package's ``build``. Raises ValueError for another depth."""
    if wanted.depth is not None:
        raise ValueError(f"{wanted.name} comes as it is, got depth {wanted.depth}")
    folder = wanted.weights or FOLDER
    model = load_model(wanted.dtype, folder).to(wanted.device)

    def draw(pictures: int, seed: int, labels: Tensor | None = None) -> Tensor:
        """Of classes seed, seed + 1 and so on unless labels are given."""
        chosen = torch.arange(seed, seed + pictures) % model.num_classes
        return model.generate((chosen if labels is None else labels).to(wanted.device), seed)

    def prompted(prompts: Sequence[str]) -> dict[str, Any]:
        return {"labels": class_numbers(prompts, model.num_classes, load_classes(folder))}

    return Built(model, model.tokenizer, draw, prompted, check_prompts=prompted)
