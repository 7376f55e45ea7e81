"""RUN.json and the page that is made of it. tests/integration/test_report_page.py opens it."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kvruntime
from kvruntime.cli import app
from kvruntime.errors import ScheduleError
from kvruntime.planning import plan
from kvruntime.reference import load_model
from kvruntime.report.capture import Capture, picture_of, roles_of
from kvruntime.report.charts import origin_chart
from kvruntime.report.page import frontier, headline, render
from kvruntime.report.record import Layer, Run, load_run, save_run

LABELS = torch.tensor([0, 4])


@pytest.fixture(scope="module")
def record():
    model = load_model()
    with kvruntime.attach(model, "scalekv", 0.1, provenance=True) as attached:
        capture = Capture(attached)
        with pytest.raises(ScheduleError, match="nothing is drawn yet"):
            capture.record("sample", "emoji64", 0.1, 1.0, [], 2)
        drawn = model.generate(LABELS, seed=1)
        model.generate(LABELS[:1], seed=2)
        pictures = [picture_of("one <b>", drawn[0], drawn[1]), picture_of("two", drawn[1])]
        return capture.record("sample", "emoji64", 0.1, 1.0, pictures, 2, origin=capture.layers)


def test_the_record_is_of_the_first_generation(record):
    model = load_model()
    with kvruntime.attach(model, "scalekv", 0.1, provenance=True) as attached:
        made = attached.plan(2)
    assert record.rows == 4 and record.curves.used[-1] == 0
    assert record.curves.planned == record.curves.used
    assert max(record.curves.used) == record.bytes.pages == made.page_bytes
    assert record.bytes.own_copying == made.baseline_bytes()["with_cat_copy_bytes"]
    assert record.tokens == made.tokens.mean(axis=2).tolist()
    assert record.policy == "scalekv" and record.quality is None and record.others == []
    assert record.history_share == pytest.approx(
        record.bytes.pages / (4 * 8 * 6 * 424 * 32 * 2 * 2)
    )
    kept = {layer.layer: len(layer.scale) for layer in record.origin}
    assert kept == {layer: made.tokens[-2, layer, 0] for layer in range(8)}


def test_roles_of_layers_after_each_scale(record):
    assert {role for line in record.roles for role in line} == {"drafter", "refiner"}
    made = plan("emoji64", 2, "scalekv", 0.1)
    drafters = made.policy.drafters
    for scale, line in enumerate(roles_of(made)[:-1]):
        found = {layer for layer, role in enumerate(line) if role == "drafter"}
        assert found == drafters[min(scale + 1, len(drafters) - 1)]
    ams = roles_of(plan("emoji64", 2, "ams_kv", 0.1))
    assert {role for line in ams for role in line} == {"demanding", "efficient"}
    assert roles_of(plan("emoji64", 2, "centroid", 0.1)) == []


def test_it_is_read_as_it_was_written(record, tmp_path):
    save_run(record, tmp_path / "RUN.json")
    assert load_run(tmp_path / "RUN.json") == record


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": 7}, "as a whole: Value error, tokens must be 10 lists of 7"),
        ({"tokens": []}, "tokens must be 10 lists of 8"),
        ({"roles": [["drafter"]]}, "roles must be 10 lists of 8, or none"),
        ({"version": 2}, "version: Input should be 1"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"sizes": [[0, 1]]}, "sizes.0.0: Input should be greater than 0"),
        ({"policy": "x" * 2001}, "policy: String should have at most 2000 characters"),
        (
            {"pictures": [{"title": "a", "data": "<script>"}]},
            "pictures.0.data: String should match",
        ),
        ({"pictures": [{"title": "a", "data": "QQ==\n"}]}, "pictures.0.data: String should match"),
        ({"seconds": float("nan")}, "seconds: "),
        (
            {"origin": [{"layer": 0, "scale": [1], "column": [], "line": [], "weight": []}]},
            "must be equally long",
        ),
        (
            {"curves": {"planned": [1], "used": [1], "own": [1]}},
            "curves.planned must be 80 numbers",
        ),
    ],
)
def test_foreign_files_are_refused(record, tmp_path, change, says):
    path = tmp_path / "RUN.json"
    path.write_text(json.dumps(record.model_dump() | change))
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_run(path)
    assert says in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "RUN.json"
    with path.open("wb") as file:
        file.truncate(2**25 + 1)
    with pytest.raises(ValueError, match=f"{2**25 + 1} bytes, at most {2**25} are read"):
        load_run(path)


def test_the_page_says_what_the_record_says(record):
    page = render(record)
    assert "one &lt;b&gt;" in page and "<b>" not in page
    assert f"equal at <strong>{8 * 10} of {8 * 10}</strong> steps" in page
    assert headline(record) in page.replace("&#39;", "'")
    assert page.count('<input type="range"') == 1 and page.count("data:image/png") == 3 + 8
    assert page.count('class="role"') == sum(line.count("drafter") for line in record.roles)
    assert "Beside every other policy" in page and "this run:" not in page, "no KL is known"
    assert not re.search(r'(?:src|href|url)\s*[=(]\s*"?(?!data:|#)\w', page), "nothing elsewhere"
    other = Run.model_validate(record.model_dump() | {"model": "var-d16", "origin": []})
    page = render(other)
    assert "Beside every other policy" not in page and "Not recorded in this run." in page


def test_circles_of_kept_tokens_are_as_large_as_tokens_of_their_scale():
    layer = Layer(layer=0, scale=[0, 2], column=[0.5, 0.25], line=[0.5, 0.75], weight=[1, 20])
    chart = str(origin_chart(layer, [(1, 1), (2, 2), (4, 2)]))
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)" stroke-width="([\d.]+)"', chart)
    (first, second) = [tuple(map(float, circle)) for circle in circles]
    assert first == (50.0, 50.0, 45.0, 0.25)
    assert second[:3] == (25.0, 75.0, 11.25) and second[3] == pytest.approx(1.15, abs=0.01)


def test_the_frontier_is_that_of_the_docs():
    """Its KL at 10 %, exact, as docs/policies.md has it."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "policies.md").read_text()
    points = frontier()["points"]
    for policy in ("centroid", "h2o", "scalekv", "ams_kv", "hackpp"):
        (cells,) = re.findall(rf"^\| `{policy}`, exact \| (0.0\S+(?: \| \S+){{5}}) \|$", text, re.M)
        wanted = float(cells.split("|")[2])
        (found,) = [
            point["kl"]
            for point in points
            if (point["policy"], point["kv_dtype"]) == (policy, None)
            and 0.08 < point["bytes_share"] <= 0.1
        ]
        assert found == pytest.approx(wanted, abs=6e-5)


def test_the_command(record, tmp_path):
    path = tmp_path / "RUN.json"
    save_run(record, path)
    done = CliRunner().invoke(app, ["report", str(path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report.html").read_text() == render(record)
    assert "wrote" in done.stdout and "KiB" in done.stdout
    elsewhere = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", str(path), "-o", str(elsewhere)]).exit_code == 0
    assert elsewhere.read_text() == render(record)
    path.write_text("{}")
    done = CliRunner().invoke(app, ["report", str(path)])
    assert done.exit_code == 2 and "is no run" in done.stderr
    assert CliRunner().invoke(app, ["report", str(tmp_path / "no.json")]).exit_code == 2


def test_large_pictures_are_made_smaller():
    picture = picture_of("large", torch.rand(3, 1024, 768), None)
    assert picture.kind == "jpeg" and len(picture.data) < 400_000
    same = torch.rand(3, 16, 16)
    assert (
        picture_of("same", same, same).is_equal and picture_of("same", same, same).psnr_db is None
    )
    apart = picture_of("apart", same, (same + 0.1))
    assert apart.psnr_db == pytest.approx(20.0, abs=1e-4)
