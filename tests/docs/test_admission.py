"""The examples of docs/admission.md run."""

import re
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "admission.md").read_text()


def test_the_examples_run(capsys):
    names = {}
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(compile(code, "admission.md", "exec"), names)
    assert "underway=0, running=0, queued=0" in capsys.readouterr().out
    assert names["pictures"].shape[0] == 4 and names["admission"].stats.held_pages == 0
    names["pool"].check()
