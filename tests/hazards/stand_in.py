"""A VAR with the names of upstream's classes, its arithmetic written down anew: attention on
torch.cat and a plain softmax.
"""

import torch
import torch.nn.functional as F
from torch import nn

from policies import ScaleSchedule


class Attention(nn.Module):
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
        self.caching, self.cached = False, None

    def kv_caching(self, enable):
        self.caching, self.cached = enable, None

    def forward(self, x, attn_bias=None):
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
        with torch.autocast("cpu", enabled=False):  # all in the number format of V, as kernels do
            weights = q.to(v.dtype).float() * self.scale @ k.to(v.dtype).float().transpose(2, 3)
            out = (weights.softmax(-1) @ v.float()).to(v.dtype)
        return self.proj(out.transpose(1, 2).reshape(rows, tokens, width))


class Block(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.attn = Attention(*sizes)


class VAR(nn.Module):
    def __init__(self, cosine=False, depth=2, heads=2, dim=16, sides=(1, 2, 3)):
        super().__init__()
        self.patch_nums, self.width = sides, heads * dim
        self.blocks = nn.ModuleList(Block(heads, dim, cosine) for _ in range(depth))

    @torch.no_grad()
    def autoregressive_infer_cfg(self, seed=0, rows=2):
        generator, out = torch.Generator().manual_seed(seed), []
        for block in self.blocks:
            block.attn.kv_caching(True)
        for tokens in ScaleSchedule.of(self.patch_nums).tokens:
            x = torch.randn(rows, tokens, self.width, generator=generator)
            for block in self.blocks:
                x = x + block.attn(x).to(x.dtype)
            out.append(x)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return torch.cat(out, 1)
