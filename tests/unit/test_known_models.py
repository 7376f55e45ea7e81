"""The embeddings that are shipped, on look-alikes of their models with arithmetic of their own.
tests/integration runs the authors' code.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import kvruntime
import kvruntime.adapters.parity
from kvruntime import EmbeddingError, UnsupportedModel
from kvruntime.adapters import INFINITY, VAR
from kvruntime.catalogue import infinity_schedule
from tests.look_alikes import basic_var
from tests.look_alikes.infinity import Infinity
from tests.look_alikes.var import VAR as LookAlikeVAR
from tests.support import every_attribute

TALL = [(1, 1, 1), (1, 3, 2), (1, 4, 3), (1, 6, 4)]
SQUARE = [(1, 1, 1), (1, 2, 2), (1, 4, 4)]


@pytest.fixture
def infinity():
    torch.manual_seed(0)
    return Infinity()


def attributes(model):
    return [every_attribute(block) for block in model.unregistered_blocks], every_attribute(model)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_infinity_draws_the_same_in_every_schedule(infinity, cfg, autocast):
    before = attributes(infinity)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        with kvruntime.attach(infinity, "full", 1.0) as attached:
            for sizes in (SQUARE, TALL, SQUARE):
                ours = infinity.autoregressive_infer_cfg(sizes, cfg=cfg)
                stats = attached.stats
                assert stats.rows == (1 if cfg == 1 else 2)
                assert stats.planned_pages == stats.peak_pages > 0 == stats.live_pages
                assert attached.schedule.sizes == tuple((h, w) for _, h, w in sizes)
                call = {"scale_schedule": sizes}
                assert attached.plan(1, stats.rows, **call).peak_pages == stats.peak_pages
                with kvruntime.attach(infinity, "sliding_window", 2):
                    other = infinity.autoregressive_infer_cfg(sizes, cfg=cfg)
                assert not torch.equal(ours, other), "the cache matters"
        assert attributes(infinity) == before
        own = infinity.autoregressive_infer_cfg(SQUARE, cfg=cfg)
        with kvruntime.attach(infinity, "full", 1.0):
            assert torch.equal(infinity.autoregressive_infer_cfg(SQUARE, cfg=cfg), own)
        parity = kvruntime.check(infinity, lambda: infinity.autoregressive_infer_cfg(TALL, cfg=cfg))
    assert parity.max_error == 0.0 and parity.steps == 16


def test_infinity_keeps_keys_in_float32_itself_under_autocast(infinity):
    with torch.autocast("cpu", torch.bfloat16):
        with kvruntime.attach(infinity, "full", 1.0) as attached:
            infinity.autoregressive_infer_cfg(SQUARE)
            own = [infinity.unregistered_blocks[0].sa]
            stats = attached.stats
        for block in infinity.unregistered_blocks:
            block.sa.kv_caching(True)
        own[0](torch.zeros(2, 1, 64), None, None, SQUARE, None, 0)
        assert (own[0].cached_k.dtype, own[0].cached_v.dtype) == (torch.float32, torch.bfloat16)
    assert stats.baseline_bytes == 2 * 4 * 21 * 64 * (4 + 2)
    assert stats.token_bytes == 2 * 4 * 5 * 64 * (2 + 2)


def test_infinity_tells_nothing_before_a_call(infinity):
    with kvruntime.attach(infinity, "scalekv", 0.5) as attached:
        for ask in (lambda: attached.stats, lambda: attached.schedule):
            with pytest.raises(kvruntime.ScheduleError, match="nothing is drawn yet"):
                ask()
        with pytest.raises(EmbeddingError, match=r"autoregressive_infer_cfg\(\) must tell"):
            attached.plan(1)
        with pytest.raises(EmbeddingError, match="the arguments of"):
            infinity.autoregressive_infer_cfg()
        with pytest.raises(EmbeddingError, match="the arguments of"):  # without its sampler
            infinity.unregistered_blocks[0].sa.kv_caching(True)
            infinity.unregistered_blocks[0].sa(torch.zeros(2, 1, 64), None, None, SQUARE, None, 0)


def test_infinity_refuses_what_cannot_work_before_anything_runs(infinity):
    """Once the call has told the schedule, and before its first layer."""
    ran = []
    hook = infinity.unregistered_blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with kvruntime.attach(infinity, "streaming_llm", 4):
        with pytest.raises(ValueError, match="leaves nothing beside 4 sinks"):
            infinity.autoregressive_infer_cfg(TALL)
    hook.remove()
    assert not ran


def test_infinity_keeps_memory_for_one_schedule_at_a_time(infinity):
    """And plans for eight."""
    with kvruntime.attach(infinity, "full", 1.0) as attached:
        for side in range(2, 13):
            infinity.autoregressive_infer_cfg([(1, 1, 1), (1, side, side)])
            made = attached._caches._made.values()
            assert sum(len(cache._idle_pools) for cache in made) == 1
        assert len(made) <= 8


def test_infinity_stops_early_without_a_leak(infinity):
    own = infinity.autoregressive_infer_cfg(TALL, trunk_scale=2)
    with kvruntime.attach(infinity, "full", 1.0) as attached:
        assert torch.equal(infinity.autoregressive_infer_cfg(TALL, trunk_scale=2), own)
        assert attached.stats.live_pages == 0 and len(attached.stats.timeline) == 2


def test_infinity_built_for_its_own_kernel_or_for_flex_attention(infinity):
    def refuse(*_, **__):
        raise AssertionError("attention went another way")

    for block in infinity.unregistered_blocks:
        block.sa.use_flex_attn = True
    before = attributes(infinity)
    with kvruntime.attach(infinity, "full", 1.0):
        infinity.autoregressive_infer_cfg(SQUARE, attn_fn=refuse)
    assert attributes(infinity) == before
    infinity.unregistered_blocks[0].sa.using_flash = True
    with pytest.raises(UnsupportedModel, match="customized_flash_attn=False"):
        with kvruntime.attach(infinity):
            pass


def test_infinity_gets_the_published_roles():
    """By its geometry and schedule, once a call has told the latter."""
    model = Infinity(depth=1)
    view = kvruntime.adapters.view_of(model)
    assert view.embedding is INFINITY and (view.heads, view.head_dim) == (2, 32)
    schedule = infinity_schedule("1M", "1.500")
    call = {"scale_schedule": [(1, h, w) for h, w in schedule.sizes]}
    assert view.schedule(call) == schedule
    assert view.schedule({"scale_schedule": [(2, 3, 3)]}).sizes == ((2, 3, 3),)


def test_var_goes_without_the_kernels_that_it_found():
    """Its flags are set while its forward runs, and never seen from outside."""
    torch.manual_seed(0)
    model = LookAlikeVAR(True, dim=32)
    called = []
    whole = basic_var.written_down

    def kernel(*arguments):
        called.append(1)
        return whole(*arguments)

    basic_var.written_down = kernel
    try:
        own = model.autoregressive_infer_cfg()
        assert called
        called.clear()
        with kvruntime.attach(model, "full", 1.0):
            ours = model.autoregressive_infer_cfg()
            assert all(block.attn.using_xform for block in model.blocks)
        assert not called
    finally:
        basic_var.written_down = whole
    assert float((ours - own).abs().max()) < 1e-4
    for block in model.blocks:
        block.attn.using_xform = False
    assert torch.equal(model.autoregressive_infer_cfg(), ours)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model class", r"the class var.VAR, it is tests.look_alikes.var.HARTForT2I"),
        ("model module", r"the class var.VAR, it is hart.modules.hart_transformer_t2i.VAR"),
        ("attention class", r"the class basic_var.SelfAttention, it is"),
        ("arguments", r"forward\(x, attn_bias\), it takes \(x, cos, sin\)"),
        ("attribute", r"model.blocks\[i\].attn.using_xform"),
        ("no blocks", r"model.blocks\[0\]"),
    ],
)
def test_what_has_vars_names_is_not_mistaken_for_it(change, says):
    """HART's attention has every attribute of VAR's, and another arithmetic."""
    model = LookAlikeVAR(True)
    attention = type("SelfAttention", (basic_var.SelfAttention,), {})
    if change == "model class":
        model.__class__ = type(
            "HARTForT2I", (torch.nn.Module,), {"__module__": type(model).__module__}
        )
    elif change == "model module":
        model.__class__ = type(
            "VAR", (torch.nn.Module,), {"__module__": "hart.modules.hart_transformer_t2i"}
        )
    elif change == "attention class":
        other = type("Attention", (torch.nn.Module,), {})
        model.blocks[0].attn = other()
    elif change == "arguments":
        attention.forward = lambda self, x, cos, sin: x
        model.blocks[0].attn.__class__ = attention
    elif change == "attribute":
        del model.blocks[0].attn.using_xform
    else:
        model.blocks = torch.nn.ModuleList()
    with pytest.raises(UnsupportedModel, match=says):
        kvruntime.adapters.view_of(model)


def test_classes_derived_from_the_authors_own_are_theirs():
    model = LookAlikeVAR(True)
    model.__class__ = type("VARHF", (LookAlikeVAR,), {})
    assert kvruntime.adapters.view_of(model).embedding is VAR


def projected(left_out):
    """VAR's projection as somebody might write it down, with a piece left out."""

    def project(attention, x, attn_bias):
        rows, tokens, _ = x.shape
        biases = [attention.q_bias, attention.zero_k_bias, attention.v_bias]
        if left_out == "order of the biases":
            biases[1:] = biases[:0:-1]
        mixed = F.linear(x, attention.mat_qkv.weight, torch.cat(biases))
        q, k, v = mixed.view(rows, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        gain = attention.scale_mul_1H11
        if left_out != "clamp":
            gain = gain.clamp_max(attention.max_scale_mul)
        if left_out != "norm of the keys":
            k = F.normalize(k, dim=-1)
        return F.normalize(q, dim=-1) * gain.exp(), k, v

    def finish(attention, out):
        return attention.proj(out.transpose(1, 2).flatten(2))

    return replace(VAR, project=project, finish=finish)


@pytest.mark.parametrize("left_out", ["clamp", "order of the biases", "norm of the keys"])
def test_check_notices_each_piece_of_vars_arithmetic(left_out):
    """Which nobody has to write down: the model's own forward runs."""
    torch.manual_seed(0)
    model = LookAlikeVAR(True, dim=32)
    draw = model.autoregressive_infer_cfg
    assert kvruntime.check(model, draw, projected("nothing")).max_error < 1e-6
    with pytest.raises(EmbeddingError, match="away from the model's own"):
        kvruntime.check(model, draw, projected(left_out))


def test_check_notices_that_infinitys_keys_are_not_rotated(infinity, monkeypatch):
    def draw():
        infinity.autoregressive_infer_cfg(TALL)

    assert kvruntime.check(infinity, draw).max_error == 0.0
    forward = kvruntime.adapters.parity.take_over

    def without_rotation(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr("tests.look_alikes.basic.rotated", lambda x, angles: x)
            return forward(*arguments)

    monkeypatch.setattr(kvruntime.adapters.parity, "take_over", without_rotation)
    with pytest.raises(EmbeddingError, match="away from the model's own"):
        kvruntime.check(infinity, draw)
