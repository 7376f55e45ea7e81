"""An Infinity with the names of its classes: blocks in chunks, the schedule with each call."""

import torch
from torch import nn

from tests.look_alikes.basic import CrossAttnBlock


class Infinity(nn.Module):
    def __init__(self, depth=4, heads=2, dim=32):
        super().__init__()
        self.width = heads * dim
        self.unregistered_blocks = [CrossAttnBlock(heads, dim) for _ in range(depth)]
        self.block_chunks = nn.ModuleList(
            nn.ModuleList(self.unregistered_blocks[start : start + 2])
            for start in range(0, depth, 2)
        )

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self, scale_schedule=None, B=1, cfg=3.0, g_seed=0, trunk_scale=1000, attn_fn=None
    ):
        """With guidance (cfg other than 1) rows are 2 x B."""
        rows, out = B * (1 + (cfg != 1)), []
        generator = torch.Generator().manual_seed(g_seed)
        for block in self.unregistered_blocks:
            block.sa.kv_caching(True)
        for scale, (t, h, w) in enumerate(scale_schedule):
            if scale >= trunk_scale:
                break
            x = torch.randn(rows, t * h * w, self.width, generator=generator)
            for chunk in self.block_chunks:
                for block in chunk:
                    x = block(x, scale_schedule, scale, attn_fn)
            out.append(x)
        for block in self.unregistered_blocks:
            block.sa.kv_caching(False)
        return torch.cat(out, 1)
