"""Multi-scale residual VQ-VAE: a 64 x 64 picture as ten maps of codes, 1 x 1 up to 16 x 16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
LATENT_SIDE = PATCH_SIDES[-1]
LATENT_CHANNELS = 16
NUM_CODES = 512
PICTURE_SIDE = 64


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with group normalisation, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


class Tokenizer(nn.Module):
    """Picture <-> codes. A code map of every scale adds to one 16 x 16 latent, coarse to fine."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        wide = 2 * width
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            ResidualBlock(width),
            nn.Conv2d(width, wide, 4, stride=2, padding=1),
            ResidualBlock(wide),
            ResidualBlock(wide),
            nn.GroupNorm(8, wide),
            nn.SiLU(),
            nn.Conv2d(wide, LATENT_CHANNELS, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, wide, 3, padding=1),
            ResidualBlock(wide),
            ResidualBlock(wide),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(wide, width, 3, padding=1),
            ResidualBlock(width),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 2, 3, 3, padding=1),
        )
        self.codebook = nn.Parameter(torch.randn(NUM_CODES, LATENT_CHANNELS) * 0.1)
        self.smooth = nn.ModuleList(
            nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 3, padding=1) for _ in PATCH_SIDES
        )

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents [rows, 16, 16, 16] of pictures [rows, 3, 64, 64] in [0, 1]."""
        return self.encoder(pictures * 2 - 1)  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [rows, 3, 64, 64] in [0, 1] of latents [rows, 16, 16, 16]."""
        return ((self.decoder(latents) + 1) / 2).clamp(0, 1)  # type: ignore[no-any-return]

    def nearest(self, vectors: Tensor) -> Tensor:
        """Index of the closest code for each of vectors [..., 16]."""
        flat = vectors.reshape(-1, LATENT_CHANNELS)
        distances = self.codebook.square().sum(1) - 2 * flat @ self.codebook.t()
        return distances.argmin(1).reshape(vectors.shape[:-1])

    def contribution(self, scale: int, codes: Tensor) -> Tensor:
        """What code map [rows, side * side] of ``scale`` adds to the latent [rows, 16, 16, 16]."""
        side = PATCH_SIDES[scale]
        grid = F.embedding(codes, self.codebook).transpose(1, 2)
        grid = grid.reshape(codes.shape[0], LATENT_CHANNELS, side, side)
        if side != LATENT_SIDE:
            grid = F.interpolate(grid, LATENT_SIDE, mode="bicubic")
        smooth: Tensor = self.smooth[scale](grid)
        return (grid + smooth) / 2

    def next_input(self, scale: int, latent: Tensor) -> Tensor:
        """Tokens [rows, side * side, 16] that the transformer reads at ``scale``, from the latent
        so far.
        """
        side = PATCH_SIDES[scale]
        grid = latent if side == LATENT_SIDE else F.interpolate(latent, side, mode="area")
        return grid.flatten(2).transpose(1, 2)

    def quantise(
        self, latent: Tensor, corrupt: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Code the residual scale by scale.

        corrupt [rows] is each picture's share of codes replaced by random ones before they are
        added; later scales then code the residual of the corrupted sum, so a model trained on them
        learns to repair. Returns the target codes, the inputs of scales 1.. and the running sums, a
        list entry per scale.
        """
        total = torch.zeros_like(latent)
        targets: list[Tensor] = []
        inputs: list[Tensor] = []
        sums: list[Tensor] = []
        for scale, side in enumerate(PATCH_SIDES):
            rest = latent - total
            if side != LATENT_SIDE:
                rest = F.interpolate(rest, side, mode="area")
            codes = self.nearest(rest.flatten(2).transpose(1, 2))
            targets.append(codes)
            if corrupt is not None:
                hit = torch.rand(codes.shape) < corrupt[:, None]
                codes = torch.where(hit, torch.randint_like(codes, NUM_CODES), codes)
            total = total + self.contribution(scale, codes)
            sums.append(total)
            if scale + 1 < len(PATCH_SIDES):
                inputs.append(self.next_input(scale + 1, total))
        return targets, inputs, sums
