"""yandex-research/switti from its own repository, random weights, unmodified, by a description.

    KVRUNTIME_SWITTI=/path/to/switti python -m pytest tests/integration/test_switti.py -s

wants a checkout (its folders models/ and utils/ and dist.py are enough) and einops. Text encoders
are left out: prompts are random features. CI skips this, and says so.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kvruntime
from kvruntime import Embedding
from kvruntime.models.stand_ins import standing_in
from tests.support import every_attribute

CHECKOUT = os.environ.get("KVRUNTIME_SWITTI", "")
pytestmark = [
    pytest.mark.skipif(
        not CHECKOUT, reason="NOT RUN: set KVRUNTIME_SWITTI to a checkout of yandex-research/switti"
    ),
    pytest.mark.filterwarnings("default"),
]
SWITTI = Embedding(
    name="Switti",
    attentions=lambda pipeline: [block.attn for block in pipeline.switti.blocks],
    sampler="__call__",
    schedule=lambda pipeline, call: pipeline.switti.patch_nums,
    softmax_scale=lambda attention: attention.scale,
    rows=lambda pipeline, call, rows: (
        {call["turn_off_cfg_start_si"]: rows // 2} if call["turn_off_cfg_start_si"] > 0 else {}
    ),
)
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


class Fourier(torch.nn.Module):
    """Stands in for diffusers' GaussianFourierProjection, which embeds the crop."""

    def __init__(self, size, **_):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(size), requires_grad=False)

    def forward(self, x):
        turned = x[:, None].float() * self.weight
        return torch.cat((turned.sin(), turned.cos()), dim=1)


@contextmanager
def encoders_left_out():
    """Names that its code imports from what we do not use: text encoders, pictures as PIL's."""
    wanted = {
        "diffusers": {},
        "diffusers.models": {},
        "diffusers.models.embeddings": {"GaussianFourierProjection": Fourier},
        "tap": {"Tap": object},
        "transformers": {"CLIPTextModel": object, "CLIPTokenizer": object},
        "torchvision.transforms": {"ToPILImage": object},
    }
    for name, attributes in wanted.items():
        module = sys.modules.setdefault(name, ModuleType(name))
        for attribute, value in attributes.items():
            setattr(module, attribute, value)
    yield


@pytest.fixture(scope="module")
def pipeline():
    if not (Path(CHECKOUT) / "models" / "switti.py").exists():
        pytest.fail(f"{CHECKOUT} is not a checkout of yandex-research/switti")
    sys.path.insert(0, CHECKOUT)
    with standing_in(), encoders_left_out():
        import models
        from models.pipeline import SwittiPipeline
        from models.switti import Switti
        from models.vqvae import VQVAE
    assert CHECKOUT in models.__file__, "another package `models` is loaded"
    torch.manual_seed(0)
    switti = Switti(depth=4, embed_dim=256, num_heads=4, patch_nums=SIDES, use_ar=True)
    switti.init_weights(init_adaln=0.5, init_adaln_gamma=0.5, init_head=1.0)
    vae = VQVAE(vocab_size=4096, z_channels=32, ch=32, test_mode=True, v_patch_nums=SIDES)
    made = SwittiPipeline.__new__(SwittiPipeline)  # its own __init__ wants text encoders
    made.switti, made.vae, made.device = switti.eval(), vae.eval(), "cpu"
    generator = torch.Generator().manual_seed(1)

    def encode_prompt(prompt, null_prompt="", encode_null=True):
        rows = 2 * len(prompt)
        features = torch.randn(rows, 7, 1280 + 768, generator=generator.manual_seed(1))
        pooled = torch.randn(rows, 1280, generator=generator)
        mask = torch.zeros(rows, 7)
        mask[:, 5:] = -torch.inf  # padding, as text encoders mask it
        return features, pooled, mask

    made.encode_prompt = encode_prompt
    return made


def draw(pipeline, turned_off=6, seed=3):
    return pipeline(
        ["a cat", "a dog"], seed=seed, return_pil=False, turn_off_cfg_start_si=turned_off
    )


@pytest.mark.parametrize("turned_off", [0, 3, 6, 99])
@pytest.mark.parametrize("autocast", [False, True])
def test_full_is_bit_identical_with_guidance_off_half_way(pipeline, turned_off, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        own, before = draw(pipeline, turned_off), every_attribute(pipeline.switti)
        with kvruntime.attach(pipeline, "full", 1.0, embedding=SWITTI) as attached:
            assert torch.equal(draw(pipeline, turned_off), own)
            assert torch.equal(draw(pipeline, turned_off), own)
        stats = attached.stats
        assert stats.planned_pages == stats.peak_pages > 0 == stats.live_pages
        assert stats.rows == (2 if turned_off < len(SIDES) else 4)
        assert every_attribute(pipeline.switti) == before
        parity = kvruntime.check(pipeline, lambda: draw(pipeline, turned_off), SWITTI)
        assert parity.max_error == 0.0 and parity.steps == 4 * len(SIDES)


@pytest.mark.parametrize("policy", ["scalekv", "ams_kv", "centroid"])
def test_policies_with_guidance_off_half_way(pipeline, policy):
    own = draw(pipeline)
    with kvruntime.attach(pipeline, policy, 0.10, embedding=SWITTI, kv_dtype="int4") as attached:
        first = draw(pipeline)
        assert torch.equal(draw(pipeline), first)
    assert attached.stats.planned_pages == attached.stats.peak_pages > 0
    assert not torch.equal(first, own), "the cache matters"
    assert torch.equal(draw(pipeline), own)


def test_without_its_autoregressive_mode_nothing_is_cached_and_that_is_said(pipeline):
    """The released weights are of that kind."""
    pipeline.switti.use_ar = False
    try:
        with kvruntime.attach(pipeline, "full", 1.0, embedding=SWITTI):
            with pytest.raises(kvruntime.EmbeddingError, match="no attention came here"):
                draw(pipeline)
    finally:
        pipeline.switti.use_ar = True
