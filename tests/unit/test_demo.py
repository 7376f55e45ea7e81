"""The demo: names in its report, and P1, P2 and P6 on the bundled model."""

import json

import pytest
from rich.console import Console

from kvruntime.demo import compare, print_report, run_demo
from kvruntime.demo.compare import SHOWN
from kvruntime.demo.pictures import save_formats
from kvruntime.report.record import load_run
from kvruntime.sizes import in_units
from kvruntime.storage.layout import CODED, KV_DTYPES, records_named
from tests.unit.test_cli import run

RUN_KEYS = {
    "policy",
    "budget_tokens",
    "kv_dtype",
    "kv_groups",
    "kv_start",
    "psnr_db",
    "identical_pictures",
    "kl",
    "planned_pages",
    "peak_pages",
    "leaked_pages",
    "token_bytes",
    "page_bytes",
    "plane_bytes",
    "workspace_bytes",
    "baseline_bytes",
    "seconds",
}


def check_demo(report, count, dtype):
    """The schema of demo.json, and P1, P2 and P6 on the bundled model."""
    assert report["count"] == count and report["dtype"] == dtype
    assert tuple(report["runs"]) == SHOWN
    for name, policy in report["runs"].items():
        assert policy.keys() == RUN_KEYS | ({"bit_identical"} if name == "full" else set())
        assert policy["psnr_db"].keys() == {"mean", "min"}
        assert policy["planned_pages"] == policy["peak_pages"]
        assert policy["leaked_pages"] == 0
    runs = report["runs"]
    assert runs["full"]["bit_identical"] is True
    assert runs["full"]["kl"] == 0 and runs["full"]["psnr_db"] == {"mean": None, "min": None}
    history = runs["full"]["token_bytes"]
    for name in set(SHOWN) - {"full"}:
        weight = 1 + 2 / (2 * 32 * 4) if name == "centroid" else 1
        assert runs[name]["token_bytes"] <= 0.10 * history * weight
        assert 0 < runs[name]["kl"] < 1 and runs[name]["psnr_db"]["mean"] > 10


def check_formats(report):
    """full and scalekv with int4 and int2, for each number of groups, with and without the start
    scale: figures that are there, in the order that theory says.
    """
    found = {}
    for one in report["quantised"]:
        assert one.keys() == RUN_KEYS and one["planned_pages"] == one["peak_pages"]
        records = records_named(one["kv_dtype"], one["kv_groups"])
        exact = report["runs"][one["policy"]]
        assert one["token_bytes"] * 4 * 32 == exact["token_bytes"] * records.num_bytes(32)
        found[one["policy"], one["kv_dtype"], one["kv_groups"], one["kv_start"] > 0] = one["kl"]
    formats = [("int4", 1), ("int4", 2), ("int4", 4), ("int2", 1), ("int2", 2)]
    assert list(found) == [
        (policy, *kind, late)
        for policy in ("full", "scalekv")
        for kind in formats
        for late in (True, False)
    ]
    for groups in (1, 2):
        for late in (True, False):
            assert 0 < found["full", "int4", groups, late] < 1e-3
            assert found["full", "int4", groups, late] < 0.1 * found["full", "int2", groups, late]
        assert found["full", "int4", groups, True] < found["full", "int4", groups, False]
    exact = report["runs"]["scalekv"]["kl"]
    assert all(abs(found["scalekv", "int4", g, True] - exact) < 0.2 * exact for g in (1, 2, 4))


