"""Embeddings: a foreign model attached by its description."""

import copy
import threading
from dataclasses import replace

import pytest
import torch

import kvruntime
from kvruntime import EmbeddingError, ScheduleError
from tests.look_alikes.described import PAINTER, STEPS, TEXT, everything
from tests.look_alikes.painter import SIDES, Painter, rotated


@pytest.fixture
def painter():
    return Painter()


@pytest.mark.parametrize("guided", [1, 3, 99])
def test_full_draws_the_same_with_rows_that_go_half_way(painter, guided):
    own, before = painter(TEXT, guided=guided), everything(painter)
    with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER) as attached:
        for _ in range(2):
            assert torch.equal(painter(TEXT, guided=guided), own)
            stats = attached.stats
            assert stats.planned_pages == stats.peak_pages > 0 == stats.live_pages
            assert stats.rows == (2 if guided < len(SIDES) else 4)
        assert attached.plan(2, guided=guided, scales=5).peak_pages == stats.planned_pages
    assert everything(painter) == before
    assert torch.equal(painter(TEXT, guided=guided), own)
    parity = kvruntime.check(painter, lambda: painter(TEXT, guided=guided), PAINTER)
    assert parity == kvruntime.Parity(10, 5, "float32", 0.0)


@pytest.mark.parametrize("policy", ["scalekv", "ams_kv", "centroid", "streaming_llm"])
def test_every_policy_plans_what_it_takes(painter, policy):
    for budget, kv_dtype in ((20, None), (20, "int4")):
        with kvruntime.attach(
            painter, policy, budget, embedding=PAINTER, kv_dtype=kv_dtype, page_size=8
        ) as attached:
            first = painter(TEXT)
            assert torch.equal(painter(TEXT), first)
        assert attached.stats.planned_pages == attached.stats.peak_pages > 0


def test_the_rows_that_go_make_room(painter):
    """Their pages are not planned beyond the scale where they go."""
    with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER, page_size=1) as attached:
        late, early = (attached.plan(2, guided=guided, scales=5) for guided in (99, 2))
    assert late.peak_pages == 4 * 30 * 2 * 2 and early.peak_pages == 2 * 30 * 2 * 2
    assert late.baseline_bytes()["history_bytes"] == 2 * early.baseline_bytes()["history_bytes"]


def test_another_object_of_the_class_draws_by_itself(painter):
    other = Painter(seed=1)
    own = other(TEXT)
    with kvruntime.attach(painter, "streaming_llm", 8, embedding=PAINTER):
        assert torch.equal(other(TEXT), own)
        with kvruntime.attach(other, "full", 1.0, embedding=PAINTER) as inner:
            assert torch.equal(other(TEXT), own)
        assert inner.stats.peak_pages and torch.equal(other(TEXT), own)


def test_a_call_that_stops_early_leaks_nothing(painter):
    whole = replace(PAINTER, schedule=lambda painter, call: SIDES)
    own = painter(TEXT, scales=2)
    with kvruntime.attach(painter, "full", 1.0, embedding=whole) as attached:
        assert torch.equal(painter(TEXT, scales=2), own)
        assert attached.stats.live_pages == 0
        painter(TEXT)


def test_arguments_that_the_sampler_does_not_take_are_its_own_error(painter):
    with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER):
        with pytest.raises(TypeError, match="nonsense"):
            painter(TEXT, nonsense=1)
        painter(TEXT)


def test_keys_in_float32_under_autocast(painter):
    """Kept in float32 on demand; the model gets what its attention would return."""
    with torch.autocast("cpu", torch.bfloat16):
        own = painter(TEXT)
        with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER) as half:
            assert torch.equal(painter(TEXT), own)
        with kvruntime.attach(
            painter, "full", 1.0, embedding=PAINTER, key_dtype="float32"
        ) as whole:
            exact = painter(TEXT)
    assert whole.stats.page_bytes == 2 * half.stats.page_bytes
    assert whole.stats.baseline_bytes == half.stats.baseline_bytes
    assert exact.dtype == own.dtype and 0 < float((exact - own).abs().max()) < 0.1
    with pytest.raises(ValueError, match="key_dtype must be float32 or None"):
        with kvruntime.attach(painter, embedding=PAINTER, key_dtype="int8"):
            pass


