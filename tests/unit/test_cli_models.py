"""kvruntime check and kvruntime calibrate."""

import json

import pytest
from typer.testing import CliRunner

from kvruntime.cli import app
from policies import load_profile


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_check():
    done = run("check", "emoji64")
    assert done.exit_code == 0
    assert "80 steps over 10 scales in float32, the same bits as its own cache" in done.stdout
    report = json.loads(run("check", "emoji64", "--dtype", "bfloat16", "--json").stdout)
    assert report == {
        "model": "emoji64",
        "steps": 80,
        "scales": 10,
        "dtype": "bfloat16",
        "max_error": 0.0,
    }


def test_calibrate(tmp_path):
    out = tmp_path / "profile.json"
    done = run("calibrate", "emoji64", "--pictures", "3", "--batch", "2", "--out", str(out))
    assert done.exit_code == 0 and "statistics of 8 layers at 10 scales" in done.stdout
    profile = load_profile(out)
    assert (profile.model, profile.pictures, profile.layers) == ("emoji64", 3, 8)
    again = run("calibrate", "emoji64", "--pictures", "2", "--out", str(out), "--json")
    assert json.loads(again.stdout)["pictures"] == load_profile(out).pictures == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("check", "var-d16"), "give repo, a checkout of it"),
        (("check", "emoji65"), "unknown model 'emoji65'"),
        (("check", "emoji64", "--dtype", "int8"), "dtype 'int8' is not one of"),
        (("check", "emoji64", "--resolution", "1M"), "emoji64 has one schedule"),
        (("check", "infinity-2b", "--resolution", "9M", "--repo", "."), "resolution '9M'"),
        (("check", "emoji64", "--device", "moon"), "device 'moon' cannot be used"),
        (("calibrate", "emoji64", "--out", "."), "cannot be written"),
        (("calibrate", "emoji64", "--out", "nowhere/x.json"), "cannot be written"),
        (("calibrate", "emoji64", "--out", "x.json", "--pictures", "0"), "pictures must be"),
    ],
)
def test_bad_input_of_check_and_calibrate(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2 and says in done.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())
