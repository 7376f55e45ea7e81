"""The command line: stable names in the JSON, exit codes, nothing but JSON on stdout."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from kvruntime import attach, plan
from kvruntime.cli import app
from kvruntime.cli.common import parse_budget
from kvruntime.reference import load_model
from kvruntime.sizes import parse_bytes
from policies import POLICY_NAMES


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def plan_json(arguments):
    result = run("plan", *arguments.split(), "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


PLAN_KEYS = {
    "version",
    "model",
    "policy",
    "roles",
    "budget_tokens",
    "history_tokens",
    "key_dtype",
    "value_dtype",
    "page_size",
    "kv_dtype",
    "kv_groups",
    "kv_start",
    "rows",
    "token_bytes",
    "peak_token_bytes",
    "page_bytes",
    "plane_bytes",
    "workspace_bytes",
    "peak_pages",
    "baseline",
}


def test_plan_json_has_the_documented_names():
    options = "--batch 8 --budget 650 --key-dtype float32 --value-dtype bfloat16"
    report = plan_json(f"infinity-8b {options}")
    assert report.keys() == PLAN_KEYS
    assert report["baseline"].keys() == {
        "history_bytes",
        "all_scales_bytes",
        "with_cat_copy_bytes",
    }
    assert report["rows"] == 16 and report["version"] == 1
    assert report["token_bytes"] // 2**20 == 8531
    assert report["baseline"]["history_bytes"] // 2**20 == 84328
    assert report["plane_bytes"] == 0


def test_plan_json_counts_weights():
    report = plan_json("infinity-2b --policy centroid --budget 650 --page-size 64")
    assert report["plane_bytes"] == report["peak_pages"] * 64 * 2
    assert report["page_bytes"] == report["peak_pages"] * (64 * 128 * 2 * 2 + 64 * 2)
    assert report["roles"] == "none"


@pytest.mark.parametrize(("budget", "share"), [("2%", 0.02), (" 2.5 % ", 0.025), ("512MiB", None)])
@pytest.mark.parametrize("policy", ["scalekv", "centroid"])
def test_budgets_in_bytes(budget, share, policy):
    result = run("plan", "infinity-2b", "--policy", policy, "--json", "--budget", budget)
    report = json.loads(result.stdout)
    most = 2**29 if share is None else share * report["baseline"]["history_bytes"]
    assert 0.9 * most < report["page_bytes"] <= most
    assert report.keys() == PLAN_KEYS and report["budget_tokens"] > 50
    printed = run("plan", "infinity-2b", "--policy", policy, "--budget", budget).stdout
    assert f"{report['page_bytes'] / 2**20:,.1f}" in printed


def test_a_budget_in_bytes_that_is_too_small_exits_with_3():
    result = run(*"plan infinity-2b --budget 1KiB --json".split())
    assert result.exit_code == 3 and result.stdout == ""
    assert "not enough memory" in result.stderr and "1024 allowed" in result.stderr
    assert "scalekv cannot keep fewer than 16 tokens" in result.stderr


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
    assert plan_json(arguments)["roles"] == roles


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_the_plan_of_the_bundled_model_is_what_its_demo_uses(policy):
    made = plan("emoji64", 2, policy)
    model = load_model()
    with attach(model, policy) as attached:
        model.generate(torch.tensor([0, 1]))
    assert attached.stats.peak_pages == made.peak_pages
    assert attached.stats.workspace_bytes == made.workspace_bytes
    assert attached.stats.page_bytes == made.page_bytes


@pytest.mark.parametrize(
    ("pages", "says"),
    [("--kv-dtype coded3", "coded3 from scale"), ("--kv-dtype int4", "int4 with 1 groups from")],
)
def test_plan_names_the_pages(pages, says):
    done = run("plan", "infinity-2b", "--budget", "2%", *pages.split())
    assert done.exit_code == 0 and says in " ".join(done.stdout.split())
    assert says.split()[0] in run("plan", "--help").stdout


def test_plan_says_how_many_rows_fit():
    report = plan_json("infinity-8b --memory 80GiB --reserved 20GiB")
    assert report.keys() == PLAN_KEYS | {"memory_bytes", "running_bytes", "max_rows"}
    assert report["memory_bytes"] == 60 * 2**30
    assert report["max_rows"] > report["rows"] == 2
    assert plan_json("infinity-8b --memory 60GiB --reserved 0GiB") == report
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
        "plan infinity-8b --budget 0%",
        "plan infinity-8b --budget 101%",
        "plan infinity-8b --budget 0MiB",
        "plan infinity-8b --budget inf",
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
        "demo --budget 0%",
        "demo --budget 2MiB%",
        "demo --kv-dtype int3",
        "demo --kv-dtype int4 --kv-groups 8",
        "demo --kv-start 3",
        "plan infinity-8b --kv-dtype bfloat16",
        "plan infinity-8b --kv-groups 4",
        "plan infinity-8b --kv-dtype coded3 --kv-groups 2",
        "plan infinity-8b --kv-dtype coded1",
        "plan infinity-8b --kv-dtype int4 --kv-groups 3",
        "plan infinity-8b --kv-dtype int4 --kv-start 13",
        "plan infinity-8b --kv-dtype int4 --kv-start -1",
        "plan infinity-8b --kv-dtype int4 --page-size 2",
        "plan infinity-125m --kv-dtype int4 --kv-groups 8",
    ],
)
def test_bad_input_exits_with_2_and_one_message(arguments, tmp_path):
    result = run(*arguments.split(), *(["--out", str(tmp_path)] if "demo" in arguments else []))
    assert result.exit_code == 2, result.stderr
    assert result.stdout == "" and result.stderr.strip()
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_demo_into_a_folder_that_is_in_the_way(tmp_path):
    """Said before anything is drawn, not after."""
    (tmp_path / "RUN.json").mkdir()
    result = run("demo", "--count", "9999", "--out", str(tmp_path))
    assert result.exit_code == 2 and "RUN.json is a folder" in result.stderr
    (tmp_path / "file").write_text("")
    result = run("demo", "--count", "9999", "--out", str(tmp_path / "file"))
    assert result.exit_code == 2 and "file" in result.stderr


@pytest.mark.full  # tests/hazards/test_files.py tries the same
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_or_full_stdout_is_one_line_on_stderr(unbuffered):
    """Also where Python writes only when the command is done."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    for target in (">&-", "> /dev/full"):
        command = f"{sys.executable} -m kvruntime plan var-d16 --json {target}"
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_doctor(monkeypatch):
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
    monkeypatch.setattr("kvruntime.device.doctor", lambda: report)  # it takes a while
    assert "torch-sdpa" in run("doctor").stdout


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.10", 0.1),
        ("650", 650),
        ("1.0", 1.0),
        ("1", 1),
        ("1e-1", 0.1),
        ("+7", 7),
        ("2%", "2%"),
        (" 512MiB ", "512MiB"),
        ("2gb", "2gb"),
    ],
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
