"""What does not fit a model, and models that attend otherwise, are refused by name."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kvruntime
import kvruntime.adapters
import tests.look_alikes.painter as code
from kvruntime import EmbeddingError
from tests.look_alikes.described import PAINTER, TEXT, everything
from tests.look_alikes.painter import SIDES, Painter


@pytest.fixture
def painter():
    return Painter()


class Unruly(nn.Module):
    """Attends in a way that the runtime must not take over."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how
        self.heads, self.dim, self.remember = inner.heads, inner.dim, inner.remember

    @property
    def memory(self):
        return self.inner.memory

    @memory.setter
    def memory(self, parts):
        self.inner.memory = parts

    def forward(self, x, angles):
        call = F.scaled_dot_product_attention
        tokens = x.shape[1]

        def attend(q, k, v, **options):
            if self.how == "mask":
                return call(q, k, v, attn_mask=torch.zeros(tokens, k.shape[2]))
            if self.how == "causal":
                return call(q, k, v, is_causal=True)
            if self.how == "dropout":
                return call(q, k, v, dropout_p=0.1)
            if self.how == "scale":
                return call(q, k, v, scale=0.5)
            if self.how == "twice":
                call(q, k, v)
            if self.how == "groups":
                return call(q, k[:, :1], v[:, :1], enable_gqa=True)
            if self.how == "own kernel":
                return (q @ k.transpose(2, 3) * self.dim**-0.5).softmax(-1) @ v
            return call(q, k, v, attn_mask=torch.zeros(0))  # an empty mask masks nothing

        code.F = SimpleNamespace(scaled_dot_product_attention=attend)
        try:
            return self.inner(x, angles)
        finally:
            code.F = F


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("mask", "masks its attention"),
        ("causal", "masks its attention"),
        ("dropout", r"drops 0.1 of its attention: call model.eval\(\)"),
        ("scale", r"attends with scale 0.5, softmax_scale\(attention\) says 0.176777"),
        ("twice", "calls attention twice: list the modules of self-attention alone"),
        ("groups", "has grouped heads, 2 of queries and 1 of keys"),
        ("own kernel", "made no call of torch.nn.functional.scaled_dot_product_attention"),
    ],
)
def test_attention_of_another_kind_is_refused_by_name(painter, how, says):
    painter.net.blocks[1].attention = Unruly(painter.net.blocks[1].attention, how)
    before = everything(painter)
    with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER) as attached:
        with pytest.raises(EmbeddingError, match=rf"layer 1 .*{says}"):
            painter(TEXT)
        assert attached.stats.live_pages == 0
    assert everything(painter) == before
    q = torch.randn(1, 1, 3, 8)
    assert F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(3, 3)).shape == q.shape


def test_an_empty_mask_is_none(painter):
    painter.net.blocks[1].attention = Unruly(painter.net.blocks[1].attention, "")
    with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER) as attached:
        painter(TEXT)
    assert attached.stats.planned_pages == attached.stats.peak_pages


