"""A VAR with the names of its classes."""

import torch
from torch import nn

from policies import ScaleSchedule
from tests.look_alikes.basic_var import Block


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
                x = x + block.attn(x, attn_bias=None).to(x.dtype)
            out.append(x)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return torch.cat(out, 1)
