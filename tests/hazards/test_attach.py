"""Hazards of a model that is lent to the runtime: taken out, copied, interrupted, nested."""

import copy
from contextlib import ExitStack

import pytest
import torch

import kvruntime
from kvruntime import CacheOptions, PagedKVCache, Pool, ScheduleError
from kvruntime.adapters.caches import Caches
from tests.hazards.interrupts import Interrupts
from tests.support import every_attribute

LABELS = torch.tensor([0, 2])


def pool_for(model, generations=1):
    """A pool of its own for each test, so that what leaks can be seen."""
    with kvruntime.attach(model, "full", 1.0) as attached:
        made = attached.plan(2)
    return Pool(num_pages=generations * made.peak_pages, page_bytes=made.bytes_per_page)


def start(model):
    """The first layer of a generation, which opens it, as an own sampler would."""
    for block in model.blocks:
        block.attention.use_cache(True)
    model.blocks[0].attention(torch.zeros(2, 1, 32))


def test_h04_a_detach_that_raises_leaves_the_model_patched(tiny_model, monkeypatch):
    before = every_attribute(tiny_model)
    own = tiny_model.generate(LABELS, seed=1)

    def fail(_):
        raise MemoryError

    monkeypatch.setattr(PagedKVCache, "let_go", fail)
    with pytest.raises(MemoryError):
        with kvruntime.attach(tiny_model, "full", 1.0):
            tiny_model.generate(LABELS, seed=1)
    assert every_attribute(tiny_model) == before
    assert torch.equal(tiny_model.generate(LABELS, seed=1), own)


def test_h04_a_cache_that_cannot_be_made_again_is_not_needed_on_the_way_out(
    tiny_model, monkeypatch
):
    before = every_attribute(tiny_model)
    with kvruntime.attach(tiny_model, "full", 1.0):
        tiny_model.generate(LABELS, seed=1)
        monkeypatch.setattr(Caches, "_cache", lambda *_: 1 / 0)
    assert every_attribute(tiny_model) == before


@pytest.mark.parametrize("is_open", [pytest.param(True, marks=pytest.mark.full), False])
def test_h17_an_interrupt_anywhere_on_the_way_out_leaves_the_model_patched(tiny_model, is_open):
    """At every line that runs between the end of the block and its last word."""
    before = every_attribute(tiny_model)
    pool = pool_for(tiny_model)
    at, places = 0, set()
    while True:
        at += 1
        context = kvruntime.attach(tiny_model, "full", 1.0, pool=pool)
        attached = context.__enter__()
        if is_open:
            start(tiny_model)
            assert pool.stats.live_pages
        with Interrupts(at) as interrupts:
            try:
                context.__exit__(None, None, None)
            except KeyboardInterrupt:
                pass
        assert every_attribute(tiny_model) == before, interrupts.where
        assert not any(block.attention.caching for block in tiny_model.blocks), interrupts.where
        assert pool.stats.live_pages == 0 == attached.stats.live_pages, interrupts.where
        pool.check()
        if not interrupts.happened:
            break
        places.add(interrupts.where)
    assert len(places) > (60 if is_open else 20)


def test_h17_an_interrupt_anywhere_on_the_way_in(tiny_model):
    before = every_attribute(tiny_model)
    at = 0
    while True:
        at += 1
        context = kvruntime.attach(tiny_model, "full", 1.0)
        with Interrupts(
            at, ("patching.py", "adapters/__init__.py", "attachment.py", "embedding.py")
        ) as interrupts:
            try:
                context.__enter__()
            except KeyboardInterrupt:
                pass
        if not interrupts.happened:
            context.__exit__(None, None, None)
        assert every_attribute(tiny_model) == before, interrupts.where
        if not interrupts.happened:
            break
    assert at > 60


def test_h17_an_interrupt_anywhere_in_close_leaks_pages(tiny_model):
    pool = pool_for(tiny_model)
    with kvruntime.attach(tiny_model, "full", 1.0, pool=pool) as attached:
        at = 0
        while True:
            at += 1
            start(tiny_model)
            with Interrupts(at) as interrupts:
                try:
                    attached.close()
                except KeyboardInterrupt:
                    pass
            attached.close()  # where the interrupt came before anything was done
            assert pool.stats.live_pages == 0 == attached.stats.live_pages, interrupts.where
            pool.check()
            if not interrupts.happened:
                break
        assert at > 20
        tiny_model.blocks[0].attention.use_cache(False)
        own = tiny_model.generate(LABELS, seed=1)
    assert torch.equal(tiny_model.generate(LABELS, seed=1), own)


