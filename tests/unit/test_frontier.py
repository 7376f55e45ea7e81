"""The frontier: what a point measures, how points are put together, and that it goes on from what
is done.
"""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import kvruntime
from benchmarks import frontier, frontier_point
from benchmarks.__main__ import app
from benchmarks.frontier_plot import save_plot
from benchmarks.frontier_point import Point, draw, evaluation_labels, make_reference
from benchmarks.schemas import Frontier
from kvruntime import CacheGeometry
from kvruntime.catalogue import find_model
from kvruntime.reference import EmojiVAR, load_classes
from policies import POLICY_NAMES
from tests.codecs import coding_of

SETTINGS = {"pictures": 2, "seed": 5, "dtype": "bfloat16"}


BFLOAT16 = find_model("emoji64").with_dtypes("bfloat16", "bfloat16")


def untrained(dtype):
    torch.manual_seed(0)
    model = EmojiVAR(len(load_classes()), width=64, depth=4, num_heads=2).to(dtype).eval()
    model.coding = coding_of(CacheGeometry(4, 2, 32, "float32", "float32"))
    return model


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Points of a small model that was never trained, by name."""
    folder = tmp_path_factory.mktemp("frontier")
    points = [
        Point("scalekv", None, "10%"),
        Point("random", None, "10%"),
        Point("centroid", "int4", "4%"),
        Point("full", None, "100%"),
        Point("scalekv", None, "1%"),
    ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontier_point, "load_model", untrained)
        make_reference(folder, **SETTINGS)
        return {point: draw(point, folder, **SETTINGS) for point in points}


def test_a_point(drawn):
    full = drawn[Point("full", None, "100%")]
    assert full["psnr"] == [math.inf] * 2 and full["kl"] == [0.0, 0.0]
    assert full["attention_error"] == 0.0 and full["ssim"] == pytest.approx([1.0, 1.0])
    exact, ours = drawn[Point("scalekv", None, "10%")], drawn[Point("centroid", "int4", "4%")]
    assert 0 < exact["bytes_share"] <= 0.10 and 0 < ours["bytes_share"] <= 0.04
    assert ours["kv_start"] is not None and exact["kv_start"] is None
    for result in (exact, ours):
        assert all(0 < value < 1 for value in result["kl"]) and 0 < result["attention_error"] < 1
        assert len(result["psnr"]) == len(result["ssim"]) == 2
    refused = drawn[Point("scalekv", None, "1%")]
    assert "cannot keep fewer" in refused["refused"] and refused["policy"] == "scalekv"


def test_float32_counts_pages_as_bfloat16_ones(drawn, tmp_path, monkeypatch):
    """Exact pages get the tokens that they hold in bfloat16, records the bytes."""
    monkeypatch.setattr(frontier_point, "load_model", untrained)
    settings = SETTINGS | {"dtype": "float32"}
    make_reference(tmp_path, **settings)
    exact, coded = (
        draw(point, tmp_path, **settings)
        for point in (Point("random", None, "10%"), Point("random", "coded3", "10%"))
    )
    assert exact["tokens"] == kvruntime.plan(BFLOAT16, 1, "random", "10%").budget_tokens
    assert 0.08 < exact["bytes_share"] <= 0.10 and 0.08 < coded["bytes_share"] <= 0.10
    assert coded["tokens"] > 4 * exact["tokens"]


def test_results_are_paired_with_the_best_published_policy(drawn):
    results = frontier.results(list(drawn.values()), 2)
    Frontier.model_validate(results)
    assert results["base"] == "scalekv" and len(results["refused"]) == 1
    by_policy = {point["policy"]: point for point in results["points"]}
    assert by_policy["scalekv"]["paired_db"]["mean"] == 0.0
    assert by_policy["scalekv"]["kl_ratio"] == 1.0
    wanted = [
        ours - base
        for ours, base in zip(
            drawn[Point("random", None, "10%")]["psnr"],
            drawn[Point("scalekv", None, "10%")]["psnr"],
            strict=True,
        )
    ]
    mean = sum(wanted) / 2
    half = 1.96 * math.sqrt(sum((x - mean) ** 2 for x in wanted)) / math.sqrt(2)
    paired = by_policy["random"]["paired_db"]
    assert paired["mean"] == pytest.approx(mean)
    assert paired["high"] - paired["mean"] == pytest.approx(half)
    assert by_policy["full"]["identical_pictures"] == 2
    assert by_policy["full"]["psnr_db"]["mean"] is None


def test_the_plot(drawn, tmp_path):
    save_plot(frontier.results(list(drawn.values()), 2), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_every_policy_at_every_share_and_other_classes_than_calibration():
    points = frontier.points()
    assert len(points) == len(set(points)) == ((len(POLICY_NAMES) - 1) * 2 + 3) * 6
    assert all(label % 2 for label in evaluation_labels(50).tolist())
    assert set(evaluation_labels(50).tolist()) == set(range(1, len(load_classes()), 2))


@pytest.mark.full
def test_it_goes_on_from_what_is_done(tmp_path):
    """One point in a process of its own; the next call draws nothing again."""
    work = tmp_path / "work"
    arguments = ["frontier", "--quick", "--policy", "random", "--pictures", "2", "--seed", "7"]
    arguments += ["--work", str(work), "--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out.json").read_text())
    assert [point["policy"] for point in report["results"]["points"]] == ["random"]
    path = work / "random-exact-10.json"
    stored = json.loads(path.read_text()) | {"tokens": 77}
    path.write_text(json.dumps(stored))
    assert CliRunner().invoke(app, arguments).exit_code == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["results"]["points"][0]["tokens"] == 77
    arguments[arguments.index("7")] = "8"
    other = CliRunner().invoke(app, arguments)
    assert other.exit_code == 2 and "take another folder" in other.stderr
    wrong = CliRunner().invoke(app, ["frontier", "--policy", "lru"])
    assert wrong.exit_code == 2 and "'lru' is not one of" in wrong.stderr
