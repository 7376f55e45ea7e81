"""A next-scale painter of nobody's code base: keys are rotated, text comes by cross-attention,
guidance stops half way, and the sampler is no method of a torch module.
"""

import torch
import torch.nn.functional as F
from torch import nn

SIDES = (1, 2, 3, 4, 6)


def rotated(x, angles):
    """x: [rows, heads, n, dim]; angles: [n, dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def angles_of(height, width, dim):
    """Of the places of a map, [height * width, dim / 2]."""
    speeds = 30.0 ** -torch.linspace(0, 1, dim // 4)
    down, right = torch.meshgrid(
        *((torch.arange(side) + 0.5) / side * 9 for side in (height, width)), indexing="ij"
    )
    return torch.cat((down.reshape(-1, 1) * speeds, right.reshape(-1, 1) * speeds), dim=1)


class SelfAttention(nn.Module):
    def __init__(self, heads, dim):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.qkv = nn.Linear(heads * dim, 3 * heads * dim)
        self.out = nn.Linear(heads * dim, heads * dim)
        self.remembers, self.memory = False, None

    def remember(self, on):
        self.remembers, self.memory = on, None

    def forward(self, x, angles):
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        q, k = rotated(q, angles), rotated(k, angles)
        if self.remembers:
            if self.memory is not None:
                k, v = (torch.cat(pair, dim=2) for pair in zip(self.memory, (k, v), strict=True))
            self.memory = [k, v]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).reshape(rows, tokens, width))


class CrossAttention(nn.Module):
    def __init__(self, heads, dim):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.q, self.kv = nn.Linear(heads * dim, heads * dim), nn.Linear(8, 2 * heads * dim)

    def forward(self, x, text):
        rows, tokens, width = x.shape
        q = self.q(x).view(rows, tokens, self.heads, self.dim).transpose(1, 2)
        k, v = self.kv(text).view(rows, -1, 2, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(rows, tokens, width)


class Block(nn.Module):
    def __init__(self, heads, dim):
        super().__init__()
        self.norm = nn.LayerNorm(heads * dim)
        self.attention, self.cross = SelfAttention(heads, dim), CrossAttention(heads, dim)

    def forward(self, x, angles, text):
        x = x + self.attention(self.norm(x), angles)
        return x + self.cross(self.norm(x), text)


class Painter:
    """Rows are 2 x pictures up to scale ``guided``, and the pictures themselves from there on."""

    def __init__(self, depth=2, heads=2, dim=32, seed=0):
        torch.manual_seed(seed)
        self.net = nn.Module()
        self.net.blocks = nn.ModuleList(Block(heads, dim) for _ in range(depth))
        self.net.eval().requires_grad_(False)
        self.dim, self.width = dim, heads * dim

    def __call__(self, text, seed=0, guided=3, scales=5):
        """text: [pictures, words, 8]. Returns the last scale, [pictures, tokens, width]."""
        *_, last = self.steps(text, seed, guided, scales)
        return last

    @torch.no_grad()
    def steps(self, text, seed=0, guided=3, scales=5):
        """Each scale as it is drawn."""
        pictures, rows_text = text.shape[0], torch.cat((text, torch.zeros_like(text)))
        generator = torch.Generator().manual_seed(seed)
        attentions = [block.attention for block in self.net.blocks]
        for attention in attentions:
            attention.remember(True)
        summed = torch.zeros(pictures, self.width)
        for scale, side in enumerate(SIDES[:scales]):
            x = torch.randn(1, side * side, self.width, generator=generator) + summed[:, None]
            if scale == guided:
                rows_text = text
                for attention in attentions:
                    if attention.memory is not None:
                        attention.memory = [part[:pictures] for part in attention.memory]
            x = x.repeat(rows_text.shape[0] // pictures, 1, 1)
            for block in self.net.blocks:
                x = block(x, angles_of(side, side, self.dim), rows_text)
            if scale < guided:
                x = 2.0 * x[:pictures] - x[pictures:]
            summed = summed + x.mean(dim=1)
            yield x
        for attention in attentions:
            attention.remember(False)
