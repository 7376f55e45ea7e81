"""The command line: stable names in the JSON, exit codes, nothing but JSON on stdout."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvruntime import attach, plan
from kvruntime.cli import app, parse_budget, parse_bytes
from kvruntime.formats import RowFormat
from kvruntime.reference import load_model
from policies import POLICY_NAMES


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_plan_json_has_the_documented_names():
    result = run(
        *"plan infinity-8b --batch 8 --budget 650 --json".split(),
        *"--key-dtype float32 --value-dtype bfloat16".split(),
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert {
        "rows",
        "token_bytes",
        "page_bytes",
        "workspace_bytes",
        "peak_pages",
        "baseline",
    } <= report.keys()
    assert report["baseline"].keys() == {
        "history_bytes",
        "all_scales_bytes",
        "with_cat_copy_bytes",
    }
    assert "max_rows" not in report
    assert report["rows"] == 16 and report["version"] == 1
    assert report["token_bytes"] // 2**20 == 8531
    assert report["baseline"]["history_bytes"] // 2**20 == 84328


def test_a_budget_beyond_everything_keeps_everything():
    result = run(*"plan var-d16 --policy sliding_window --json --budget".split(), "9" * 20)
    assert json.loads(result.stdout)["budget_tokens"] == 680


@pytest.mark.parametrize(
    ("arguments", "roles"),
    [
        ("infinity-8b", "preset"),
        ("infinity-125m", "none"),
        ("emoji64", "profile"),
        ("emoji64 --policy ams_kv", "profile"),
        ("var-d16 --policy ams_kv", "none"),
        ("emoji64 --policy full", "none"),
    ],
)
def test_plan_says_where_the_roles_come_from(arguments, roles):
    assert json.loads(run("plan", *arguments.split(), "--json").stdout)["roles"] == roles


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_the_plan_of_the_bundled_model_is_what_its_demo_uses(policy):
    made = plan("emoji64", 2, policy)
    model = load_model()
    with attach(model, policy) as attached:
        model.generate(torch.tensor([0, 1]))
    assert attached.stats.peak_pages == made.peak_pages
    assert attached.stats.workspace_bytes == made.workspace_bytes


def test_plan_says_how_many_rows_fit():
    report = json.loads(
        run(*"plan infinity-8b --memory 80GiB --reserved 20GiB --json".split()).stdout
    )
    assert report["memory_bytes"] == 60 * 2**30
    assert report["max_rows"] > report["rows"] == 2
    text = run(*"plan infinity-8b --memory 80GiB".split()).stdout
    assert "rows fit" in text and "pictures at once" in text


def test_plan_that_does_not_fit_exits_with_3_and_the_numbers():
    result = run(*"plan infinity-8b --batch 8 --policy full --memory 8GiB --json".split())
    assert result.exit_code == 3
    assert json.loads(result.stdout)["max_rows"] == 2
    assert "not enough memory" in result.stderr and "2 of 16 rows would" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "plan gpt-2",
        "plan infinity-8b --batch 0",
        "plan infinity-8b --batch x",
        "plan infinity-8b --budget nan",
        "plan infinity-8b --budget -1",
        "plan infinity-8b --budget ten",
        "plan infinity-8b --budget 15",
        "plan infinity-8b --policy lru",
        "plan infinity-8b --memory lots",
        "plan infinity-8b --memory 0GiB",
        "plan infinity-8b --reserved 1GiB",
        "plan infinity-8b --key-dtype int3",
        "plan infinity-8b --page-size 0",
        "plan infinity-8b --resolution 9M",
        "plan infinity-8b --profile /no/such/file.json",
        "plan var-d16 --policy sliding_window --page-size 99999999999999999999",
        "plan var-d16 --memory " + "9" * 400 + "GiB",
        "demo --budget nan",
        "demo --budget 10",
        "demo --count 1000000000000000",
        "demo --policy lru",
        "demo --count 0",
        "demo --dtype int3",
        "demo --budget 0",
        "demo --budget 3",
        "demo --kv-dtype int3",
        "demo --kv-dtype int4 --kv-groups 8",
        "demo --kv-start 3",
        "plan infinity-8b --kv-dtype bfloat16",
        "plan infinity-8b --kv-groups 4",
        "plan infinity-8b --kv-dtype int4 --kv-groups 3",
        "plan infinity-8b --kv-dtype int4 --kv-start 13",
        "plan infinity-8b --kv-dtype int4 --kv-start -1",
        "plan infinity-8b --kv-dtype int4 --page-size 10",
        "plan infinity-125m --kv-dtype int4 --kv-groups 8",
    ],
)
def test_bad_input_exits_with_2_and_one_message(arguments, tmp_path):
    result = run(*arguments.split(), *(["--out", str(tmp_path)] if "demo" in arguments else []))
    assert result.exit_code == 2, result.stderr
    assert result.stdout == "" and result.stderr.strip()
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


RUN_KEYS = {
    "policy",
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
    "workspace_bytes",
    "baseline_bytes",
    "seconds",
}


def check_demo(report, count, dtype):
    """The schema of demo.json, and P1, P2 and P6 on the bundled model."""
    assert report["count"] == count and report["dtype"] == dtype
    assert tuple(report["runs"]) == POLICY_NAMES
    for name, policy in report["runs"].items():
        assert policy.keys() == RUN_KEYS | ({"bit_identical"} if name == "full" else set())
        assert policy["psnr_db"].keys() == {"mean", "min"}
        assert policy["planned_pages"] == policy["peak_pages"]
        assert policy["leaked_pages"] == 0
    runs = report["runs"]
    assert runs["full"]["bit_identical"] is True
    assert runs["full"]["kl"] == 0 and runs["full"]["psnr_db"] == {"mean": None, "min": None}
    history = runs["full"]["token_bytes"]
    for name in set(POLICY_NAMES) - {"full"}:
        assert runs[name]["token_bytes"] <= 0.10 * history
        assert 0 < runs[name]["kl"] < 1 and runs[name]["psnr_db"]["mean"] > 10


def check_formats(report):
    """full and scalekv with int4 and int2, for each number of groups, with and without the start
    scale: figures that are there, in the order that theory says.
    """
    found = {}
    for run in report["quantised"]:
        assert run.keys() == RUN_KEYS and run["planned_pages"] == run["peak_pages"]
        row = RowFormat.named(run["kv_dtype"], run["kv_groups"])
        exact = report["runs"][run["policy"]]
        assert run["token_bytes"] * 4 * 32 == exact["token_bytes"] * row.row_bytes(32)
        found[run["policy"], run["kv_dtype"], run["kv_groups"], run["kv_start"] > 0] = run["kl"]
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_demo(tmp_path, dtype):
    formats = "--formats" if dtype == "float32" else "--no-formats"
    result = run(
        *("demo", "--count", "2", "--dtype", dtype, formats, "--out", str(tmp_path), "--json")
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "demo.json").read_text())
    check_demo(report, 2, dtype)
    if dtype == "float32":
        check_formats(report)
    else:
        assert report["quantised"] == []
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_demo_table(tmp_path):
    rest = ("--count", "1", "--policy", "ams_kv", "--no-formats", "--out", str(tmp_path))
    result = run("demo", *rest)
    assert result.exit_code == 0, result.stderr
    assert "bit-identical with the model's own: True" in result.stdout
    assert "ams_kv" in result.stdout
    result = run("demo", *rest, "--kv-dtype", "int4", "--kv-groups", "2", "--kv-start", "3")
    assert result.exit_code == 0, result.stderr
    assert "ams_kv int4/2 @3" in result.stdout and "bit-identical" not in result.stdout


@pytest.mark.parametrize(("groups", "mib"), [(1, 1511), (4, 1777)])
def test_int4_pages_of_infinity_8b(groups, mib):
    command = "plan infinity-8b --batch 8 --policy scalekv --budget 650 --kv-dtype int4"
    result = run(*command.split(), "--kv-groups", str(groups), "--json")
    report = json.loads(result.stdout)
    assert round(report["token_bytes"] / 2**20) == mib
    assert (report["kv_dtype"], report["kv_groups"], report["kv_start"]) == ("int4", groups, 5)
    exact = json.loads(run(*command.split()[:-2], "--json").stdout)
    assert round(exact["token_bytes"] / 2**20) == 5688 and exact["kv_dtype"] is None
    printed = run(*command.split(), "--kv-groups", str(groups)).stdout
    assert f"{report['token_bytes'] / 2**20:,.1f}" in printed


def test_doctor():
    report = json.loads(run("doctor", "--json").stdout)
    assert report["versions"]["torch"] and report["versions"]["python"]
    assert report["backends"]["torch-sdpa"] == {"available": True, "reasons": []}
    assert (
        not report["backends"]["xformers"]["available"]
        and report["backends"]["xformers"]["reasons"]
    )
    assert report["triton"]["compiles"] and report["triton"]["capability"] == 90
    assert report["operators"]["triton_splitK, pages"]
    assert any("device=cpu" in "; ".join(reasons) for reasons in report["operators"].values())
    assert len(report["operators"]) >= 4 and all(report["operators"].values())
    assert report["host"]["total_bytes"] > 0
    assert bool(report["cuda"]["nvml"]) != bool(report["cuda"]["why_no_nvml"])
    assert "torch-sdpa" in run("doctor").stdout


@pytest.mark.parametrize(
    ("text", "budget"), [("0.10", 0.1), ("650", 650), ("1.0", 1.0), ("1", 1), ("1e-1", 0.1)]
)
def test_budgets(text, budget):
    parsed = parse_budget(text)
    assert parsed == budget and type(parsed) is type(budget)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("1.5 MiB", 3 * 2**19), ("2gb", 2 * 10**9), ("7", 7), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size
