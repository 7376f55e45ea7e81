"""Hazards of threads that share what belongs to one: refused, or each its own."""

import copy
import sys
import threading

import pytest
import torch

import kvruntime
from kvruntime import CacheOptions, PagedKVCache, Pool, ScheduleError
from policies import CacheGeometry, ScaleSchedule

LABELS = torch.tensor([0, 2])


def in_a_thread(function):
    """What the function returns or raises in another thread."""
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert found, "the thread hangs"
    return found[0]


def test_h23_a_model_in_use_refuses_another_thread(tiny_model):
    """In the middle of a scale, whichever way the other thread comes in."""
    own = tiny_model.generate(LABELS, seed=1)
    attention = tiny_model.blocks[0].attention
    refusals = []

    def observer(scale, layer, *_):
        if (scale, layer) == (3, 0):
            refusals.append(in_a_thread(lambda: tiny_model.generate(LABELS, seed=2)))
            refusals.append(in_a_thread(lambda: attention(torch.zeros(4, 25, 32))))
            refusals.append(in_a_thread(lambda: attention.use_cache(True)))
            refusals.append(in_a_thread(attached.close))

    with kvruntime.attach(tiny_model, "full", 1.0, observer=observer) as attached:
        ours = tiny_model.generate(LABELS, seed=1)
        assert torch.equal(ours, own)
        assert attached.stats.live_pages == 0
    assert len(refusals) == 4
    for refusal in refusals:
        assert isinstance(refusal, ScheduleError) and "another thread draws" in str(refusal)


def test_h23_a_model_about_to_draw_refuses_another_thread(tiny_model):
    """Between the start of the sampler and the first layer, when no generation is open yet."""
    own = tiny_model.generate(LABELS, seed=1)
    refusals = []

    def before_the_first_layer(*_):
        if not refusals:
            refusals.append(None)
            refusals.append(in_a_thread(lambda: tiny_model.generate(LABELS, seed=2)))

    with kvruntime.attach(tiny_model, "full", 1.0):
        hook = tiny_model.blocks[0].attention.qkv.register_forward_pre_hook(before_the_first_layer)
        assert torch.equal(tiny_model.generate(LABELS, seed=1), own)
        hook.remove()
    assert isinstance(refusals[1], ScheduleError)


def test_h23_a_model_left_half_done_refuses_another_thread(tiny_model):
    with kvruntime.attach(tiny_model, "full", 1.0) as attached:
        for block in tiny_model.blocks:
            block.attention.use_cache(True)
        tiny_model.blocks[0].attention(torch.zeros(2, 1, 32))
        refusal = in_a_thread(lambda: tiny_model.generate(LABELS, seed=1))
        assert isinstance(refusal, ScheduleError)
        assert attached.stats.live_pages > 0
        attached.close()
        picture = in_a_thread(lambda: tiny_model.generate(LABELS, seed=1))
    assert torch.equal(picture, tiny_model.generate(LABELS, seed=1))


def test_h23_a_thread_that_died_half_way_is_in_nobodys_way(tiny_model):
    """By hand, without the sampler: nobody could draw until the block ended."""
    own = tiny_model.generate(LABELS, seed=1)

    def half_way():
        for block in tiny_model.blocks:
            block.attention.use_cache(True)
        tiny_model.blocks[0].attention(torch.zeros(2, 1, 32))

    with kvruntime.attach(tiny_model, "full", 1.0) as attached:
        thread = threading.Thread(target=half_way)
        thread.start()
        thread.join(60)
        assert attached.stats.live_pages > 0
        assert torch.equal(tiny_model.generate(LABELS, seed=1), own)
        assert attached.stats.live_pages == 0


def test_h23_threads_that_draw_at_once_are_refused_or_right(tiny_model):
    """Mostly ScheduleError before, once in 24 a wrong picture."""
    own = tiny_model.generate(LABELS, seed=1)
    pictures, errors = [], []

    def draw():
        for _ in range(5):
            try:
                pictures.append(tiny_model.generate(LABELS, seed=1))
            except ScheduleError:
                errors.append(1)
            except BaseException as error:
                errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with kvruntime.attach(tiny_model, "full", 1.0) as attached:
            threads = [threading.Thread(target=draw) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert attached.stats.live_pages == 0
    finally:
        sys.setswitchinterval(interval)
    assert len(pictures) + len(errors) == 15 and pictures
    assert all(error == 1 for error in errors), errors
    assert all(torch.equal(picture, own) for picture in pictures)


def test_h23_each_thread_with_a_copy_of_the_model(tiny_model):
    own = tiny_model.generate(LABELS, seed=1)
    with kvruntime.attach(tiny_model, "full", 1.0) as attached:
        pool_pages = attached.plan(2).peak_pages
        pool = Pool(num_pages=2 * pool_pages, page_bytes=attached.plan(2).bytes_per_page)

    def draw():
        twin = copy.deepcopy(tiny_model)
        with kvruntime.attach(twin, "full", 1.0, pool=pool):
            return twin.generate(LABELS, seed=1)

    found = []
    threads = [threading.Thread(target=lambda: found.append(draw())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(torch.equal(picture, own) for picture in found)
    pool.check()
    assert pool.stats.live_pages == 0


@pytest.mark.parametrize("what", ["attend", "close", "fork", "keep_rows"])
def test_h23_a_generation_in_a_step_refuses_another_thread(what):
    geometry = CacheGeometry(2, 2, 8, "float32", "float32")
    refusals = []

    def other():
        if what == "attend":
            return generation.attend(0, *torch.zeros(3, 1, 4, 2, 8))  # what is due
        return generation.keep_rows(1) if what == "keep_rows" else getattr(generation, what)()

    def observer(scale, layer, *_):
        if (scale, layer) == (1, 0):
            refusals.append(in_a_thread(other))

    page = 16 * 2 * 8 * 4
    cache = PagedKVCache(
        geometry,
        ScaleSchedule.of([1, 2, 3]),
        CacheOptions("full"),
        softmax_scale=1.0,
        observer=observer,
        pool=Pool(num_pages=100, page_bytes=page),
    )
    with cache.open(1) as generation:
        for tokens in (1, 4, 9):
            for layer in range(2):
                generation.attend(layer, *torch.zeros(3, 1, tokens, 2, 8))
    assert len(refusals) == 1 and isinstance(refusals[0], ScheduleError)
