"""FoundationVision/Infinity, 125M to 8B. Sizes and settings: the authors' tools/run_infinity.py,
scripts/ and notebooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvruntime.catalogue import find_model, infinity_schedule
from kvruntime.models.checkout import (
    Built,
    Wanted,
    autocast,
    find_weights,
    import_from,
    load_into,
    read_weights,
)
from kvruntime.models.prompts import text_encoder
from policies import ScaleSchedule

PUBLISHED = "https://huggingface.co/FoundationVision/Infinity/tree/main"
TEXT_CHANNELS = 2048  # of flan-t5-xl


class _Size(NamedTuple):
    chunks: int
    code_bits: int
    is_patchified: bool
    resolution: str
    vae: str
    weights: str


SIZES = {
    "infinity-125m": _Size(
        4, 16, False, "0.06M", "infinity_vae_d16.pth", "infinity_125M_256x256.pth"
    ),
    "infinity-2b": _Size(8, 32, False, "1M", "infinity_vae_d32reg.pth", "infinity_2b_reg.pth"),
    "infinity-8b": _Size(
        8, 14, True, "1M", "infinity_vae_d56_f8_14_patchify.pth", "infinity_8b_weights"
    ),
}


def build(wanted: Wanted) -> Built:
    """As the package's ``build``."""
    weights, device = wanted.weights, wanted.device
    size = SIZES[wanted.name]
    files = []
    if weights is not None:
        files = [find_weights(weights, file, PUBLISHED) for file in (size.vae, size.weights)]
    vae = _tokenizer(wanted, size, files[0] if files else None)
    model = _transformer(wanted, size, vae)
    if files:
        _load(model, files[1])
    vae.to(device).eval().requires_grad_(False)
    model.to(device).eval().requires_grad_(False)
    model.rng = torch.Generator(device=device)
    if wanted.dtype != torch.float32:  # as the authors do; the rest stays as it is
        for block in model.unregistered_blocks:
            block.to(wanted.dtype)
            if device.type == "cpu":  # where autocast leaves norms alone
                block.ca_norm.float()

    def draw(
        pictures: int,
        seed: int,
        text: Sequence[Tensor] | None = None,
        schedule: ScaleSchedule | None = None,
        **settings: Any,
    ) -> Tensor:
        """text: features of each prompt by the text encoder, [tokens, 2048]; None: random ones.
        schedule: of the published ones, by default that of the model's own resolution.
        """
        sizes = (schedule or infinity_schedule(size.resolution)).sizes
        scales = [(1, *one) if len(one) == 2 else one for one in sizes]
        chosen = {
            "cfg_list": [3.0] * len(scales),
            "tau_list": [1.0] * len(scales),
            "cfg_insertion_layer": [0],
            "top_k": 900,
            "top_p": 0.97,
        } | settings
        given = random_text(pictures, seed) if text is None else text
        cast = autocast(wanted)
        with torch.inference_mode(), cast:
            *_, images = model.autoregressive_infer_cfg(
                vae=vae,
                scale_schedule=scales,
                label_B_or_BLT=_packed([part.to(device) for part in given]),
                B=pictures,
                g_seed=seed,
                returns_vemb=1,
                vae_type=size.code_bits,
                ret_img=True,
                inference_mode=True,
                **chosen,
            )
        return torch.as_tensor(images).permute(0, 3, 1, 2).flip(1).float() / 255

    def encoder() -> Callable[[Sequence[str]], list[Tensor]]:
        if wanted.text_encoder is None:
            raise ValueError(
                f"{wanted.name} draws prompts by features of its text encoder: give text_encoder, "
                "a folder with google/flan-t5-xl"
            )
        return text_encoder(wanted.text_encoder, device)

    def prompted(prompts: Sequence[str]) -> dict[str, Any]:
        return {"text": encoder()(prompts)}

    return Built(model, vae, draw, prompted, check_prompts=lambda prompts: encoder())


def _tokenizer(wanted: Wanted, size: _Size, file: Path | None) -> Any:
    code = import_from(wanted, "infinity.models.bsq_vae.vae", "infinity/models/bsq_vae/vae.py")
    stages = [1, 2, 4, 4] if size.is_patchified else [1, 2, 4, 4, 4]
    return code.vae_model(
        {} if file is None else str(file),
        "dynamic",
        size.code_bits,
        2**size.code_bits,
        patch_size=8 if size.is_patchified else 16,
        encoder_ch_mult=stages,
        decoder_ch_mult=stages,
        test_mode=True,
    )


def _transformer(wanted: Wanted, size: _Size, vae: Any) -> Any:
    code = import_from(wanted, "infinity.models.infinity", "infinity/models/infinity.py")
    geometry = find_model(wanted.name).geometry
    layers = wanted.depth or geometry.layers
    return code.Infinity(
        vae_local=vae,
        text_channels=TEXT_CHANNELS,
        text_maxlen=512,
        shared_aln=True,
        raw_scale_schedule=None,
        customized_flash_attn=False,
        fused_norm=True,  # else the number of the scale does not reach the rotation
        pad_to_multiplier=128,
        add_lvl_embeding_only_first_block=1,
        use_bit_label=1,
        rope2d_each_sa_layer=1,
        rope2d_normalized_by_hw=2,
        pn=size.resolution,
        apply_spatial_patchify=int(size.is_patchified),
        inference_mode=True,
        train_h_div_w_list=[1.0],
        depth=layers,
        embed_dim=geometry.heads * geometry.head_dim,
        num_heads=geometry.heads,
        drop_path_rate=0.1,
        block_chunks=size.chunks if layers % size.chunks == 0 else layers,
    )


def random_text(pictures: int, seed: int, tokens: int = 20) -> list[Tensor]:
    """Features as the text encoder might give for prompts, for trying out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, TEXT_CHANNELS, generator=generator) for _ in range(pictures)]


def _packed(text: Sequence[Tensor]) -> tuple[Tensor, list[int], Tensor, int]:
    """What the sampler calls label_B_or_BLT: all features in a run, and where each prompt ends."""
    lengths = [part.shape[0] for part in text]
    ends = torch.tensor([0, *lengths], device=text[0].device).cumsum(0).int()
    return torch.cat(list(text)), lengths, ends, max(lengths)


def _load(model: Any, path: Path) -> None:
    """One file, or a folder of shards with an index."""
    if path.is_file():
        load_into(model, read_weights(path), path)
        return
    shards = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    if not shards:
        raise FileNotFoundError(f"{path} holds no shards of weights: {PUBLISHED}")
    state: dict[str, Any] = {}
    for shard in shards:
        if shard.suffix == ".safetensors":
            from safetensors.torch import load_file

            state.update(load_file(shard))
        else:
            state.update(read_weights(shard))
    load_into(model, state, path)
