"""FoundationVision/Infinity: its ``Infinity`` class as its authors publish it, of any size."""

from __future__ import annotations

from typing import Any

from kvruntime.adapters.embedding import Call, Embedding
from kvruntime.adapters.recognition import lacking, not_a, other_arguments


def _sizes(model: Any, call: Call) -> list[tuple[int, ...]] | None:
    """(1, h, w) of a picture are (h, w); the schedule comes with each call."""
    schedule = call.get("scale_schedule")
    if schedule is None:
        return None
    return [(h, w) if t == 1 else (t, h, w) for t, h, w in schedule]


INFINITY = Embedding(
    name="FoundationVision/Infinity",
    attentions=lambda model: [block.sa for block in model.unregistered_blocks],
    sampler="autoregressive_infer_cfg",
    schedule=_sizes,
    softmax_scale=lambda attention: attention.scale,
    flags={"use_flex_attn": False},
)


def missing(model: Any) -> list[str]:
    """What keeps the model from being an Infinity that can be attached to; empty if it is one."""
    lacks = not_a(model, "infinity", "Infinity")
    lacks = lacks or lacking(model, "model", ("unregistered_blocks", INFINITY.sampler))
    if lacks or not len(model.unregistered_blocks):
        return lacks or ["model.unregistered_blocks[0]"]
    attention: Any = getattr(model.unregistered_blocks[0], "sa", None)
    names = ("num_heads", "head_dim", "scale", "using_flash", "use_flex_attn", "kv_caching")
    forward = ("x", "attn_bias_or_two_vector", "attn_fn")
    lacks = (
        not_a(attention, "basic", "SelfAttention")
        or lacking(attention, "model.unregistered_blocks[i].sa", names)
        or other_arguments(attention, "model.unregistered_blocks[i].sa", "forward", forward)
    )
    if not lacks and attention.using_flash:  # its weights are laid out for that kernel
        return ["customized_flash_attn=False, with which it must be built"]
    return lacks
