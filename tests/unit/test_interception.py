"""A foreign forward while its attention is taken over: interrupts, nesting, threads, copies."""

import copy
import threading
from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import _get_current_function_mode_stack

import kvruntime
from kvruntime import Pool, ScheduleError
from tests.hazards.interrupts import Interrupts
from tests.look_alikes.described import PAINTER, STEPS, TEXT, everything
from tests.look_alikes.painter import Painter

FILES = ("interception.py", "attachment.py", "serving.py", "patching.py", "caches.py", "parity.py")


@pytest.fixture
def painter():
    made = Painter(depth=1)
    made.net.blocks[0].attention.fast = True
    return made


FLAGGED = replace(PAINTER, flags={"fast": False})


def masked():
    """An attention call that the runtime would refuse."""
    q = torch.ones(1, 1, 2, 8)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(2, 2))


@pytest.mark.parametrize("check", [False, True])
def test_an_interrupt_anywhere_leaves_nothing_behind(painter, check, monkeypatch):
    """At every other line that runs while a picture is drawn."""
    monkeypatch.setattr(kvruntime.adapters, "_checked", WeakKeyDictionary())
    own, before = painter(TEXT, scales=2, guided=1), everything(painter)
    at, places = 1, set()
    while True:
        with kvruntime.attach(painter, "full", 1.0, embedding=FLAGGED, check=check) as attached:
            with Interrupts(at, FILES) as interrupts:
                try:
                    painter(TEXT, scales=2, guided=1)
                except KeyboardInterrupt:
                    pass
            assert painter.net.blocks[0].attention.fast is True, interrupts.where
            assert not _get_current_function_mode_stack(), interrupts.where
            assert attached.stats.live_pages == 0, interrupts.where
            assert masked().shape == (1, 1, 2, 8), interrupts.where
            assert torch.equal(painter(TEXT, scales=2, guided=1), own), interrupts.where
        assert everything(painter) == before, interrupts.where
        if not interrupts.happened:
            break
        places.add(interrupts.where)
        at += 2
    assert len(places) > 60


def test_the_newest_attachment_serves_alone(painter):
    """The older one's mode would take the call of the newer one's forward."""
    seen = {"outer": 0, "inner": 0}

    def note(name):
        def observer(*_):
            seen[name] += 1

        return observer

    own = painter(TEXT)
    with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER, observer=note("outer")):
        with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER, observer=note("inner")):
            assert torch.equal(painter(TEXT), own)
        assert seen == {"outer": 0, "inner": 5}
        assert torch.equal(painter(TEXT), own)
    assert seen == {"outer": 5, "inner": 5}


def test_a_drawing_goes_on_where_it_began(painter):
    """A newer attachment comes while it is half done, from here or from another thread."""
    own, served = list(painter.steps(TEXT)), []

    def note(name):
        return lambda *_: served.append(name)

    with kvruntime.attach(painter, "full", 1.0, embedding=STEPS, observer=note("old")) as old:
        steps = painter.steps(TEXT)
        got = [next(steps), next(steps)]
        with kvruntime.attach(painter, "full", 1.0, embedding=STEPS, observer=note("new")):
            got.append(next(steps))
            fresh = list(painter.steps(TEXT))
        got += list(steps)
        assert old.stats.planned_pages == old.stats.peak_pages
    for drawn in (got, fresh):
        assert all(torch.equal(*pair) for pair in zip(drawn, own, strict=True))
    assert served == ["old"] * 3 + ["new"] * 5 + ["old"] * 2


def test_one_thread_draws_at_a_time_whatever_is_attached(painter):
    own, refusals = painter(TEXT), []
    inside = threading.Event()

    def other():
        with kvruntime.attach(painter, "streaming_llm", 8, embedding=PAINTER):
            try:
                painter(TEXT)
            except ScheduleError as error:
                refusals.append(error)
            inside.set()
            done.wait(60)

    def observer(*_):
        if not threads:
            threads.append(threading.Thread(target=other))
            threads[0].start()
            inside.wait(60)

    threads, done = [], threading.Event()
    with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER, observer=observer):
        assert torch.equal(painter(TEXT), own)
        done.set()
        threads[0].join(60)
    assert len(refusals) == 1 and "another thread draws" in str(refusals[0])
    assert torch.equal(painter(TEXT), own)


def test_a_generator_that_is_dropped_while_another_thread_draws(painter):
    """Its pages go back at once."""
    with kvruntime.attach(painter, "full", 1.0, embedding=STEPS) as attached:
        plan = attached.plan(2, guided=3, scales=5)
    pool = Pool(num_pages=2 * plan.peak_pages, page_bytes=plan.bytes_per_page)
    kept, left = [], []

    def drop():
        kept.clear()
        left.append(pool.stats.reserved_pages)

    def observer(scale, *_):
        if scale == 2 and kept:
            thread = threading.Thread(target=drop)
            thread.start()
            thread.join(60)

    with kvruntime.attach(painter, "full", 1.0, embedding=STEPS, pool=pool, observer=observer):
        kept.append(painter.steps(TEXT))
        next(kept[0])
        list(painter.steps(TEXT))
        assert left == [plan.peak_pages] and pool.stats.live_pages == 0
        pool.check()


def test_attention_in_other_threads_is_their_own(painter):
    """A mode is one of a thread."""
    found = []

    def observer(*_):
        thread = threading.Thread(target=lambda: found.append(masked()))
        thread.start()
        thread.join(60)

    with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER, observer=observer):
        painter(TEXT)
    assert len(found) == 5


def test_other_calls_of_the_forward_go_their_way(painter):
    """Cross-attention in between is torch's, and so is everything that an observer computes."""
    results = []
    with kvruntime.attach(
        painter, "full", 1.0, embedding=PAINTER, observer=lambda *_: results.append(masked())
    ):
        painter(TEXT)
    assert len(results) == 5


def test_a_copy_made_while_a_forward_runs_draws_by_itself(painter):
    own, copies = painter(TEXT), []

    def observer(*_):
        copies.append(copy.deepcopy(painter.net))

    with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER, observer=observer):
        painter(TEXT)
    twin = Painter(depth=1)
    twin.net = copies[2]
    assert torch.equal(twin(TEXT), own)


def test_in_inference_mode_and_with_gradients(painter):
    own = painter(TEXT)
    painter.net.requires_grad_(True)
    with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER):
        with torch.inference_mode():
            assert torch.equal(painter(TEXT), own)
        with torch.enable_grad():
            assert torch.equal(painter(TEXT), own)


def test_what_is_float32_under_autocast_is_cast_as_torchs_attention_does(painter):
    """Values too, where a module computes them so: kept in bfloat16, and the result is."""
    attention = painter.net.blocks[0].attention
    attention.qkv.register_forward_hook(lambda module, inputs, out: out.float())
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        own = painter(TEXT)
        with kvruntime.attach(
            painter,
            "full",
            1.0,
            embedding=PAINTER,
            observer=lambda scale, layer, row, q, keys, _: seen.append((q.dtype, keys.dtype)),
        ) as attached:
            assert torch.equal(painter(TEXT), own)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert attached.stats.baseline_bytes == 2 * 66 * 2 * 64 * 4  # as the model itself keeps them


def test_doubles_stay_doubles_under_autocast(painter):
    """Autocast leaves them alone, and no page holds one."""
    painter.net.double()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="dtype 'float64' is not one of"):
            with kvruntime.attach(painter, "full", 1.0, embedding=PAINTER):
                pass
