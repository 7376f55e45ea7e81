"""What the documents tell people to type works."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvruntime.catalogue import find_model
from kvruntime.cli import app
from kvruntime.planning import plan

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_embedding_code_runs(capsys):
    code = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code) == 1
    exec(compile(code[0], "README.md", "exec"), {})
    pages, baseline = map(int, re.findall(r"\d+", capsys.readouterr().out))
    assert 0 < pages < 0.03 * baseline


MEASURED = (ROOT / "docs" / "measured.md").read_text()


def commands():
    return sorted({*re.findall(r"^kvruntime (.+)$", README + MEASURED, re.M)})


@pytest.mark.parametrize("command", [one for one in commands() if one != "doctor"])
def test_the_commands_run(command):
    """But for doctor, which tests/unit/test_cli.py runs: it compiles a kernel."""
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.stderr
    assert result.stdout


def test_the_make_targets_exist():
    targets = re.findall(r"^make (\w+)", README, re.M)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in [*targets, *re.findall(r"`make (\S+)`", README)]:
        assert re.search(rf"^{target}:.* ## \w", makefile, re.M), "and says what it is for"
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_table_of_bytes_is_what_the_planner_says():
    rows = re.findall(r"^\| ((?:VAR|Infinity)-\w+), .*? \| (.+) \|$", MEASURED, re.M)
    assert len(rows) == 8
    for name, cells in rows:
        made, full = plan(name.lower(), 1, budget=0.10), plan(name.lower(), 1, "full")
        centroid = plan(name.lower(), 1, "centroid", "2%", kv_dtype="int4")
        schedule = find_model(name).schedule
        tokens, *sizes = [cell.replace(" ", "") for cell in cells.split("|")]
        assert tokens == f"{schedule.total},{schedule.history}"
        wanted = (
            made.baseline_bytes()["with_cat_copy_bytes"],
            full.page_bytes,
            made.token_bytes,
            made.page_bytes,
            made.workspace_bytes,
            centroid.page_bytes,
        )
        assert [int(size) for size in sizes] == [round(size / 2**20) for size in wanted], name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:tests|docs|kvruntime|policies|allocator)/[\w/.]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:unit|property)/[\w/.]+\.py)`", text):
        assert (ROOT / "tests" / path).exists(), path
