"""Attention with the names of Infinity's classes, its arithmetic written down anew: on torch.cat,
keys rotated by scale, in float32 also under autocast.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tests.look_alikes.painter import angles_of, rotated


class SelfAttention(nn.Module):
    def __init__(self, heads, dim):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, dim, 1
        self.using_flash, self.use_flex_attn = False, False
        width = heads * dim
        start = torch.tensor([1.0, 9.0] * (heads // 2)).view(
            1, heads, 1, 1
        )  # one beyond the maximum
        self.scale_mul_1H11, self.max_scale_mul = nn.Parameter(start), 4.605
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(width)) for _ in "qv")
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.caching, self.cached_k, self.cached_v = False, None, None

    def kv_caching(self, enable):
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(
        self, x, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, grid=None, scale_ind=0
    ):
        rows, tokens, width = x.shape
        heads, dim = self.num_heads, self.head_dim
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        mixed = F.linear(x, self.mat_qkv.weight, bias).view(rows, tokens, 3, heads, dim)
        q, k, v = mixed.permute(2, 0, 3, 1, 4)
        gain = self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
        q, k = F.normalize(q.float(), dim=-1) * gain, F.normalize(k.float(), dim=-1)
        angles = angles_of(*scale_schedule[scale_ind][1:], dim)
        q, k = rotated(q, angles), rotated(k, angles)
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat((self.cached_k, k), 2), torch.cat((self.cached_v, v), 2)
            self.cached_k, self.cached_v = k, v
        if self.use_flex_attn and attn_fn is not None:
            out = attn_fn(q, k, v, scale=self.scale)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, scale=self.scale, attn_mask=attn_bias_or_two_vector, dropout_p=0
            )
        return self.proj(out.transpose(1, 2).reshape(rows, tokens, width))


class CrossAttnBlock(nn.Module):
    def __init__(self, heads, dim):
        super().__init__()
        self.sa = SelfAttention(heads, dim)

    def forward(self, x, scale_schedule, scale_ind, attn_fn=None):
        return x + self.sa(x, None, attn_fn, scale_schedule, None, scale_ind).float()