def everything(tmp_path, *options):
    result = run("demo", "--all", *options, "--out", str(tmp_path), "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "demo.json").read_text())
    for name in ("demo.png", "formats.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    return report


@pytest.fixture
def few_formats(monkeypatch):
    monkeypatch.setattr(compare, "FORMATS", [])


@pytest.mark.parametrize(
    ("dtype", "count"),
    [
        pytest.param("float32", 1, marks=pytest.mark.full),
        pytest.param("bfloat16", 2, marks=pytest.mark.full),
    ],
)
def test_demo_of_everything(tmp_path, few_formats, dtype, count):
    report = everything(tmp_path, "--count", str(count), "--dtype", dtype)
    check_demo(report, count, dtype)
    assert report["runs"]["full"]["budget_tokens"] == report["history_tokens"] == 424
    assert report["budget_tokens"] == report["runs"]["scalekv"]["budget_tokens"] == 42


@pytest.mark.full
def test_demo_of_all_formats(tmp_path):
    report = everything(tmp_path, "--count", "2")
    check_demo(report, 2, "float32")
    check_formats(report)


@pytest.mark.full
def test_demo_at_a_budget_in_bytes(tmp_path, few_formats):
    """full stays what the others are compared with; they keep to the bytes."""
    report = everything(tmp_path, "--count", "1", "--budget", "10%")
    runs = report["runs"]
    assert report["budget"] == "10%" and runs["full"]["bit_identical"] is True
    history = runs["full"]["token_bytes"]
    for name in set(SHOWN) - {"full"}:
        assert 0 < runs[name]["page_bytes"] <= 0.10 * history
        assert runs[name]["planned_pages"] == runs[name]["peak_pages"]


@pytest.mark.full
def test_demo_of_quantised_pages(tmp_path, few_formats):
    """As a table for people; the file has the same figures."""
    pages = ("--kv-dtype", "int4", "--kv-groups", "2", "--kv-start", "3")
    rest = ("--all", "--count", "1", "--policy", "ams_kv", "--out", str(tmp_path))
    result = run("demo", *rest, *pages)
    assert result.exit_code == 0, result.stderr
    assert "ams_kv int4/2 @3" in result.stdout and "bit-identical" not in result.stdout
    report = json.loads((tmp_path / "demo.json").read_text())
    for name, one in report["runs"].items():
        assert (one["kv_dtype"], one["kv_groups"], one["kv_start"]) == ("int4", 2, 3), name
        assert one["planned_pages"] == one["peak_pages"] and one["leaked_pages"] == 0
    assert 0 < report["runs"]["full"]["kl"] < 1e-2


def test_the_demo_in_short(tmp_path):
    """Three ways to draw two pictures; a table of six lines, two pictures and the record."""
    result = run("demo", "--count", "2", "--out", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    for name in ("demo.png", "memory.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    record = load_run(tmp_path / "RUN.json")
    assert (record.command, record.policy, record.kv_dtype) == ("demo", "centroid", "int4")
    assert record.rows == 4 and record.pictures_drawn == len(record.pictures) == 2
    assert record.curves.planned == record.curves.used
    assert max(record.curves.used) == record.bytes.pages < record.bytes.own / 50
    assert max(record.curves.own) == record.bytes.own_copying
    (other,) = record.others
    assert other.policy == "scalekv, 10 %" and other.page_bytes > 5 * record.bytes.pages
    assert record.quality.kl < other.quality.kl and record.quality.psnr_db > 20
    assert len(record.origin) == 8 and record.origin[0].scale
    for layer in record.origin:
        assert len(layer.scale) <= record.budget_tokens and min(layer.weight) > 0
        assert 0 < min(layer.line) <= max(layer.line) < 1
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    (rule,) = [number for number, line in enumerate(lines) if set(line.strip()) == {"─"}]
    table = lines[rule + 1 : lines.index(next(line for line in lines if line.startswith("wrote")))]
    assert len(table) == 6
    assert in_units(record.bytes.own) in table[0] and in_units(record.bytes.pages) in table[0]


@pytest.mark.full
def test_the_demo_in_short_as_json(tmp_path):
    again = run("demo", "--count", "1", "--out", str(tmp_path), "--json")
    report = json.loads(again.stdout)
    assert list(report["runs"]) == ["scalekv", "centroid"] and report["count"] == 1


def test_the_table_of_a_report():
    """The same report as text names what is exact."""
    report = run_demo("full", 0.1, 1, 0, "float32", policies=("full",), compare_formats=False)[0]
    with (console := Console(width=200)).capture() as captured:
        print_report(report, console)
    assert "bit-identical with the model's own: True" in captured.get()


@pytest.mark.parametrize("kv_dtype", [*KV_DTYPES, *CODED])
def test_points_of_every_format_have_a_colour(kv_dtype, tmp_path):
    """int8 and coded pages had none."""
    run = {"policy": "full", "kl": 0.1, "psnr_db": {"mean": 20.0}, "token_bytes": 5, "kv_start": 0}
    report = {
        "runs": {"full": run | {"kv_dtype": kv_dtype}},
        "quantised": [run | {"kv_dtype": kv_dtype, "kv_start": 3}],
        "count": 1,
        "dtype": "float32",
        "budget": 0.1,
    }
    save_formats(report, tmp_path / "formats.png")
    assert (tmp_path / "formats.png").stat().st_size > 5_000
