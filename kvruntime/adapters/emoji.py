"""The bundled model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kvruntime.adapters.patching import ModelView, lacking
from kvruntime.reference.tokenizer import PATCH_SIDES
from policies import ScaleSchedule

_ATTENTION = ("project", "use_cache", "caching", "proj", "num_heads", "head_dim", "log_scale")


def missing(model: nn.Module) -> list[str]:
    """What of the bundled model's interface the model lacks; empty if it is one."""
    lacks = lacking(model, "model", ("blocks", "draw", "tokenizer"))
    if lacks:
        return lacks
    blocks = list(model.blocks)  # type: ignore[arg-type]
    if not blocks or not all(hasattr(block, "attention") for block in blocks):
        return ["model.blocks[i].attention"]
    return lacking(blocks[0].attention, "model.blocks[i].attention", _ATTENTION)


def view(model: Any) -> ModelView:
    attentions = [block.attention for block in model.blocks]
    return ModelView(
        model=model,
        attentions=attentions,
        schedule=ScaleSchedule.of(PATCH_SIDES),
        heads=attentions[0].num_heads,
        head_dim=attentions[0].head_dim,
        softmax_scale=1.0,
        toggle="use_cache",
        sampler="draw",
        project=lambda attention, x: attention.project(x),
        finish=_finish,
        profile=lambda: model.profile,
    )


def _finish(attention: Any, out: Tensor) -> Tensor:
    return attention.proj(out.flatten(2))  # type: ignore[no-any-return]
