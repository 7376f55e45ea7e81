"""The painter's description, as docs/embedding.md gives it."""

from dataclasses import replace

import torch

from kvruntime import Embedding
from tests.look_alikes.painter import SIDES, Painter
from tests.support import every_attribute

PAINTER = Embedding(
    name="Painter",
    attentions=lambda painter: [block.attention for block in painter.net.blocks],
    sampler="__call__",
    schedule=lambda painter, call: SIDES[: call.get("scales")],
    softmax_scale=lambda attention: attention.dim**-0.5,
    toggle="remember",
    heads=lambda attention: (attention.heads, attention.dim),
    rows=lambda painter, call, rows: {call["guided"]: rows // 2} if call["guided"] else {},
)
STEPS = replace(PAINTER, sampler="steps")
TEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def everything(painter):
    return every_attribute(painter.net), dict(vars(painter)), dict(vars(Painter))
