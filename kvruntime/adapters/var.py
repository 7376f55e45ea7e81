"""FoundationVision/VAR: its ``VAR`` class as its authors publish it, whatever attention kernels it
found.
"""

from __future__ import annotations

from typing import Any

from kvruntime.adapters.embedding import Embedding
from kvruntime.adapters.recognition import lacking, not_a, other_arguments

VAR = Embedding(
    name="FoundationVision/VAR",
    attentions=lambda model: [block.attn for block in model.blocks],
    sampler="autoregressive_infer_cfg",
    schedule=lambda model, call: model.patch_nums,
    softmax_scale=lambda attention: attention.scale,
    flags={"using_flash": False, "using_xform": False},
)


def missing(model: Any) -> list[str]:
    """What keeps the model from being a VAR; empty if it is one."""
    lacks = not_a(model, "var", "VAR")
    lacks = lacks or lacking(model, "model", ("blocks", "patch_nums", VAR.sampler))
    if lacks or not len(model.blocks):
        return lacks or ["model.blocks[0]"]
    attention = getattr(model.blocks[0], "attn", None)
    names = ("num_heads", "head_dim", "scale", "using_flash", "using_xform", "kv_caching")
    return (
        not_a(attention, "basic_var", "SelfAttention")
        or lacking(attention, "model.blocks[i].attn", names)
        or other_arguments(attention, "model.blocks[i].attn", "forward", ("x", "attn_bias"))
    )
