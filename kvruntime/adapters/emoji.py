"""The bundled model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvruntime.adapters.embedding import Call, Embedding
from kvruntime.reference.tokenizer import PATCH_SIDES
from kvruntime.reference.transformer import EmojiVAR


def _rows(model: Any, call: Call, rows: int) -> Mapping[int, int]:
    """Rows from the scale on at which each picture becomes several."""
    match call.get("branch"):
        case (int(scale), int(count)) if 0 < scale < len(PATCH_SIDES) and count > 0:
            return {scale: count * rows}
    return {}  # none, or one that the sampler refuses


EMOJI = Embedding(
    name="kvruntime's bundled model",
    attentions=lambda model: [block.attention for block in model.blocks],
    sampler="draw",
    schedule=lambda model, call: PATCH_SIDES,
    softmax_scale=lambda attention: 1.0,
    toggle="use_cache",
    rows=_rows,
)


def missing(model: Any) -> list[str]:
    """What keeps the model from being the bundled one; empty if it is one."""
    return [] if isinstance(model, EmojiVAR) else ["the class EmojiVAR"]
