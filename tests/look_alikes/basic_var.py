"""Attention with the names of VAR's classes, its arithmetic written down anew: on torch.cat, with
a plain softmax where VAR calls flash-attn or xformers, and torch's own attention else.
"""

import torch
import torch.nn.functional as F
from torch import nn


def written_down(q, k, v, scale):
    """Attention all in the number format of V, as kernels do."""
    with torch.autocast("cpu", enabled=False):
        weights = q.to(v.dtype).float() * scale @ k.to(v.dtype).float().transpose(2, 3)
        return (weights.softmax(-1) @ v.float()).to(v.dtype)


class SelfAttention(nn.Module):
    def __init__(self, heads, dim, cosine):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim
        width = heads * dim
        self.attn_l2_norm = cosine
        self.scale = 1.0 if cosine else dim**-0.5
        if cosine:  # beyond the maximum for one head of two, so that clamping shows
            start = torch.tensor([1.0, 9.0] * (heads // 2)).view(1, heads, 1, 1)
            self.scale_mul_1H11 = nn.Parameter(start)
            self.max_scale_mul = 4.605
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(width)) for _ in "qv")
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Identity()
        self.using_flash, self.using_xform = False, True
        self.caching, self.cached = False, None

    def kv_caching(self, enable):
        self.caching, self.cached = enable, None

    def forward(self, x, attn_bias):
        rows, tokens, width = x.shape
        heads, dim = self.num_heads, self.head_dim
        q, k, v = (
            part.view(rows, tokens, heads, dim).transpose(1, 2)
            for part in F.linear(x, self.mat_qkv.weight).chunk(3, dim=-1)
        )
        q = q + self.q_bias.view(heads, 1, dim).to(q.dtype)
        v = v + self.v_bias.view(heads, 1, dim).to(v.dtype)
        if self.attn_l2_norm:
            gain = self.scale_mul_1H11.clamp(max=self.max_scale_mul).exp()
            q, k = F.normalize(q, dim=-1) * gain, F.normalize(k, dim=-1)
        if self.caching:
            if self.cached is not None:
                k, v = (torch.cat(pair, dim=2) for pair in zip(self.cached, (k, v), strict=True))
            self.cached = k, v
        if self.using_flash or self.using_xform:
            out = written_down(q, k, v, self.scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_bias, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(rows, tokens, width))


class Block(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.attn = SelfAttention(*sizes)