def test_a_copy_made_in_the_middle_of_a_draw_has_its_own_flags(painter):
    """Flags are set around each forward, and never seen from outside."""
    attention = painter.net.blocks[0].attention
    attention.fast = True
    copies = []

    def between(*_):
        copies.append(copy.deepcopy(painter.net))
        assert attention.fast is True

    hook = painter.net.blocks[1].norm.register_forward_pre_hook(between)
    embedding = replace(
        PAINTER,
        flags={"fast": False},
        attentions=lambda painter: [block.attention for block in painter.net.blocks],
    )
    painter.net.blocks[1].attention.fast = True
    with kvruntime.attach(painter, "full", 1.0, embedding=embedding):
        painter(TEXT)
    hook.remove()
    assert copies and all(twin.blocks[0].attention.fast for twin in copies)
    assert attention.fast is True


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_project_and_finish_in_place_of_the_call(painter, layout):
    """With every argument of the module's forward."""

    def project(attention, x, angles):
        q, k, v = attention.qkv(x).view(*x.shape[:2], 3, 2, 32).permute(2, 0, 3, 1, 4)
        parts = rotated(q, angles), rotated(k, angles), v
        return parts if layout == "bhnd" else tuple(part.transpose(1, 2) for part in parts)

    def finish(attention, out):
        by_token = out.transpose(1, 2) if layout == "bhnd" else out
        return attention.out(by_token.flatten(2))

    embedding = replace(PAINTER, project=project, finish=finish, layout=layout)
    own = painter(TEXT)
    with kvruntime.attach(painter, "full", 1.0, embedding=embedding):
        assert torch.equal(painter(TEXT), own)
    assert kvruntime.check(painter, lambda: painter(TEXT), embedding).max_error == 0.0


def test_its_own_cache_is_empty_between_the_layers(painter):
    """It is on, and holds nothing: neither what it read nor what it wrote."""
    seen = []

    def look(*_):
        seen.extend((one.remembers, one.memory) for one in attentions)

    attentions = [block.attention for block in painter.net.blocks]
    hooks = [block.norm.register_forward_pre_hook(look) for block in painter.net.blocks]
    with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER):
        painter(TEXT)
    for hook in hooks:
        hook.remove()
    assert set(seen) == {(True, None)}


def test_a_cache_that_is_switched_off_by_a_flag(painter):
    """Where no method does it: every forward during the sampler is a step, and no other."""
    embedding = replace(PAINTER, toggle=None, flags={"remembers": False})
    own, x = painter(TEXT), torch.randn(1, 4, 64)
    attention = painter.net.blocks[0].attention
    angles = torch.zeros(4, 16)
    alone = attention(x, angles)
    with kvruntime.attach(painter, "full", 1.0, embedding=embedding) as attached:
        assert torch.equal(attention(x, angles), alone)
        assert attached.stats.rows == 0
        assert torch.equal(painter(TEXT), own)
    assert attached.stats.planned_pages == attached.stats.peak_pages > 0


def test_what_attention_returns_is_in_the_models_format(painter):
    q = torch.randn(1, 1, 2, 32).bfloat16()
    embedding = replace(PAINTER, rows=lambda painter, call, rows: {})
    with kvruntime.attach(
        painter, "full", 1.0, embedding=embedding, key_dtype="float32"
    ) as attached:
        assert attached.attend(0, q.float(), q.float(), q).dtype == torch.bfloat16
        assert attached._outside.generation.plan.geometry.key_dtype == "float32"


