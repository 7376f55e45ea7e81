"""Hazards of what people type and what lies on disks: one clear error, soon."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kvruntime
from kvruntime import CacheGeometry, CacheOptions, PagedKVCache, Pool, ScheduleError
from kvruntime.cli import app
from policies import ScaleSchedule, load_profile
from policies.profile import MAX_FILE_BYTES

GEOMETRY = CacheGeometry(1, 3, 8, "float32", "float32")
SCHEDULE = ScaleSchedule.of([1, 2, 3])


def command(*arguments):
    return CliRunner().invoke(app, list(arguments))


def shell(line):
    python = f"{sys.executable} -m kvruntime"
    return subprocess.run(
        ["sh", "-c", line.replace("kvruntime", python, 1)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_one_line(result, code=2):
    found = result.returncode if hasattr(result, "returncode") else result.exit_code
    assert found == code, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_h19_a_pipe_as_a_profile_hangs(tmp_path):
    pipe = tmp_path / "profile.json"
    os.mkfifo(pipe)
    began = time.perf_counter()
    assert_one_line(command("plan", "var-d16", "--profile", str(pipe)))
    with pytest.raises(ValueError, match="not a regular file"):
        load_profile(pipe)
    assert time.perf_counter() - began < 5


FULL = [pytest.param(path, marks=pytest.mark.full) for path in ("/dev/urandom", "/proc/self/mem")]


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", *FULL])
def test_h19_a_device_as_a_profile_is_read_without_bound(path):
    result = shell(f"ulimit -v 8000000; kvruntime plan var-d16 --profile {path} < /dev/null")
    assert_one_line(result)


def test_h19_a_file_that_is_longer_than_it_says_is_read_up_to_a_bound(tmp_path):
    """Files of /proc say that they are empty, and a file may grow while it is read."""
    path = tmp_path / "profile.json"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match=f"at most {MAX_FILE_BYTES} bytes"):
        load_profile(path)
    with pytest.raises(ValueError, match="maps"):
        load_profile("/proc/self/maps")


@pytest.mark.parametrize("name", ["emoji64", "infinity-2b", "no/such/file.json"])
def test_a_profile_that_is_no_file_lists_what_there_is(name):
    wanted = r"emoji64 and the published presets of infinity-2b, infinity-8b"
    with pytest.raises(FileNotFoundError, match=wanted) as caught:
        CacheOptions(profile=name)
    assert repr(name) in str(caught.value)
    result = command("plan", "infinity-2b", "--profile", name)
    assert_one_line(result)
    assert "infinity-8b" in result.stderr


def test_h22_nothing_reserved_may_be_written_with_a_unit():
    plain = command(*"plan var-d16 --memory 80GiB --json".split())
    for nothing in ("0GiB", "0", "0 MiB"):
        result = command(*"plan var-d16 --memory 80GiB --json --reserved".split(), nothing)
        assert result.exit_code == 0 and result.stdout == plain.stdout, result.stderr


@pytest.mark.parametrize("option", ["--memory", "--reserved"])
@pytest.mark.parametrize("digits", [31, 400, 5000])
def test_h22_a_number_of_400_digits(option, digits):
    rest = ["--memory", "80GiB"] * (option == "--reserved")
    result = command("plan", "var-d16", *rest, option, "9" * digits)
    assert_one_line(result)
    assert len(result.stderr) < 300


@pytest.mark.parametrize("as_json", ["--json", pytest.param("", marks=pytest.mark.full)])
@pytest.mark.parametrize("target", [">&-", "> /dev/full"])
def test_h22_standard_output_is_closed_or_full(as_json, target):
    assert_one_line(shell(f"kvruntime plan var-d16 {as_json} {target}"))


@pytest.mark.parametrize("name", ["demo.png", "memory.png", "RUN.json"])
def test_h22_a_folder_in_the_way_is_found_before_drawing(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.setattr("kvruntime.demo.run_trio", lambda *_, **__: pytest.fail("drawn"))
    result = command("demo", "--count", "1", "--out", str(tmp_path))
    assert_one_line(result)
    assert f"{name} is a folder" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": True}, "memory must be a positive number of bytes, got True"),
        ({"workspace": True}, "workspace must be"),
        ({"workspace": float("nan")}, "workspace must be a positive number of bytes, got nan"),
        ({"memory": float("nan")}, "memory must be"),
        ({"memory": 0}, "memory must be"),
        ({"budget": True}, "budget must be a number, got True"),
        ({"budget": float("nan")}, "got nan"),
        ({"page_size": True}, "page_size"),
        ({"kv_dtype": "int4", "kv_start": True}, "kv_start"),
        ({"paged_queries": True}, "paged_queries"),
    ],
)
def test_h22_numbers_that_are_none(options, words, tiny_model):
    with pytest.raises(ValueError, match=words):
        CacheOptions(**options)
    with pytest.raises(ValueError, match=words):
        with kvruntime.attach(tiny_model, **options):
            pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_h22_cuda_on_a_build_without_it():
    words = "torch sees no CUDA device here, use device='cpu'"
    with pytest.raises(ValueError, match=words):
        PagedKVCache(GEOMETRY, SCHEDULE, softmax_scale=1.0, device="cuda")
    with pytest.raises(ValueError, match=words):
        Pool(num_pages=1, page_bytes=64, device="cuda:0")


@pytest.mark.parametrize("which", ["qkv", "q", "k", "v"])
@pytest.mark.parametrize("done", [0, 2])
def test_heads_before_tokens_look_transposed(which, done):
    """[rows, heads, n, head_dim], as scaled_dot_product_attention wants it, and nothing changes."""
    cache = PagedKVCache(GEOMETRY, SCHEDULE, CacheOptions("full"), softmax_scale=1.0)
    with cache.open(2) as generation:
        for tokens in SCHEDULE.tokens[:done]:
            generation.attend(0, *torch.randn(3, 2, tokens, 3, 8))
        fresh = torch.randn(3, 2, SCHEDULE.tokens[done], 3, 8)
        given = [
            part.transpose(1, 2).contiguous() if name in which else part
            for name, part in zip("qkv", fresh, strict=True)
        ]
        with pytest.raises(ValueError, match=r"looks transposed, \[rows, heads, n, head_dim\]"):
            generation.attend(0, *given)
        generation.attend(0, *fresh)


def test_the_observer_of_the_docs_has_six_arguments():
    """h22: the docs gave it four."""
    seen = []
    cache = PagedKVCache(
        GEOMETRY,
        SCHEDULE,
        CacheOptions("full"),
        softmax_scale=1.0,
        observer=lambda *arguments: seen.append(arguments),
    )
    with cache.open(2) as generation:
        generation.attend(0, *torch.randn(3, 2, 1, 3, 8))
        with pytest.raises(ScheduleError):
            generation.attend(0, *torch.randn(3, 2, 1, 3, 8))
    assert [len(arguments) for arguments in seen] == [6]
    docs = Path(__file__).parents[2] / "docs" / "embedding.md"
    assert "observer(scale, layer, first_row, queries, keys, values)" in docs.read_text()
