"""FoundationVision/VAR: its ``VAR`` class as its authors publish it, whatever attention kernels it
found.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvruntime.adapters.patching import ModelView, lacking
from policies import ScaleSchedule

_MODEL = ("blocks", "patch_nums", "autoregressive_infer_cfg")
_ATTENTION = (
    "mat_qkv",
    "q_bias",
    "v_bias",
    "zero_k_bias",
    "proj",
    "proj_drop",
    "num_heads",
    "head_dim",
    "scale",
    "attn_l2_norm",
    "kv_caching",
    "caching",
)


def missing(model: nn.Module) -> list[str]:
    """What of VAR's interface the model lacks; empty if it is one."""
    lacks = lacking(model, "model", _MODEL)
    if lacks:
        return lacks
    blocks = list(model.blocks)  # type: ignore[arg-type]
    if not blocks or not all(hasattr(block, "attn") for block in blocks):
        return ["model.blocks[i].attn"]
    return lacking(blocks[0].attn, "model.blocks[i].attn", _ATTENTION)


def view(model: Any) -> ModelView:
    attentions = [block.attn for block in model.blocks]
    first = attentions[0]
    return ModelView(
        model=model,
        attentions=attentions,
        schedule=ScaleSchedule.of(model.patch_nums),
        heads=first.num_heads,
        head_dim=first.head_dim,
        softmax_scale=float(first.scale),
        toggle="kv_caching",
        sampler="autoregressive_infer_cfg",
        project=_project,
        finish=_finish,
        profile=lambda: None,
    )


def _project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as VAR computes them: no key bias, cosine attention where the model
    has it.
    """
    rows, tokens, _ = x.shape
    bias = torch.cat((attention.q_bias, attention.zero_k_bias, attention.v_bias))
    mixed = F.linear(x, attention.mat_qkv.weight, bias)
    q, k, v = mixed.view(rows, tokens, 3, attention.num_heads, attention.head_dim).unbind(2)
    if attention.attn_l2_norm:
        gain = attention.scale_mul_1H11.clamp_max(attention.max_scale_mul).exp().transpose(1, 2)
        q, k = F.normalize(q, dim=-1).mul(gain), F.normalize(k, dim=-1)
    return q, k, v


def _finish(attention: Any, out: Tensor) -> Tensor:
    return attention.proj_drop(attention.proj(out.flatten(2)))  # type: ignore[no-any-return]
