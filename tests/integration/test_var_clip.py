"""daixiangzi/VAR-CLIP from its own repository, random weights, unmodified, by a description.

    KVRUNTIME_VAR_CLIP=/path/to/VAR-CLIP python -m pytest tests/integration/test_var_clip.py -s

wants a checkout (its folders models/ and utils/ and dist.py are enough). The prompt's CLIP features
are random. CI skips this, and says so. In a process of its own: its package is called `models`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import kvruntime
from kvruntime import Embedding
from kvruntime.models.stand_ins import standing_in
from tests.support import every_attribute

CHECKOUT = os.environ.get("KVRUNTIME_VAR_CLIP", "")
pytestmark = [
    pytest.mark.skipif(
        not CHECKOUT, reason="NOT RUN: set KVRUNTIME_VAR_CLIP to a checkout of daixiangzi/VAR-CLIP"
    ),
    pytest.mark.filterwarnings("default"),
]
VAR_CLIP = Embedding(
    name="VAR-CLIP",
    attentions=lambda model: [block.attn for block in model.blocks],
    sampler="autoregressive_infer_cfg",
    schedule=lambda model, call: model.patch_nums,
    softmax_scale=lambda attention: attention.scale,
    flags={"using_flash": False, "using_xform": False},
)


@pytest.fixture(scope="module")
def model():
    if not (Path(CHECKOUT) / "models" / "var.py").exists():
        pytest.fail(f"{CHECKOUT} is not a checkout of daixiangzi/VAR-CLIP")
    sys.path.insert(0, CHECKOUT)
    with standing_in():
        from models.var import VAR
        from models.vqvae import VQVAE

    torch.manual_seed(0)
    vae = VQVAE(vocab_size=4096, z_channels=32, ch=32, test_mode=True, share_quant_resi=4)
    made = VAR(vae_local=vae, depth=4, embed_dim=256, num_heads=4, attn_l2_norm=True)
    made.init_weights(init_adaln=0.5, init_adaln_gamma=0.5, init_head=1.0)
    vae.eval()
    return made.eval()


def draw(model, seed=5):
    features = torch.randn(2, 768, generator=torch.Generator().manual_seed(seed))
    return model.autoregressive_infer_cfg(2, features, g_seed=seed, cfg=4.0, top_k=900)


@pytest.mark.parametrize("autocast", [False, True])
def test_full_is_bit_identical(model, autocast):
    for block in model.blocks:
        block.attn.using_xform = block.attn.using_flash = False  # neither runs on a CPU
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own, before = draw(model), every_attribute(model)
        with kvruntime.attach(model, "full", 1.0, embedding=VAR_CLIP) as attached:
            assert torch.equal(draw(model), own)
            assert torch.equal(draw(model), own)
        assert attached.stats.planned_pages == attached.stats.peak_pages > 0
        assert every_attribute(model) == before
        assert kvruntime.check(model, lambda: draw(model), VAR_CLIP).max_error == 0.0


def test_a_policy_and_back(model):
    own = draw(model)
    with kvruntime.attach(model, "scalekv", 0.10, embedding=VAR_CLIP) as attached:
        first = draw(model)
        assert torch.equal(draw(model), first)
    assert attached.stats.planned_pages == attached.stats.peak_pages
    assert not torch.equal(first, own) and torch.equal(draw(model), own)