def test_h17_an_interrupt_while_pages_go_back_comes_after_them(tiny_model):
    """Closed all the same, without another close()."""
    pool, at = pool_for(tiny_model), 0
    with kvruntime.attach(tiny_model, "full", 1.0, pool=pool) as attached:
        while True:
            at += 1
            start(tiny_model)
            with Interrupts(at, ("pool.py", "page_allocator.py", "block_table.py")) as interrupts:
                try:
                    attached.close()
                except KeyboardInterrupt:
                    assert interrupts.happened
            assert not attached._serving.last.is_open, interrupts.where
            assert pool.stats.live_pages == 0 == pool.stats.reserved_pages, interrupts.where
            pool.check()
            if not interrupts.happened:
                break
    assert at > 20


def test_h17_an_interrupt_anywhere_in_the_last_step(tiny_model):
    """A generation that was just done ends, and the next one works."""
    pool = pool_for(tiny_model)
    geometry, schedule = kvruntime.CacheGeometry(1, 2, 16, "float32", "float32"), [1, 2]
    schedule = kvruntime.ScaleSchedule.of(schedule)
    cache = PagedKVCache(
        geometry, schedule, CacheOptions("full", page_size=16), softmax_scale=1.0, pool=pool
    )
    at = 0
    while True:
        at += 1
        generation = cache.open(2)
        with Interrupts(at) as interrupts:
            try:
                generation.attend(0, *torch.zeros(3, 2, 1, 2, 16))
            except KeyboardInterrupt:
                pass
        generation.close()
        assert not generation.is_open and pool.stats.live_pages == 0, interrupts.where
        pool.check()
        if not interrupts.happened:
            break
    assert at > 100


def test_h17_close_from_an_observer_leaks_pages(tiny_model):
    pool, seen = pool_for(tiny_model), []

    def observer(scale, layer, *_):
        if (scale, layer) == (2, 1):
            seen.append(scale)
            attached.close()

    with kvruntime.attach(tiny_model, "full", 1.0, pool=pool, observer=observer) as attached:
        with pytest.raises(ScheduleError, match="raise an exception instead"):
            tiny_model.generate(LABELS, seed=1)
        assert seen == [2] and pool.stats.live_pages == 0
        pool.check()


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (0, 1, 2)])
def test_h18_attaches_left_in_any_order(tiny_model, order):
    """The newest that is still attached serves; the last one out leaves the model as it was."""
    before = every_attribute(tiny_model)
    own = tiny_model.generate(LABELS[:1], seed=1)
    stacks, served = [ExitStack() for _ in order], []
    for number, stack in enumerate(stacks):

        def observer(*_, number=number):
            served.append(number)

        stack.enter_context(kvruntime.attach(tiny_model, "full", 1.0, observer=observer))
    inside = set(range(len(order)))
    for leaving in order:
        served.clear()
        assert torch.equal(tiny_model.generate(LABELS[:1], seed=1), own)
        assert set(served) == {max(inside)}
        stacks[leaving].close()
        inside.remove(leaving)
    assert every_attribute(tiny_model) == before
    assert torch.equal(tiny_model.generate(LABELS[:1], seed=1), own)


def test_h18_a_deepcopy_inside_the_block_draws_with_its_own_weights(tiny_model):
    """And is not patched: nothing of the original's cache is behind it."""
    own = tiny_model.generate(LABELS, seed=1)
    with kvruntime.attach(tiny_model, "scalekv", 0.10) as attached:
        twin = copy.deepcopy(tiny_model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.5)
        rows = attached.stats.rows
        inside = twin.generate(LABELS, seed=1)
        assert attached.stats.rows == rows == 0
        assert twin.blocks[0].attention.forward.__self__ is twin.blocks[0].attention
    outside = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in outside.parameters():
            parameter.mul_(1.5)
    assert torch.equal(inside, outside.generate(LABELS, seed=1))
    assert not torch.equal(inside, own)
    assert torch.equal(twin.generate(LABELS, seed=1), inside)
    with kvruntime.attach(twin, "full", 1.0):
        assert torch.equal(twin.generate(LABELS, seed=1), inside)
