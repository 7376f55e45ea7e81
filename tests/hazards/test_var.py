"""Hazards of the adapter for VAR: its arithmetic, against attention written down anew.

A stand-in has the attributes that upstream's classes have; tests/integration runs upstream itself.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kvruntime
from policies import ScaleSchedule
from tests.support import every_attribute

SIDES = (1, 2, 3)
SCHEDULE = ScaleSchedule.of(SIDES)
HEADS, DIM = 2, 16
WIDTH = HEADS * DIM


class Attention(nn.Module):
    """Self-attention with the names of upstream's, on torch.cat and a plain softmax."""

    def __init__(self, cosine):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, DIM
        self.attn_l2_norm = cosine
        self.scale = 1.0 if cosine else DIM**-0.5
        if cosine:
            # beyond the maximum for one head, so that clamping shows
            start = torch.tensor([1.0, 9.0]).view(1, HEADS, 1, 1)
            self.scale_mul_1H11 = nn.Parameter(start)
            self.max_scale_mul = torch.log(torch.tensor(100.0)).item()
        self.mat_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = (
            nn.Parameter(torch.randn(WIDTH)),
            nn.Parameter(torch.randn(WIDTH)),
        )
        self.register_buffer("zero_k_bias", torch.zeros(WIDTH))
        self.proj, self.proj_drop = nn.Linear(WIDTH, WIDTH), nn.Identity()
        self.caching, self.cached = False, None

    def kv_caching(self, enable):
        self.caching, self.cached = enable, None

    def forward(self, x, attn_bias=None):
        rows, tokens, _ = x.shape
        q, k, v = (
            part.view(rows, tokens, HEADS, DIM).transpose(1, 2)
            for part in F.linear(x, self.mat_qkv.weight).chunk(3, dim=-1)
        )
        q = q + self.q_bias.view(HEADS, 1, DIM)
        v = v + self.v_bias.view(HEADS, 1, DIM)
        if self.attn_l2_norm:
            gain = self.scale_mul_1H11.clamp(max=self.max_scale_mul).exp()
            q, k = F.normalize(q, dim=-1) * gain, F.normalize(k, dim=-1)
        if self.caching:
            if self.cached is not None:
                k, v = (torch.cat(pair, dim=2) for pair in zip(self.cached, (k, v), strict=True))
            self.cached = k, v
        # as attention kernels under autocast: all in the number format of V
        weights = (q.to(v.dtype).float() * self.scale) @ k.to(v.dtype).float().transpose(2, 3)
        out = weights.softmax(-1) @ v.float()
        return self.proj(out.to(v.dtype).transpose(1, 2).reshape(rows, tokens, WIDTH))


class Block(nn.Module):
    def __init__(self, cosine):
        super().__init__()
        self.attn = Attention(cosine)


class VAR(nn.Module):
    patch_nums = SIDES

    def __init__(self, cosine):
        super().__init__()
        self.blocks = nn.ModuleList(Block(cosine) for _ in range(2))

    @torch.no_grad()
    def autoregressive_infer_cfg(self, seed=0, rows=2):
        generator, out = torch.Generator().manual_seed(seed), []
        for block in self.blocks:
            block.attn.kv_caching(True)
        for tokens in SCHEDULE.tokens:
            x = torch.randn(rows, tokens, WIDTH, generator=generator)
            for block in self.blocks:
                x = x + block.attn(x).to(x.dtype)
            out.append(x)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return torch.cat(out, 1)


@pytest.fixture(params=[False, True], ids=["plain", "cosine"])
def var(request):
    torch.manual_seed(0)
    return VAR(request.param)


def test_h13_biases_of_queries_and_values_and_the_clamped_gain(var):
    """Swapping the biases of K and V, or not clamping the gain, draws another picture."""
    own = var.autoregressive_infer_cfg()
    before = every_attribute(var)
    with kvruntime.attach(var, "full", 1.0) as attached:
        ours = var.autoregressive_infer_cfg()
    assert attached.stats.rows == 2 and attached.stats.gather_steps == 6
    assert float((ours - own).abs().max()) < 1e-4
    assert every_attribute(var) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_h13_under_autocast_attention_gets_the_number_format_of_v(var, dtype):
    """Normalised K is float32 there and V is not: kept in V's, or no step would run."""
    with torch.autocast("cpu", dtype):
        own = var.autoregressive_infer_cfg()
        seen = []

        def observer(scale, layer, row, q, keys):
            seen.append((q.dtype, keys.dtype))

        with kvruntime.attach(var, "full", 1.0, observer=observer) as attached:
            ours = var.autoregressive_infer_cfg()
    assert set(seen) == {(dtype, dtype)}
    assert attached.stats.page_bytes == attached._cache.plan(2).page_bytes
    coarse = 0.25 if dtype == torch.bfloat16 else 0.05
    assert float((ours - own).abs().max()) < coarse
    assert float((ours - own).abs().mean()) < 0.02
