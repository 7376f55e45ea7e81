"""`python -m benchmarks gpu` in miniature, on a CPU; and without a GPU it says so."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import correctness, gpu
from benchmarks.gpu_sizes import TINY
from benchmarks.schemas import Gpu
from kvruntime.storage.layout import RecordFormat

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
def test_every_part_runs(xformers):
    from kvruntime.attention.operators import TILES

    report = gpu.run(1, None, "cpu", TINY)
    Gpu.model_validate(report)
    cases = report["correctness"]
    assert report["all_correct"], [case for case in cases if case["error"] > case["bound"]]
    quantised = [case for case in cases if not case["before_start"]]
    paths = {
        (case["backend"], case["path"], case["kv_dtype"], case["weighted"]) for case in quantised
    }
    assert any(case["before_start"] and case["path"] == "pages" for case in cases)
    exact_and_int4 = {
        ("xformers", "pages", kind, weighted)
        for kind in (None, "int4")
        for weighted in (False, True)
    }
    gathered = {
        (backend, "gathered", kind, weighted)
        for backend in ("sdpa", "xformers")
        for kind in (None, "int2", "int4", "int8")
        for weighted in (False, True)
    }
    assert paths == exact_and_int4 | gathered
    assert report["bandwidth"]["exact_gather_over_copy"] > 0
    assert {case["queries"] for case in report["crossover"]} == {1, 4, 16}
    tiles = report["tiles"]
    assert {(case["tile_queries"], case["warps"]) for case in tiles} == set(TILES)
    assert sum(case["is_the_rule"] for case in tiles) == 2, "one for each format"
    ways = report["attention"]
    assert ways["full float16 xformers"]["page_steps"] == 2
    assert ways["full float16 sdpa"]["page_steps"] == 0
    assert ways["scalekv int4 xformers"]["planned_bytes"] > 0
    assert report["generate"]["own_seconds"]["median"] > 0


def test_a_result_that_is_no_number_is_wrong(xformers, monkeypatch):
    right = xformers.XFormers.attend_pages
    monkeypatch.setattr(
        xformers.XFormers, "attend_pages", lambda *args: right(*args) * float("nan")
    )
    forms = [(16, None, True, False), (64, RecordFormat(4), False, True)]
    monkeypatch.setattr(correctness, "_formats", lambda *args: forms)
    cases = correctness.correctness(torch.device("cpu"), ("float16",), (32,), (16,), (1,), (1,))
    assert len(cases) == 2 * 3, "sdpa gathers, xformers can do both"
    for case in cases:
        assert (case["error"] > case["bound"]) == (case["path"] == "pages")


def test_without_a_gpu_it_says_so_and_exits_with_3(tmp_path):
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--json", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3 and "no CUDA device" in done.stderr
    assert done.stdout == "" and not out.exists()
