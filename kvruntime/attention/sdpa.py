"""torch's scaled_dot_product_attention over gathered tokens: any device, any number format."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

NAME = "torch-sdpa"


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softmax_scale: float) -> Tensor:
    """Attention of q [rows, n, heads, head_dim] to k and v [rows, heads, tokens, head_dim], without
    a mask.

    bias: [heads, 1, tokens] added to the logits, or None. Returns [rows, n, heads, head_dim].
    """
    mask = None
    if bias is not None:
        mask = bias.unsqueeze(0).expand(q.shape[0], -1, q.shape[1], -1)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, scale=softmax_scale)
    return out.transpose(1, 2)