WRONG = {
    "a layer missing": (
        {"attentions": lambda painter: [painter.net.blocks[0].attention]},
        r"attentions\(model\) gives 1 modules, and these cache as well: blocks.1.attention",
    ),
    "layers in another order": (
        {"attentions": lambda painter: [b.attention for b in reversed(painter.net.blocks)]},
        "layer 1 ran where layer 0 of scale 0 was due",
    ),
    "another softmax scale": (
        {"softmax_scale": lambda attention: 1.0},
        r"attends with scale 0.176777, softmax_scale\(attention\) says 1",
    ),
    "another schedule": (
        {"schedule": lambda painter, call: (1, 2, 4, 4, 6)},
        r"scale 2 has 16 tokens by schedule\(model, call\), the model came with 9",
    ),
    "too short a schedule": (
        {"schedule": lambda painter, call: SIDES[:3]},
        r"schedule\(model, call\) has 3 scales and the model goes on",
    ),
    "too long a schedule": (
        {"schedule": lambda painter, call: (*SIDES, 8)},
        r"schedule\(model, call\) has 6 scales, the sampler drew 5",
    ),
    "rows that stay": (
        {"rows": lambda painter, call, rows: {}},
        "scale 3 is planned with 4 rows, the model came with 2",
    ),
    "rows that go too early": (
        {"rows": lambda painter, call, rows: {1: rows // 2}},
        "scale 1 is planned with 2 rows, the model came with 4",
    ),
    "the attention to the text": (
        {
            "attentions": lambda painter: [block.cross for block in painter.net.blocks],
            "toggle": None,
        },
        "has 5 keys for 1 queries: its own cache is not empty, or this is cross-attention",
    ),
    "its own cache left on": (
        {"toggle": None},
        "has 2 keys for 1 queries: its own cache is not empty",
    ),
    "a toggle that is not used": (
        {"toggle": "train"},
        r"__call__\(\) returned and no attention came here: does it cache",
    ),
    "project with another scale": (
        {
            "project": lambda attention, x, angles: tuple(
                attention.qkv(x).view(*x.shape[:2], 3, 2, 32).permute(2, 0, 3, 1, 4)
            ),
            "finish": lambda attention, out: attention.out(out.transpose(1, 2).flatten(2)),
        },
        "of its largest number away from the model's own",
    ),
    "another number of heads": (
        {"heads": lambda attention: (4, 16)},
        r"heads\(attention\) gives \(4, 16\) heads and numbers of each, the model came with",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_descriptions_are_refused_or_caught_by_check(painter, case):
    changes, says = WRONG[case]
    own, before = painter(TEXT), everything(painter)
    with pytest.raises((EmbeddingError, ValueError), match=says):
        kvruntime.check(painter, lambda: painter(TEXT), replace(PAINTER, **changes))
    for block in painter.net.blocks:
        block.attention.remember(False)  # where the description names no toggle
    assert everything(painter) == before
    assert torch.equal(painter(TEXT), own)


UNFIT = {
    "no modules": (
        {"attentions": lambda painter: []},
        r"must give torch modules, it gives nothing",
    ),
    "other things": ({"attentions": lambda painter: [1]}, r"it gives \['int'\]"),
    "what is not there": (
        {"attentions": lambda painter: painter.layers},
        r"attentions\(model\) fails: AttributeError: .*layers",
    ),
    "a module twice": (
        {"attentions": lambda painter: [painter.net.blocks[0].attention] * 2},
        "names a module twice",
    ),
    "no such toggle": ({"toggle": "kv_caching"}, "SelfAttention has no attribute 'kv_caching'"),
    "no such flag": ({"flags": {"flash": False}}, "no attribute 'flash', named as flag"),
    "no such sampler": ({"sampler": "generate"}, "Painter has no method 'generate', the sampler"),
    "no such heads": (
        {"heads": lambda attention: (attention.num_heads, 32)},
        r"heads\(attention\) fails: AttributeError",
    ),
    "no number": ({"softmax_scale": lambda attention: None}, r"softmax_scale\(attention\) fails"),
    "a schedule of nothing": (
        {"schedule": lambda painter, call: [0]},
        r"schedule\(model, call\) fails: ValueError: a scale is a tuple",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_descriptions_that_do_not_fit_leave_the_model_alone(painter, case):
    changes, says = UNFIT[case]
    before = everything(painter)
    with pytest.raises(EmbeddingError, match=says):
        with kvruntime.attach(painter, embedding=replace(PAINTER, **changes)):
            pass
    assert everything(painter) == before


def test_layers_that_differ(painter):
    painter.net.blocks[1].attention.dim = 16
    with pytest.raises(
        EmbeddingError, match=r"layers differ in \(heads, head_dim, softmax scale\)"
    ):
        kvruntime.adapters.view_of(painter, PAINTER)


def test_descriptions_of_one_half():
    with pytest.raises(ValueError, match="project and finish go together"):
        replace(PAINTER, project=lambda attention, x: x)
    with pytest.raises(ValueError, match="layout must be bhnd or bnhd, got 'nhbd'"):
        replace(PAINTER, layout="nhbd")
    with pytest.raises(ValueError, match="embedding must be an Embedding, got 'Painter'"):
        kvruntime.adapters.view_of(None, "Painter")
