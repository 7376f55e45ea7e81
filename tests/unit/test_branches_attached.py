"""Rows that are repeated in an attached model: attach, admission, kvruntime vary."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import kvruntime
from kvruntime import Admission, Pool
from kvruntime.adapters import EMOJI
from kvruntime.cli import app
from tests.waiting import is_empty


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
        for bad in ((10, 3), (4, True), (4, 2.0), (4,), (0, 2), (4, 0), [4, 2]):
            with pytest.raises(ValueError, match=r"branch is \(a scale of 1..9"):
                tiny_model.generate_codes(labels, 5, branch=bad)


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


def serving_of(rows):
    from kvruntime.adapters.caches import Caches
    from kvruntime.adapters.serving import Serving
    from kvruntime.reference.transformer import EmojiVAR

    model = EmojiVAR(3, width=32, depth=2, num_heads=2)
    view = kvruntime.adapters.view_of(model, replace(EMOJI, rows=rows))
    caches = Caches(view, kvruntime.CacheOptions(), None, None, None, None)
    return Serving(view, caches), view.schedule({})


def test_guidance_rows_that_go_later_are_as_many_times_fewer():
    """rows(model, call, rows) counts what would be left without a branch."""
    serving, schedule = serving_of(lambda model, call, rows: {2: rows, 6: rows // 2})
    found = serving.rows_from({}, schedule, 8, (4, 3))
    assert found == {2: 8, 4: 24, 6: 12}


@pytest.mark.parametrize("rows", [lambda *_: {4: 2}, lambda *_: {4: 8}])
def test_rows_do_not_go_and_branch_at_once(rows):
    """Which of the two comes first is not said."""
    serving, schedule = serving_of(rows)
    with pytest.raises(ValueError, match=r"branch\(\) at scale 4, where 4 rows become"):
        serving.rows_from({}, schedule, 4, (4, 2))


@pytest.mark.parametrize("at", [2, 6])
def test_a_branch_is_watched_as_well(tiny_model, at):
    """attach(check=True) looks at four scales."""
    silent = replace(EMOJI, rows=lambda model, call, rows: {})
    labels = torch.tensor([0, 2])
    with kvruntime.attach(tiny_model, "full", 1.0, embedding=silent, check=True) as attached:
        attached.branch(at, 3)
        drawn = tiny_model.generate_codes(labels, 5, branch=(at, 3))[1]
    assert torch.equal(drawn, tiny_model.generate_codes(labels, 5, branch=(at, 3))[1])


def test_what_was_said_goes_with_the_call_it_was_said_of(tiny_model):
    """A call that cannot begin, and one that was under way before."""
    labels, told = torch.tensor([0, 2]), []

    def schedule(model, call):
        if told:
            raise LookupError
        return EMOJI.schedule(model, call)

    unsure = replace(EMOJI, schedule=schedule, rows=lambda *_: {})
    with kvruntime.attach(tiny_model, "full", 1.0, embedding=unsure) as attached:
        wanted = tiny_model.generate(labels)
        attached.branch(4, 3)
        told.append(True)
        with pytest.raises(kvruntime.EmbeddingError, match="LookupError"):
            tiny_model.generate(labels)
        told.clear()
        assert torch.equal(tiny_model.generate(labels), wanted)


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
        (["--out", str(tmp_path)], "it is a folder"),
        (["--out", str(tmp_path / "no" / "p.png")], "its folder is missing"),
        (["--out", str(tmp_path / "p.doc")], "no kind of picture is called .doc"),
    ):
        result = CliRunner().invoke(app, [*call, *bad])
        assert result.exit_code == 2 and says in result.stderr
