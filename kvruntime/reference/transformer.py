"""Class-conditional next-scale transformer in the shape of VAR, with its own ``torch.cat``
cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvruntime.coding import Coding
from kvruntime.reference.tokenizer import LATENT_CHANNELS, NUM_CODES, PATCH_SIDES, Tokenizer
from policies import Profile

SCALE_TOKENS = tuple(side * side for side in PATCH_SIDES)
NUM_TOKENS = sum(SCALE_TOKENS)
STARTS = tuple(sum(SCALE_TOKENS[:k]) for k in range(len(SCALE_TOKENS)))


class SelfAttention(nn.Module):
    """Cosine attention: unit queries times a learned per-head scale, unit keys.

    ``use_cache(True)`` makes later calls read and extend the layer's own cache, which grows by
    ``torch.cat``.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.full((num_heads, 1), math.log(10.0)))
        self.caching = False
        self.cached_k: Tensor | None = None
        self.cached_v: Tensor | None = None

    def use_cache(self, enable: bool) -> None:
        """Start an empty cache, or drop it."""
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def repeat_cache(self, count: int) -> None:
        """Each row of the cache becomes ``count`` rows next to each other."""
        if self.cached_k is not None and self.cached_v is not None:
            self.cached_k = self.cached_k.repeat_interleave(count, 0)
            self.cached_v = self.cached_v.repeat_interleave(count, 0)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [rows, tokens, heads, head_dim]; the softmax scale is then
        1.
        """
        rows, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.num_heads, self.head_dim).unbind(2)
        q = F.normalize(q, dim=-1) * self.log_scale.clamp_max(math.log(100.0)).exp().to(q.dtype)
        return q, F.normalize(k, dim=-1), v

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = (part.transpose(1, 2) for part in self.project(x))
        if self.caching:
            if self.cached_k is not None and self.cached_v is not None:
                k = torch.cat((self.cached_k, k), dim=2)
                v = torch.cat((self.cached_v, v), dim=2)
            self.cached_k, self.cached_v = k, v
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:  # training: every scale at once, each reads itself and the scales before it
            parts = [
                F.scaled_dot_product_attention(
                    q[:, :, start : start + size],
                    k[:, :, : start + size],
                    v[:, :, : start + size],
                    scale=1.0,
                )
                for start, size in zip(STARTS, SCALE_TOKENS, strict=True)
            ]
            out = torch.cat(parts, dim=2)
        return self.proj(out.transpose(1, 2).reshape(rows, tokens, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, both modulated by the class (shared AdaLN plus a per-block
    offset).
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain1, gain2, scale1, scale2, shift1, shift2 = (
            (condition + self.modulation).unsqueeze(2).unbind(1)
        )
        x = x + gain1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        return x + gain2 * self.feed_forward(self.norm(x) * (1 + scale2) + shift2)  # type: ignore[no-any-return]


class EmojiVAR(nn.Module):
    """The bundled model: draws 64 x 64 emoji of a class in ten scales, 680 tokens."""

    def __init__(
        self, num_classes: int, width: int = 192, depth: int = 8, num_heads: int = 6
    ) -> None:
        super().__init__()
        self.num_classes, self.width = num_classes, width
        self.profile: Profile | None = None  # statistics for policies, set by load_model()
        self.coding: Coding | None = None  # for transform-coded pages, set by load_model()
        self.tokenizer = Tokenizer()
        self.class_embedding = nn.Embedding(num_classes + 1, width)  # the last one: no class
        self.start = nn.Parameter(torch.randn(width) * 0.3)
        self.position = nn.Parameter(torch.randn(NUM_TOKENS, width) * 0.3)
        self.level = nn.Embedding(len(PATCH_SIDES), width)
        nn.init.normal_(self.level.weight, std=0.3)
        self.read = nn.Linear(LATENT_CHANNELS, width)
        self.shared_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.head_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, NUM_CODES)

    def _place(self, scale: int) -> Tensor:
        start = STARTS[scale]
        position = self.position[start : start + SCALE_TOKENS[scale]]
        return position + self.level.weight[scale]

    def _condition(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.class_embedding(labels)
        return embedded, self.shared_modulation(embedded).view(-1, 6, self.width)

    def _run(self, x: Tensor, embedded: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        scale, shift = self.head_modulation(embedded).unsqueeze(1).chunk(2, dim=-1)
        return self.head(self.head_norm(x) * (1 + scale) + shift)  # type: ignore[no-any-return]

    def forward(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Training: logits [rows, 680, 512] for labels [rows] and the inputs [rows, 679, 16] of
        scales 1.. .
        """
        embedded, condition = self._condition(labels)
        first = (embedded + self.start).unsqueeze(1)
        x = torch.cat((first, self.read(inputs)), dim=1)
        x = x + torch.cat([self._place(scale) for scale in range(len(PATCH_SIDES))])
        return self._run(x, embedded, condition)

    @torch.no_grad()
    def draw(
        self,
        labels: Tensor,
        choose: Callable[[int, Tensor], Tensor],
        cfg: float,
        branch: tuple[int, int] | None = None,
    ) -> Tensor:
        """Go through the scales with the cache on; ``choose(scale, logits) -> codes`` decides.

        labels: [pictures]. Rows are 2 x pictures, the second half without class (guidance ``cfg``
        grows with the scale; 0: only those with class). choose gets float32 logits [pictures,
        tokens, 512]. branch: (scale, count): when that scale begins each picture becomes ``count``
        pictures next to each other. Returns pictures [pictures, 3, 64, 64].
        """
        branch_at, copies = _checked(branch)
        pictures = labels.shape[0]
        rows = labels
        if cfg:
            rows = torch.cat((labels, torch.full_like(labels, self.num_classes)))
        embedded, condition = self._condition(rows)
        x = (embedded + self.start).unsqueeze(1) + self._place(0)
        latent = x.new_zeros(pictures, LATENT_CHANNELS, PATCH_SIDES[-1], PATCH_SIDES[-1])
        attentions: list[SelfAttention] = [block.attention for block in self.blocks]  # type: ignore[misc]
        for attention in attentions:
            attention.use_cache(True)
        try:
            for scale in range(len(PATCH_SIDES)):
                if scale and scale == branch_at:
                    x, embedded, condition, latent = (
                        part.repeat_interleave(copies, 0)
                        for part in (x, embedded, condition, latent)
                    )
                    for attention in attentions:
                        attention.repeat_cache(copies)
                logits = self._run(x, embedded, condition).float()
                guidance = cfg * scale / (len(PATCH_SIDES) - 1)
                if cfg:
                    with_class, without = logits.chunk(2)
                    logits = with_class + guidance * (with_class - without)
                codes = choose(scale, logits)
                latent = latent + self.tokenizer.contribution(scale, codes)
                if scale + 1 < len(PATCH_SIDES):
                    tokens = self.read(self.tokenizer.next_input(scale + 1, latent))
                    x = (tokens + self._place(scale + 1)).repeat(2 if cfg else 1, 1, 1)
        finally:
            for attention in attentions:
                attention.use_cache(False)
        return self.tokenizer.decode(latent).float()

    def generate(self, labels: Tensor, seed: int = 0) -> Tensor:
        """Pictures [pictures, 3, 64, 64] in [0, 1] for labels [pictures]."""
        return self.generate_codes(labels, seed)[1]

    def generate_codes(
        self,
        labels: Tensor,
        seed: int = 0,
        cfg: float = 2.0,
        temperature: float = 0.9,
        top_k: int = 100,
        branch: tuple[int, int] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Codes of every scale and pictures.

        Picture i depends on labels[i] and seed + i alone: its noise has a generator of its own, and
        codes are drawn by the Gumbel-max rule, so two caches can be compared picture by picture.
        branch: (scale, count), as ``draw`` takes it: of the variations of a picture the first one
        is that picture, the others get noise of their own.
        """
        drawn: list[Tensor] = []
        noises = [torch.Generator().manual_seed(seed + i) for i in range(labels.shape[0])]

        def sample(scale: int, logits: Tensor) -> Tensor:
            if branch and scale == branch[0]:
                noises[:] = _with_copies(noises, branch[1])
            uniform = torch.stack([torch.rand(logits.shape[1:], generator=g) for g in noises])
            gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
            floor = logits.topk(top_k, dim=-1).values[..., -1:]
            scores = logits.masked_fill(logits < floor, -torch.inf) / temperature
            drawn.append((scores + gumbel.to(scores.device)).argmax(-1))
            return drawn[-1]

        return drawn, self.draw(labels, sample, cfg, branch)

    def teacher_forced(self, labels: Tensor, codes: list[Tensor], cfg: float = 0.0) -> list[Tensor]:
        """Log-probabilities per scale [pictures, tokens, 512] while the given codes are fed, cache
        on.
        """
        logs: list[Tensor] = []

        def follow(scale: int, logits: Tensor) -> Tensor:
            logs.append(logits.log_softmax(-1))
            return codes[scale]

        self.draw(labels, follow, cfg)
        return logs


def _checked(branch: tuple[int, int] | None) -> tuple[int, int]:
    """(scale, count), or (0, 1) for none. Raises ValueError."""
    if branch is None:
        return 0, 1
    is_pair = isinstance(branch, tuple) and [type(part) for part in branch] == [int, int]
    if not is_pair or not (0 < branch[0] < len(PATCH_SIDES) and branch[1] > 0):
        raise ValueError(
            f"branch is (a scale of 1..{len(PATCH_SIDES) - 1}, a positive count), got {branch}"
        )
    return branch


def _with_copies(noises: list[torch.Generator], count: int) -> list[torch.Generator]:
    """Each generator, and behind it count - 1 new ones, seeded by its seed and a number."""

    def new(seed: int, number: int) -> torch.Generator:
        mixed = np.random.SeedSequence([seed, number]).generate_state(1)
        return torch.Generator().manual_seed(int(mixed[0]))

    return [
        new(noise.initial_seed(), number) if number else noise
        for noise in noises
        for number in range(count)
    ]
