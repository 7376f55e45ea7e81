"""The worked example of docs/embedding.md runs, line by line."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

import kvruntime
from kvruntime import Embedding
from kvruntime.models import BUILDERS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "embedding.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_the_foreign_model_from_nothing_to_parity(monkeypatch):
    (code,) = [block for block in BLOCKS if "from painter import" in block]
    assert len(code.splitlines()) <= 40
    monkeypatch.syspath_prepend(ROOT / "tests" / "look_alikes")
    monkeypatch.delitem(sys.modules, "painter", raising=False)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "embedding.md", "exec"), {})
    parity, pages = said.getvalue().splitlines()
    assert f"print(parity)  # {parity}\n" in code
    held, history = map(int, re.findall(r"\d+", pages))
    assert 0 < held < history


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_other_block_is_python(number):
    compile(BLOCKS[number], "embedding.md", "exec")


def test_the_table_of_fields_is_that_of_the_class():
    named = set(
        re.findall(
            r"`(\w+)(?:\([^)]*\))?`",
            "".join(line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `")),
        )
    )
    assert set(Embedding.__dataclass_fields__) <= named
    options = set(kvruntime.CacheOptions.__dataclass_fields__)
    assert options | {"embedding", "check", "key_dtype", "pool", "admission", "observer"} <= named


def test_the_commands_name_models_that_there_are():
    commands = re.findall(r"^kvruntime (\w+) (\S+)", TEXT, re.M)
    assert {command for command, _ in commands} == {"check", "calibrate", "sample", "eval", "vary"}
    assert all(model in BUILDERS for command, model in commands if command not in ("eval", "vary"))
