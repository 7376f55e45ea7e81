"""Rows that are repeated, as users meet them: what is refused, attach, admission, the demo."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import kvruntime
from kvruntime import Admission, Pool, ScheduleError
from kvruntime.adapters import EMOJI
from kvruntime.cli import app
from policies import Allocation, Needs, ScaleKV, Selection, make_policy
from tests.unit.test_rows import SCHEDULE, cache_of, draw, steps
from tests.waiting import is_empty


@pytest.mark.parametrize(
    ("policy", "options"),
    [("full", {}), ("scalekv", {}), ("centroid", {}), ("ams_kv", {}), ("full", {"workspace": 1})],
)
def test_variations_draw_what_rows_that_were_alike_from_the_start_draw(policy, options):
    made = ScaleKV(grid=1) if policy == "scalekv" else make_policy(policy)
    cache = cache_of(made, 0.6, **options)
    with cache.open(2, {3: 6}) as some, cache_of(made, 0.6, **options).open(6) as every:
        for scale in range(5):
            if scale == 3:
                some.branch(3)
            for layer in range(2):
                q, k, v = steps(SCHEDULE, 6, scale, layer)
                if scale < 3:
                    q, k, v = (part[::3].repeat_interleave(3, 0) for part in (q, k, v))
                few = slice(None, None, 1 if scale >= 3 else 3)
                ours = some.attend(layer, q[few], k[few], v[few])
                assert torch.allclose(ours, every.attend(layer, q, k, v)[few], atol=1e-5)
        assert some.stats.peak_pages == some.stats.planned_pages


def test_what_is_refused():
    cache = cache_of()
    with cache.open(2, {2: 6}) as generation:
        draw(generation, SCHEDULE, [0])
        with pytest.raises(ScheduleError, match=r"no row is repeated at scale 1 .* \{1: 2 \* rows"):
            generation.branch(2)
        draw(generation, SCHEDULE, [1])
        with pytest.raises(ScheduleError, match=r"3 rows for each of 2: branch\(3\) goes first"):
            generation.attend(0, *steps(SCHEDULE, 2, 2, 0))
        with pytest.raises(ValueError, match="planned with 3 rows for each, got 2"):
            generation.branch(2)
        with pytest.raises(ValueError, match="count must be a positive integer"):
            generation.branch(0)
        with pytest.raises(ScheduleError, match=r"repeated at scale 2: keep_rows\(\) elsewhere"):
            generation.keep_rows(1)
        generation.branch(3)
        assert generation.rows == 6
        with pytest.raises(ScheduleError, match="no row is repeated at scale 2"):
            generation.branch(3)
        with pytest.raises(ScheduleError, match=r"repeated at scale 2: keep_rows\(\) elsewhere"):
            generation.keep_rows(1)
        generation.attend(0, *steps(SCHEDULE, 6, 2, 0))
        with pytest.raises(ScheduleError, match="branch goes between scales"):
            generation.branch(3)


def test_rows_that_went_unplanned_are_repeated_all_the_same():
    with cache_of().open(4, {3: 12}) as generation:
        draw(generation, SCHEDULE, [0])
        generation.keep_rows([3])
        assert generation.plan.rows_by_scale == (4, 1, 1, 3, 3)
        for scale in (1, 2):
            for layer in range(2):
                generation.attend(layer, *steps(SCHEDULE, 1, scale, layer))
        generation.branch(3)
        for layer in range(2):
            generation.attend(layer, *steps(SCHEDULE, 3, 3, layer))
        assert generation.stats.peak_pages == generation.stats.planned_pages


def test_rows_that_share_less_than_the_first_ones_keep_their_room():
    """Rows 0 and 3 are of different pictures, rows 0 and 1 of one."""
    reserved = []
    for kept in ([0, 1], [0, 3]):
        with cache_of().open(2, {3: 6}) as generation:
            pool = generation._runner.pool
            draw(generation, SCHEDULE, [0, 1, 2])
            generation.branch(3)
            for layer in range(2):
                generation.attend(layer, *steps(SCHEDULE, 6, 3, layer))
            generation.keep_rows(kept)
            for layer in range(2):
                assert pool.stats.live_pages <= pool.stats.reserved_pages
                generation.attend(layer, *steps(SCHEDULE, 2, 4, layer))
            reserved.append(pool.stats.reserved_pages)
    assert reserved[0] < reserved[1] == pool.num_pages


class Ends:
    """Keeps eight tokens of the history: the first ones in even layers, the last in odd ones."""

    name, needs = "ends", Needs(by_lane=True)

    def allocate(self, problem):
        geometry = problem.geometry
        counts = [min(seen, 8) for seen in problem.schedule.seen[:-1]] + [0]
        tokens = np.tile(np.array(counts)[:, None, None], (1, geometry.layers, geometry.heads))
        return Allocation(tokens)

    def scratch(self, sizes):
        return []

    def select(self, candidates):
        heads, count = candidates.positions.shape[1:]
        keep = int(candidates.keep[0])
        first = count - keep if candidates.layer % 2 else 0
        return Selection(torch.arange(first, first + keep).expand(1, heads, keep))


def test_layers_that_keep_other_tokens_share_other_pages():
    """As many in each layer, and yet one rewrites its pages where the other does not."""
    cache = cache_of(Ends(), 8, page_size=2)
    with cache.open(1, {3: 4}) as generation:
        held, pool = generation.plan.occupancy, generation._runner.pool
        for scale in range(5):
            if scale == 3:
                generation.branch(4)
            for layer in range(2):
                generation.attend(layer, *steps(SCHEDULE, generation.rows, scale, layer))
                assert pool.allocator.num_live == held.after[scale, layer]
        assert generation.stats.peak_pages == generation.stats.planned_pages
    assert np.diff(held.after[3]) > 0, "the second layer writes"


def test_too_little_memory_says_how_many_rows_would_fit():
    room = cache_of().plan(2, {3: 6}).total_bytes
    plan = cache_of().plan(4, {3: 12})
    with pytest.raises(kvruntime.WillNeverFit, match="2 of 4 rows would fit"):
        kvruntime.planning.require(plan, room)


@pytest.mark.parametrize("policy", ["full", "scalekv", "centroid"])
def test_the_first_variation_is_the_picture_itself(tiny_model, policy):
    labels = torch.tensor([0, 2])
    own = tiny_model.generate_codes(labels, 5, branch=(4, 3))[1]
    assert torch.equal(own[::3], tiny_model.generate(labels, 5))
    with kvruntime.attach(tiny_model, policy, 1.0, page_size=4) as attached:
        alone = tiny_model.generate(labels, 5)
        drawn = tiny_model.generate_codes(labels, 5, branch=(4, 3))[1]
        assert torch.allclose(drawn[::3], alone, atol=1e-5)
        assert not torch.equal(drawn[1], drawn[0]) and not torch.equal(drawn[2], drawn[1])
        if policy == "full":
            assert torch.equal(drawn, own)
            plan, apart = attached.plan(2, branch=(4, 3)), attached.plan(6)
            assert attached.stats.peak_pages == plan.peak_pages < apart.peak_pages
        with pytest.raises(ValueError, match=r"branch is \(a scale of 1..9"):
            tiny_model.generate_codes(labels, 5, branch=(10, 3))


def test_a_sampler_whose_arguments_do_not_tell(tiny_model):
    """Attachment.branch says it for the next generation."""
    labels = torch.tensor([0, 2])
    silent = replace(EMOJI, rows=lambda model, call, rows: {})
    own = tiny_model.generate_codes(labels, 5, branch=(4, 3))[1]
    with kvruntime.attach(tiny_model, "full", 1.0, embedding=silent, page_size=4) as attached:
        attached.branch(4, 3)
        plan = attached.plan(2)
        drawn = tiny_model.generate_codes(labels, 5, branch=(4, 3))[1]
        assert torch.equal(drawn, own) and attached.stats.planned_pages == plan.peak_pages
        with pytest.raises(kvruntime.EmbeddingError, match="planned with 4 rows, the model came"):
            tiny_model.generate_codes(labels, 5, branch=(4, 3))
        attached.branch(4, 3)
        with pytest.raises(IndexError):
            tiny_model.generate(torch.tensor([10**6]))
        tiny_model.generate(labels)  # what was said went with the call that failed
        with pytest.raises(ValueError, match="at_scale must be a positive integer"):
            attached.branch(0, 3)
        attached.branch(10, 3)
        with pytest.raises(ValueError, match=r"branch\(\) at scale 10: it goes at one of 1..9"):
            tiny_model.generate(labels)


def test_guidance_rows_that_go_later_are_as_many_times_fewer():
    """rows(model, call, rows) counts what would be left without a branch."""
    from kvruntime.adapters.caches import Caches
    from kvruntime.adapters.serving import Serving
    from kvruntime.reference.transformer import EmojiVAR

    view = kvruntime.adapters.view_of(
        EmojiVAR(3, width=32, depth=2, num_heads=2),
        replace(EMOJI, rows=lambda model, call, rows: {2: rows, 6: rows // 2}),
    )
    serving = Serving(view, Caches(view, kvruntime.CacheOptions(), None, None, None, None))
    serving.branch = 4, 3
    schedule = view.schedule({})
    assert serving.rows_from({}, schedule, 8) == {2: 8, 4: 24, 6: 12}


def test_a_branched_generation_waits_its_turn(tiny_model):
    labels = torch.tensor([0, 2])
    with kvruntime.attach(tiny_model, "full", 1.0, page_size=4) as attached:
        plan = attached.plan(2, branch=(4, 3))
        wanted = tiny_model.generate_codes(labels, 5, branch=(4, 3))[1]
    admission = Admission(Pool(num_pages=plan.peak_pages, page_bytes=plan.bytes_per_page))
    with kvruntime.attach(tiny_model, "full", 1.0, page_size=4, admission=admission) as attached:
        for _ in range(2):
            drawn = tiny_model.generate_codes(labels, 5, branch=(4, 3))[1]
            assert torch.equal(drawn, wanted)
            assert attached.stats.peak_pages == admission.pool.num_pages
    assert is_empty(admission)


def test_vary_writes_a_row_for_each_picture(tmp_path):
    out = tmp_path / "vary.png"
    call = ["vary", "--from-scale", "6", "--count", "2", "--pictures", "2", "--out", str(out)]
    result = CliRunner().invoke(app, [*call, "--json"])
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["planned_pages"] == figures["peak_pages"] < 0.9 * figures["apart_pages"]
    assert figures["shared_pages"] < figures["planned_pages"]
    pixels = np.asarray(Image.open(out))
    assert pixels.shape == (256, 256, 3)
    row = pixels.reshape(2, 128, 2, 128, 3).swapaxes(1, 2)
    assert (row[:, 0] != row[:, 1]).any() and (row[0] != row[1]).any()
    result = CliRunner().invoke(app, [*call, "--pictures", "1"])
    half = figures["planned_pages"] // 2
    assert f"{half} planned, {half} used" in result.stdout
    assert f"wrote {out}" in result.stdout
    for bad, says in (
        (["--from-scale", "10"], "from-scale must be in 1..9, got 10"),
        (["--count", "0"], "count must be a positive integer"),
        (["--out", str(tmp_path)], "is a folder"),
    ):
        result = CliRunner().invoke(app, [*call, *bad])
        assert result.exit_code == 2 and says in result.stderr