class ByHand(Painter):
    """Its sampler leaves it to others to switch the caches."""

    def first(self, text):
        x = torch.randn(2, 1, self.width, generator=torch.Generator().manual_seed(0))
        for block in self.net.blocks:
            x = block(x, torch.zeros(1, self.dim // 2), text)
        return x

    def switch(self, on):
        for block in self.net.blocks:
            block.attention.remember(on)


def test_caches_that_are_switched_by_hand():
    """Before the sampler is called; what the sampler switches off is off afterwards."""
    painter = ByHand()
    embedding = replace(PAINTER, rows=lambda painter, call, rows: {})
    by_hand = replace(embedding, sampler="first", schedule=lambda painter, call: SIDES)
    own = painter.first(TEXT)
    with kvruntime.attach(painter, "full", 1.0, embedding=by_hand) as attached:
        painter.switch(True)
        assert torch.equal(painter.first(TEXT), own)
        assert attached.stats.rows == 2 and attached.stats.live_pages == 0
        painter.switch(False)
        with pytest.raises(EmbeddingError, match=r"first\(\) returned and no attention came here"):
            painter.first(TEXT)
    with kvruntime.attach(painter, "full", 1.0, embedding=embedding) as attached:
        painter.switch(True)
        painter(TEXT, guided=99)
        served = attached.stats
        assert torch.equal(painter.first(TEXT), own)
        assert attached.stats == served


def test_arguments_that_a_sampler_takes_by_any_name(painter):
    """They are the call's as well."""

    class Wrapped(Painter):
        def __call__(self, text, **settings):
            return super().__call__(text, **settings)

    painter.__class__ = Wrapped
    own = painter(TEXT, guided=2, scales=4)
    with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER) as attached:
        assert torch.equal(painter(TEXT, guided=2, scales=4), own)
    assert attached.stats.planned_pages == attached.stats.peak_pages


class TestGenerators:
    def test_one_that_is_done_without_a_step_says_so(self, painter):
        with kvruntime.attach(painter, "full", 1.0, embedding=replace(STEPS, toggle="train")):
            with pytest.raises(EmbeddingError, match="no attention came here"):
                list(painter.steps(TEXT))

    def test_each_step_of_a_sampler_that_yields(self, painter):
        own = list(painter.steps(TEXT))
        with kvruntime.attach(painter, "full", 1.0, embedding=STEPS) as attached:
            ours = list(painter.steps(TEXT))
        assert all(torch.equal(*pair) for pair in zip(ours, own, strict=True))
        assert attached.stats.planned_pages == attached.stats.peak_pages

    def test_two_that_take_turns_draw_each_its_own(self, painter):
        """The modules' own cache would mix them."""
        wanted = [list(painter.steps(TEXT, seed=seed)) for seed in (1, 2)]
        with kvruntime.attach(painter, "full", 1.0, embedding=STEPS):
            turns = zip(*(painter.steps(TEXT, seed=seed) for seed in (1, 2)), strict=True)
            for scale, pair in enumerate(turns):
                assert all(torch.equal(x, own[scale]) for x, own in zip(pair, wanted, strict=True))

    def test_one_that_is_left_alone_gives_its_pages_back(self, painter):
        before = everything(painter)
        with kvruntime.attach(painter, "full", 1.0, embedding=STEPS) as attached:
            for _ in painter.steps(TEXT):
                break
            assert attached.stats.live_pages == 0
            kept = painter.steps(TEXT)
            next(kept)
            assert attached.stats.live_pages > 0
            kept.close()
            assert attached.stats.live_pages == 0
            late = painter.steps(TEXT)
            next(late)
        assert attached.stats.live_pages == 0 and everything(painter) == before
        with pytest.raises(ScheduleError, match="has ended with attach"):
            next(late)
        assert not any(block.attention.remembers for block in painter.net.blocks)

    def test_another_thread_may_go_on_with_it_but_not_at_the_same_time(self, painter):
        own, found = list(painter.steps(TEXT)), []

        def rest():
            found.extend(steps)

        with kvruntime.attach(painter, "full", 1.0, embedding=STEPS):
            steps = painter.steps(TEXT)
            found.append(next(steps))
            thread = threading.Thread(target=rest)
            thread.start()
            thread.join(60)
        assert all(torch.equal(*pair) for pair in zip(found, own, strict=True))
