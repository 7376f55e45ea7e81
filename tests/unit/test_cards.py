"""kvruntime plan for a card: what is reserved, what fits, what to change where it does not."""

import json

import pytest
from typer.testing import CliRunner

from kvruntime.cards import CARDS, CONTEXT_BYTES, find_card, reserve_of
from kvruntime.catalogue import MODEL_NAMES, find_model
from kvruntime.cli import app
from kvruntime.planning import plan
from kvruntime.planning.compare import MOST_PICTURES, WAYS, compare_ways, most_pictures
from kvruntime.reference import load_model


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "RTX 4090 24GB"),
        ("rtx-4090", "RTX 4090 24GB"),
        ("H100 80GB", "H100 80GB"),
        ("a100 40", "A100 40GB"),
        ("l4 24gb", "L4 24GB"),
    ],
)
def test_a_card_by_any_part_of_its_name(text, name):
    assert find_card(text).name == name
    assert find_card(text).num_bytes == CARDS[name] * 2**20


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a100", "stands for several: there are A100 40GB, A100 80GB"),
        ("", "is unknown: there are RTX 3060"),
        ("TPU", "give --memory and --reserved"),
    ],
)
def test_a_card_that_is_not_one(text, says):
    with pytest.raises(ValueError, match=says):
        find_card(text)


def test_a_card_is_about_as_large_as_its_name_says():
    for name, mib in CARDS.items():
        gigabytes = int(name.rsplit(" ", 1)[1].removesuffix("GB"))
        assert 0.92 * gigabytes < mib / 1024 <= 1.001 * gigabytes


def test_what_a_model_takes_beside_its_cache():
    reserve = reserve_of(find_model("infinity-8b"))
    published = 19.5e9  # ScaleKV, table 3: parameters
    assert reserve.weights + reserve.text_encoder == pytest.approx(published, rel=0.01)
    assert reserve.fixed == reserve.weights + reserve.text_encoder + CONTEXT_BYTES
    assert reserve_of(find_model("infinity-8b"), with_text_encoder=False).text_encoder == 0
    assert reserve_of(find_model("infinity-8b"), running_bytes=7).running == 7
    half = find_model("infinity-2b", "0.25M")
    assert half.running_bytes == find_model("infinity-2b").running_bytes * 32 * 32 // 4096
    model = load_model()
    assert find_model("emoji64").weights_bytes == sum(4 * p.numel() for p in model.parameters())
    for name in MODEL_NAMES:
        assert find_model(name).weights_bytes > 10**7


@pytest.mark.parametrize("name", ["infinity-2b", "var-d16"])
def test_as_many_fit_as_the_plans_say_and_no_more(name):
    model, room, running = find_model(name), 15 * 10**9, 5 * 10**8
    ways = compare_ways(model, room, running)
    assert [way.name for way in ways[1:]] == [way[0] for way in WAYS]
    for way in ways[1:]:
        for pictures, fits in ((way.pictures, True), (way.pictures + 1, False)):
            made = plan(name, pictures, way.policy, way.budget, kv_dtype=way.kv_dtype)
            assert (made.total_bytes + pictures * running <= room) == fits, way.name
        one = plan(name, 1, way.policy, way.budget, kv_dtype=way.kv_dtype)
        assert (way.picture_bytes, way.workspace_bytes) == (one.page_bytes, one.workspace_bytes)
    own = ways[0].pictures
    made = plan(name, own, "full", 1.0).baseline_bytes()["with_cat_copy_bytes"]
    assert made + own * running <= room
    assert own < ways[1].pictures < ways[-1].pictures


def test_the_most_pictures():
    assert most_pictures(lambda n: 10 * n, 9) == 0
    assert most_pictures(lambda n: 10 * n, 10) == 1
    assert most_pictures(lambda n: 10 * n, 12_345) == 1234
    assert most_pictures(lambda n: 0, 1) == MOST_PICTURES


def test_a_card_on_the_command_line():
    done = run("infinity-2b", "--card", "4090", "--batch", "8")
    assert done.exit_code == 0, done.output
    text = done.stdout
    assert "26 rows fit: 13 pictures at once" in text
    bar = next(line for line in text.splitlines() if line.startswith("WWW"))
    assert list(dict.fromkeys(bar)) == list("WTCRwP.") and 60 <= len(bar) <= 68
    made = plan("infinity-2b", 8)
    assert f"P  pages: {made.page_bytes / 2**30:.3g} GiB" in text
    assert "free: 6.58 GiB of RTX 4090 24GB, 24 GiB" in text
    told = json.loads(run("infinity-2b", "--card", "4090", "--batch", "8", "--json").stdout)
    reserve = reserve_of(find_model("infinity-2b"))
    assert told["memory_bytes"] == CARDS["RTX 4090 24GB"] * 2**20 - reserve.fixed
    assert told["running_bytes"] == reserve.running and told["max_rows"] == 26


def test_what_does_not_fit_says_what_would():
    done = run("infinity-2b", "--card", "4090", "--batch", "16")
    assert done.exit_code == 3 and "too much by" in done.stdout
    assert (
        "26 of 32 rows would fit; all 16 pictures would with scalekv 10 %, int4; cent"
        in done.stderr
    )
    done = run("infinity-8b", "--card", "t4", "--batch", "1")
    assert done.exit_code == 3 and "not one row fits" in done.stderr
    done = run("infinity-2b", "--card", "t4", "--policy", "full", "--budget", "1.0", "--batch", "2")
    assert done.exit_code == 3 and "of 4 rows would fit" in done.stderr


def test_options_of_a_room():
    few = json.loads(run("infinity-2b", "--card", "4090", "--json").stdout)["max_rows"]
    for more in (["--no-text-encoder"], ["--running", "100MB"], ["--reserved", "0"]):
        told = json.loads(run("infinity-2b", "--card", "4090", *more, "--json").stdout)
        assert told["max_rows"] > few, more
    alone = json.loads(
        run("infinity-2b", "--card", "4090", "--rows-per-picture", "1", "--json").stdout
    )
    assert alone["rows"] == 1
    for bad, says in (
        (["--card", "4090", "--memory", "3GiB"], "not both"),
        (["--compare"], "go with --card or --memory"),
        (["--card", "9999"], "is unknown"),
        (["--reserved", "1GiB"], "--reserved goes with --memory or --card"),
        (["--rows-per-picture", "0"], "rows-per-picture must be a positive integer"),
        (["--card", "4090", "--running", "much"], "running must be a size"),
    ):
        done = run("infinity-2b", *bad)
        assert done.exit_code == 2 and says in " ".join(done.stderr.split()), bad


def test_the_comparison_as_table_json_and_picture(tmp_path):
    out = tmp_path / "ways.png"
    done = run("infinity-125m", "--card", "4090", "--compare", "--plot", str(out))
    assert done.exit_code == 0 and out.read_bytes()[:4] == b"\x89PNG"
    for name in ("own cache", *(way[0] for way in WAYS)):
        assert name in done.stdout
    told = json.loads(run("infinity-2b", "--memory", "20GiB", "--compare", "--json").stdout)
    assert told.keys() == {"version", "model", "room", "total_bytes", "reserve", "ways"}
    assert told["total_bytes"] == 20 * 2**30 and told["ways"][0]["name"] == "own cache"
    assert told["reserve"] == {"weights": 0, "text_encoder": 0, "context": 0, "running": 0}
