"""GPUs that people have, and what of their memory is left for a cache."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvruntime.catalogue import Model

CONTEXT_BYTES = 600 * 2**20  # of the CUDA context and libraries' handles
CARDS = {  # MiB, as nvidia-smi tells them
    "RTX 3060 12GB": 12_288,
    "RTX 3090 24GB": 24_576,
    "RTX 4070 12GB": 12_282,
    "RTX 4060 Ti 16GB": 16_380,
    "RTX 4080 16GB": 16_376,
    "RTX 4090 24GB": 24_564,
    "RTX 5090 32GB": 32_607,
    "RTX A6000 48GB": 49_140,
    "T4 16GB": 15_360,
    "L4 24GB": 23_034,
    "L40S 48GB": 46_068,
    "V100 32GB": 32_768,
    "A100 40GB": 40_960,
    "A100 80GB": 81_920,
    "H100 80GB": 81_559,
    "H200 141GB": 143_771,
}


@dataclass(frozen=True, slots=True)
class Card:
    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Reserve:
    """What of a card is not for pages and workspace, in bytes. running: for each picture, what its
    layers compute meanwhile.
    """

    weights: int
    text_encoder: int
    context: int
    running: int

    @property
    def fixed(self) -> int:
        return self.weights + self.text_encoder + self.context


def find_card(text: str) -> Card:
    """A card by its name or an unmistakable part of it: "4090", "rtx4090", "H100 80GB". Raises
    ValueError that lists those there are.
    """
    wanted = _plain(text)
    found = [name for name in CARDS if wanted and wanted in _plain(name)]
    exact = [name for name in found if _plain(name) == wanted]
    if len(exact or found) != 1:
        what = "stands for several" if found else "is unknown"
        raise ValueError(
            f"card {text!r} {what}: there are {', '.join(found or CARDS)}; for another one give "
            "--memory and --reserved"
        )
    name = (exact or found)[0]
    return Card(name, CARDS[name] * 2**20)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def reserve_of(
    model: Model, with_text_encoder: bool = True, running_bytes: int | None = None
) -> Reserve:
    """What a model of the catalogue takes beside its cache. running_bytes: of a picture; None: as
    the catalogue knows it.
    """
    return Reserve(
        model.weights_bytes,
        model.text_encoder_bytes if with_text_encoder else 0,
        CONTEXT_BYTES,
        model.running_bytes if running_bytes is None else running_bytes,
    )
