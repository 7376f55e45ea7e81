"""FoundationVision/VAR, d16 to d36. Sizes: the authors' demo_sample.ipynb, models/__init__.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvruntime.catalogue import find_model
from kvruntime.models.checkout import (
    Built,
    Wanted,
    autocast,
    find_weights,
    import_from,
    load_into,
    read_weights,
)
from kvruntime.models.prompts import class_numbers

PUBLISHED = "https://huggingface.co/FoundationVision/var/tree/main"
VAE = "vae_ch160v4096z32.pth"


def build(wanted: Wanted) -> Built:
    """As the package's ``build``."""
    name, weights, device = wanted.name, wanted.weights, wanted.device
    files = []
    if weights is not None:
        names = (VAE, f"{name.replace('-', '_')}.pth")
        files = [find_weights(weights, file, PUBLISHED) for file in names]
    models = import_from(wanted, "models", "models/var.py")
    known = find_model(name)
    sides = tuple(size[0] for size in known.schedule.sizes)
    layers = wanted.depth or known.geometry.layers
    vae = models.VQVAE(
        vocab_size=4096,
        z_channels=32,
        ch=160,
        test_mode=True,
        share_quant_resi=4,
        v_patch_nums=sides,
    )
    model = models.VAR(
        vae_local=vae,
        num_classes=1000,
        depth=layers,
        embed_dim=64 * layers,
        num_heads=layers,
        drop_path_rate=0.1 * layers / 24,
        shared_aln=name == "var-d36",
        attn_l2_norm=True,
        patch_nums=sides,
        flash_if_available=device.type != "cpu",  # neither flash-attn nor xformers runs there
    )
    if weights is None:  # the authors' own first weights hide attention: gains of 1e-5, no head
        model.init_weights(init_adaln=0.5, init_adaln_gamma=0.5, init_head=1.0)
    for part, file in zip((vae, model), files, strict=False):
        load_into(part, read_weights(file), file)
    vae.to(device).eval().requires_grad_(False)
    model.to(device).eval().requires_grad_(False)
    model.rng = torch.Generator(device=device)

    def draw(pictures: int, seed: int, **settings: Any) -> Tensor:
        """Of classes seed, seed + 1 and so on unless label_B is given."""
        labels = torch.arange(seed, seed + pictures, device=device) % 1000
        chosen = {"label_B": labels, "cfg": 4.0, "top_k": 900, "top_p": 0.95} | settings
        cast = autocast(wanted)
        with torch.inference_mode(), cast:
            return model.autoregressive_infer_cfg(B=pictures, g_seed=seed, **chosen)  # type: ignore[no-any-return]

    def prompted(prompts: Sequence[str]) -> dict[str, Any]:
        return {"label_B": class_numbers(prompts, 1000).to(device)}

    return Built(model, vae, draw, prompted, check_prompts=prompted)
