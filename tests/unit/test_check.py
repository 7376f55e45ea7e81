"""check(): what can only be seen beside the model's own cache."""

from dataclasses import replace

import pytest
import torch

import kvruntime
import kvruntime.adapters
from kvruntime import EmbeddingError
from kvruntime.adapters import parity
from tests.look_alikes.described import PAINTER, STEPS, TEXT, everything
from tests.look_alikes.painter import Painter


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


def test_check_needs_a_step(painter):
    with pytest.raises(EmbeddingError, match=r"draw\(\) ran no step"):
        kvruntime.check(painter, lambda: None, PAINTER)


class TestCheckWhileAttached:
    @pytest.fixture(autouse=True)
    def nothing_checked(self, monkeypatch):
        monkeypatch.setattr(kvruntime.adapters, "_checked", set())

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
        layers, run_own = [], parity.run_own

        def note(view, layer, *rest):
            layers.append(layer)
            return run_own(view, layer, *rest)

        monkeypatch.setattr(parity, "run_own", note)
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
