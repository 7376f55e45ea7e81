"""kvruntime sample: ranks draw what one process draws; a killed one loses nothing."""

import os
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest
import torch
from typer.testing import CliRunner

from kvruntime.cli import app
from kvruntime.models import build
from kvruntime.sampling import MANIFEST, Settings, read_manifest, sample

SETTINGS = Settings(
    model="emoji64", policy="scalekv", budget=0.1, kv_dtype=None, dtype="float32", batch=2
)


def command(out, count, ranks):
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    options = [f"--out={out}", f"--count={count}", "--batch=2"]
    return [sys.executable, *run, "-m", "kvruntime", "sample", "emoji64", *options]


def start(*arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(*arguments), env=env, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Ten pictures, drawn by one process."""
    out = tmp_path_factory.mktemp("alone")
    sample(build("emoji64"), SETTINGS, 10, out)
    return out


def pictures(out):
    assert not list(out.glob(".*")), "something half written"
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


@pytest.mark.full
def test_a_rank_that_is_killed_and_started_again(tmp_path, alone):
    running = start(tmp_path, 10, 2)
    until = time.monotonic() + 120
    while sum(1 for _ in read_manifest(tmp_path)) < 4:
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    ranks = [
        one
        for one in psutil.Process(running.pid).children(recursive=True)
        if "sample" in one.cmdline()
    ]
    ranks[-1].kill()
    assert running.wait(120) != 0
    with (tmp_path / MANIFEST).open("a") as manifest:  # killed in the middle of a line
        manifest.write('{"model":"emoji64","poli')
    drawn = {line.number: (tmp_path / line.file).stat() for line in read_manifest(tmp_path)}
    assert 0 < len(drawn) < 10
    again = start(tmp_path, 10, 2)
    assert again.wait(120) == 0
    assert pictures(tmp_path) == pictures(alone)
    numbers = Counter(line.number for line in read_manifest(tmp_path))
    assert numbers == Counter(range(10)), "each once"
    for line in read_manifest(tmp_path):
        if line.number in drawn:
            now = (tmp_path / line.file).stat()
            assert now.st_mtime_ns == drawn[line.number].st_mtime_ns, "drawn again"
    assert {line.rank for line in read_manifest(tmp_path)} == {0, 1}


def test_a_picture_that_is_gone_is_drawn_again(tmp_path):
    built, told = build("emoji64"), []
    sample(built, SETTINGS, 3, tmp_path, tick=told.append)
    assert told == [0, 2, 3]
    before = pictures(tmp_path)
    (tmp_path / "000001.png").unlink()
    sample(built, SETTINGS, 4, tmp_path)
    after = pictures(tmp_path)
    assert before.items() <= after.items() and len(after) == 4
    with pytest.raises(ValueError, match="pictures of other settings"):
        sample(built, SETTINGS.model_copy(update={"policy": "full"}), 4, tmp_path)
    assert pictures(tmp_path) == after


def test_only_whole_batches_are_drawn(tmp_path):
    """So a picture does not depend on how many are wanted, where a batch has one seed."""
    built, asked = build("emoji64"), []
    draw = built.draw

    def counted(count, seed):
        asked.append((count, seed))
        return draw(count, seed)

    object.__setattr__(built, "draw", counted)
    sample(built, SETTINGS, 3, tmp_path)
    assert asked == [(2, 0), (2, 2)] and len(pictures(tmp_path)) == 3


def test_an_interrupt_loses_a_batch_at_most(tmp_path):
    built = build("emoji64")
    draw, calls = built.draw, []

    def failing(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments, **settings)

    object.__setattr__(built, "draw", failing)
    with pytest.raises(KeyboardInterrupt):
        sample(built, SETTINGS, 8, tmp_path)
    assert [line.number for line in read_manifest(tmp_path)] == [0, 1, 2, 3]
    sample(built, SETTINGS, 8, tmp_path)
    assert sorted(pictures(tmp_path)) == [f"{number:06d}.png" for number in range(8)]
    assert len(calls) == 5


def test_the_command(tmp_path, alone):
    out = tmp_path / "new" / "folder"
    call = ["sample", "emoji64", "--out", str(out), "--count", "4", "--batch", "2", "--json"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert '"pictures": 4' in done.stdout
    assert pictures(out).items() <= pictures(alone).items()
    assert CliRunner().invoke(app, [*call, "--policy", "best"]).exit_code == 2
    assert CliRunner().invoke(app, [*call, "--count", "0"]).exit_code == 2
    tokens = [*call[:3], str(tmp_path / "tokens"), "--count", "2", "--batch", "2", "--budget", "42"]
    assert CliRunner().invoke(app, tokens).exit_code == 0
    assert {line.budget for line in read_manifest(tmp_path / "tokens")} == {42}
    other = CliRunner().invoke(app, [*tokens[:-1], "42.0"])
    assert other.exit_code == 2, "a fraction is not a number of tokens"
    torch.manual_seed(0)
    assert CliRunner().invoke(app, call).exit_code == 0, "nothing to do"
