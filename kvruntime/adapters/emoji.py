"""The bundled model."""

from __future__ import annotations

from typing import Any

from kvruntime.adapters.embedding import Embedding
from kvruntime.reference.tokenizer import PATCH_SIDES
from kvruntime.reference.transformer import EmojiVAR

EMOJI = Embedding(
    name="kvruntime's bundled model",
    attentions=lambda model: [block.attention for block in model.blocks],
    sampler="draw",
    schedule=lambda model, call: PATCH_SIDES,
    softmax_scale=lambda attention: 1.0,
    toggle="use_cache",
)


def missing(model: Any) -> list[str]:
    """What keeps the model from being the bundled one; empty if it is one."""
    return [] if isinstance(model, EmojiVAR) else ["the class EmojiVAR"]
