"""check(): what can only be seen beside the model's own cache."""

from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import torch

import kvruntime
import kvruntime.adapters
from kvruntime import EmbeddingError
from kvruntime.adapters import VAR, parity
from tests.look_alikes.described import PAINTER, STEPS, TEXT, everything
from tests.look_alikes.painter import SIDES, Painter
from tests.look_alikes.var import VAR as LookAlikeVAR


@pytest.fixture
def painter():
    return Painter()


def test_a_forward_that_reads_its_own_cache_is_caught(painter):
    """It is kept empty: a place that is counted from it would be wrong without a word."""
    for block in painter.net.blocks:
        inner = block.attention.forward

        def forward(x, angles, inner=inner, attention=block.attention):
            past = 0 if attention.memory is None else attention.memory[0].shape[2]
            return inner(x, angles + 0.01 * past)

        block.attention.forward = forward
    with pytest.raises(EmbeddingError, match=r"scale 1, layer 0: .*reads its own cache"):
        kvruntime.check(painter, lambda: painter(TEXT), PAINTER)


def test_flags_that_change_what_is_computed_are_caught():
    """The model's own forward runs without them."""
    torch.manual_seed(0)
    model = LookAlikeVAR(True, dim=32)
    flags = VAR.flags | {"attn_l2_norm": False}
    assert kvruntime.check(model, model.autoregressive_infer_cfg).max_error < 1e-6
    with pytest.raises(EmbeddingError, match="softmax_scale, flags, project or finish is wrong"):
        kvruntime.check(model, model.autoregressive_infer_cfg, replace(VAR, flags=flags))


def test_caches_that_are_lists_changed_in_place(painter):
    """What is in them is put aside, too."""
    for block in painter.net.blocks:
        block.attention.parts = []

        def forward(x, angles, attention=block.attention, inner=block.attention.forward):
            attention.memory = attention.parts[-1] if attention.parts else None
            out = inner(x, angles)
            attention.parts.append(attention.memory)
            return out

        def remember(on, attention=block.attention):
            attention.remembers, attention.memory = on, None
            attention.parts.clear()

        block.attention.forward, block.attention.remember = forward, remember
    parity = kvruntime.check(painter, lambda: painter(TEXT, guided=99), PAINTER)
    assert parity.max_error == 0.0 and parity.steps == 10


