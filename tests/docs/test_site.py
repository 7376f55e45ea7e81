"""The site builds without a warning, and its API page has every public name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import kvruntime

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds_and_all_its_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    pages = {path.parent.name for path in tmp_path.glob("*/index.html")}
    assert {"tour", "embedding", "policies", "admission", "faq", "design", "api"} <= pages
    api = (tmp_path / "api" / "index.html").read_text()
    for name in kvruntime.__all__:
        assert f'id="kvruntime.{name}"' in api, name
    assert not re.findall(r'(?:src|href)="https?://(?!squidfunk)', api), (
        "fonts and scripts are here"
    )


def test_the_api_page_names_what_is_public_and_nothing_twice():
    named = re.findall(r"^::: kvruntime\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(named) == sorted(set(named)) == kvruntime.__all__