class LeftOn(Painter):
    """Its sampler switches its caches on and never off."""

    def first(self, text):
        for block in self.net.blocks:
            block.attention.remember(True)
        x = torch.ones(2, 1, self.width)
        for block in self.net.blocks:
            x = block(x, torch.zeros(1, self.dim // 2), text)
        return x


def test_caches_that_a_sampler_leaves_on_are_off_after_the_block():
    painter = LeftOn()
    described = replace(
        PAINTER,
        sampler="first",
        rows=lambda painter, call, rows: {},
        schedule=lambda painter, call: [1],
    )
    before = everything(painter)
    with kvruntime.attach(painter, "full", 1.0, embedding=described):
        painter.first(TEXT)
    assert everything(painter) == before
    assert kvruntime.check(painter, lambda: painter.first(TEXT), described).steps == 2
    assert everything(painter) == before
    long = replace(described, schedule=lambda painter, call: SIDES)
    with pytest.raises(EmbeddingError, match="has 5 scales, the sampler drew 1"):
        kvruntime.check(painter, lambda: painter.first(TEXT), long)
    assert everything(painter) == before


def test_siblings_that_are_switched_off_are_no_siblings(painter):
    other = Painter(seed=1).net.blocks[0].attention
    painter.net.other, inner = other, painter.steps

    def steps(*arguments, **named):
        other.remember(False)
        return inner(*arguments, **named)

    painter.steps = steps
    assert kvruntime.check(painter, lambda: painter(TEXT), PAINTER).max_error == 0.0


def test_check_needs_a_step(painter):
    with pytest.raises(EmbeddingError, match=r"draw\(\) ran no step"):
        kvruntime.check(painter, lambda: None, PAINTER)


class TestCheckWhileAttached:
    @pytest.fixture(autouse=True)
    def nothing_checked(self, monkeypatch):
        monkeypatch.setattr(kvruntime.adapters, "_checked", WeakKeyDictionary())

    def test_the_picture_is_that_of_the_policy(self, painter):
        with kvruntime.attach(painter, "streaming_llm", 8, embedding=PAINTER):
            wanted = painter(TEXT)
        before = everything(painter)
        with kvruntime.attach(painter, "streaming_llm", 8, embedding=PAINTER, check=True) as cache:
            assert torch.equal(painter(TEXT), wanted)
            assert cache.stats.planned_pages == cache.stats.peak_pages
            assert cache._watch is not None and not cache._watch.is_watching
            assert torch.equal(painter(TEXT), wanted)
        assert everything(painter) == before

    def test_the_first_four_scales_alone(self, painter, monkeypatch):
        """Then the model's own cache is dropped, and so is the whole one beside it."""
        layers, take_over = [], parity.take_over

        def note(view, layer, *rest):
            layers.append(layer)
            return take_over(view, layer, *rest)

        monkeypatch.setattr(parity, "take_over", note)
        held = []

        def look(*_):
            held.append(any(one.memory is not None for one in attentions))

        attentions = [block.attention for block in painter.net.blocks]
        hook = painter.net.blocks[0].norm.register_forward_pre_hook(look)
        with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER, check=True):
            painter(TEXT)
        hook.remove()
        assert layers == [0, 1] * 4
        assert held[::2] == [False, True, True, True, False]

    def test_what_failed_is_not_done(self, painter):
        """Nor is what was changed since."""
        wrong = replace(PAINTER, schedule=lambda painter, call: (1, 2, 4, 4, 6))
        for _ in range(2):
            with kvruntime.attach(painter, "full", 1.0, embedding=wrong, check=True):
                with pytest.raises(EmbeddingError):
                    painter(TEXT)
        with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER, check=True):
            painter(TEXT)

        def project(attention, x, angles):
            return attention.qkv(x).view(*x.shape[:2], 3, 2, 32).permute(2, 0, 3, 1, 4)

        def finish(attention, out):
            return attention.out(out.transpose(1, 2).flatten(2))

        other = replace(PAINTER, project=project, finish=finish)
        with kvruntime.attach(painter, "full", 1.0, embedding=other, check=True):
            with pytest.raises(EmbeddingError, match="away from the model's own"):
                painter(TEXT)

    def test_generators_that_take_turns(self, painter):
        """Each with the model's own cache as if it were alone."""
        own = list(painter.steps(TEXT, seed=1, guided=99))
        with kvruntime.attach(painter, "full", 1.0, embedding=STEPS, check=True):
            first, second = (painter.steps(TEXT, seed=seed, guided=99) for seed in (1, 2))
            pairs = [(next(first), next(second)) for _ in range(5)]
        assert all(torch.equal(one, alone) for (one, _), alone in zip(pairs, own, strict=True))

    def test_a_call_that_stops_early(self, painter):
        whole = replace(PAINTER, schedule=lambda painter, call: SIDES)
        with kvruntime.attach(painter, "full", 1.0, embedding=whole, check=True) as attached:
            painter(TEXT, scales=2)
            assert not attached._watch.is_watching

    def test_once_for_each_class(self, painter):
        for is_watched in (True, False):
            with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER, check=True) as cache:
                assert (cache._watch is not None) == is_watched
                painter(TEXT)

    def test_what_is_wrong_is_said_in_the_first_call(self, painter):
        wrong = replace(PAINTER, rows=lambda painter, call, rows: {})
        with kvruntime.attach(painter, "full", 1.0, embedding=wrong, check=True) as cache:
            with pytest.raises(EmbeddingError, match="planned with 4 rows"):
                painter(TEXT)
            assert cache.stats.live_pages == 0

    def test_generators_too(self, painter):
        own = list(painter.steps(TEXT))
        with kvruntime.attach(painter, "full", 1.0, embedding=STEPS, check=True):
            ours = list(painter.steps(TEXT))
        assert all(torch.equal(*pair) for pair in zip(ours, own, strict=True))
