"""Every benchmark runs in miniature, and writes what its schema and the documentation say."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from pydantic import ValidationError
from rich.progress import Progress
from typer.testing import CliRunner

from benchmarks import allocator, attention, fleet, generate, memory, soak, whole_process
from benchmarks.__main__ import app
from benchmarks.load import beside_load
from benchmarks.schemas import REPORTS, Attention, Report
from kvruntime import CacheGeometry, ScaleSchedule
from kvruntime.reference import load_classes
from kvruntime.reference.transformer import EmojiVAR
from policies import POLICY_NAMES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def call(tmp_path):
    """Run a benchmark as a user does; its report, read back from the file."""

    def run(name, *options, code=0):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        done = CliRunner().invoke(app, [name, *options, "--json", str(out)])
        assert done.exit_code == code, done.output + str(done.exception)
        if not out.exists():
            return done
        report = json.loads(out.read_text())
        assert json.loads(done.stdout) == report
        REPORTS[name].model_validate(report)
        assert report["benchmark"] == name and report["environment"]["versions"]["torch"]
        return report

    return run


@pytest.fixture
def small_attention(monkeypatch):
    tiny = SimpleNamespace(
        geometry=CacheGeometry(1, 2, 32), schedule=ScaleSchedule.of([1, 2, 4, 5, 6])
    )
    monkeypatch.setattr(attention, "find_model", lambda name: tiny)
    monkeypatch.setattr(attention, "BUDGET", 20)


def test_allocator(call, monkeypatch):
    for name, value in (("PAGES", 100), ("POOL_SIZES", (1000,)), ("PAIRS", 2)):
        monkeypatch.setattr(allocator, name, value)
    report = call("allocator", "--repeats", "1")
    assert report["repeats"] == 1 and report["results"]["speedup_vs_per_page"] > 0


def test_attention(call, small_attention):
    report = call("attention", "--repeats", "2")
    results = report["results"]
    cases = [f"{result['geometry']}/{result['dtype']}" for result in results]
    assert cases == list(attention.CASES) and len(cases) == 4
    for result in results:
        assert set(result) == set(Attention.model_fields), "a flat record"
        for name, value in result.items():
            if name.endswith("_share"):
                assert 0 < value["min"] <= value["median"] <= value["max"] < 1
        assert result["pair_speedup"] > 1
    only = call("attention", "--repeats", "1", "--only", "infinity-2b/bfloat16")
    assert [result["geometry"] for result in only["results"]] == ["infinity-2b"]
    done = call("attention", "--only", "infinity-2b", code=2)
    assert "'infinity-2b' is not one of infinity-125m/float32" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--model", "var-d16"), "'var-d16' is not one of infinity-125m, infinity-2b"),
        (("--depth", "13"), "infinity-125m has 12 layers, depth is 13"),
        (("--model", "infinity-8b", "--released", "."), "budgets are for 32 layers, here are 40"),
    ],
)
def test_infinity_refuses_what_there_is_not(call, options, says):
    assert says in call("infinity", "--repo", ".", *options, code=2).stderr


def test_attention_beside_a_load(call, small_attention):
    report = call("attention", "--repeats", "1", "--only", "infinity-2b/float32", "--beside-load")
    assert report["options"] == {"only": "infinity-2b/float32", "beside_load": True}


def test_a_load_is_busy_until_it_is_stopped():
    with beside_load() as process:
        seen = psutil.Process(process.pid)
        before = seen.cpu_times().user
        deadline = time.monotonic() + 20
        while seen.cpu_times().user < before + 0.3 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.poll() is None and seen.cpu_times().user >= before + 0.3
    assert process.returncode is not None


def test_every_part_of_a_step_is_on_the_watch():
    """A step that is taken apart in another way must be timed in another way."""
    calls = dict.fromkeys(attention.PARTS, 0)

    def counted(part, function):
        def call(*args, **kwargs):
            calls[part] += 1
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for part, (owner, name) in attention.PARTS.items():
            patch.setattr(owner, name, counted(part, getattr(owner, name)))
        geometry, schedule = CacheGeometry(1, 2, 32), ScaleSchedule.of([1, 2, 4, 5, 6])
        attention.measure("tiny", geometry, schedule, 20, 1, None)
    assert all(count > 0 for count in calls.values()), calls


def test_pair_speedup():
    """Queries of 1 and 4 tokens: 1 + 4 x 5 pairs; with nothing kept 1 + 4 x 4."""
    assert attention.pair_speedup(ScaleSchedule.of([1, 2]), [0, 0]) == 21 / 17


@pytest.fixture
def small_model(monkeypatch):
    """The bundled model's shape, with four layers of two heads that were never trained."""

    def load(dtype):
        torch.manual_seed(0)
        return EmojiVAR(len(load_classes()), width=64, depth=4, num_heads=2).to(dtype).eval()

    monkeypatch.setattr(generate, "load_model", load)


@pytest.mark.filterwarnings("ignore")  # the profiler's own
def test_generate(call, small_model):
    results = call("generate", "--repeats", "1", "--pictures", "2")["results"]
    assert results["pictures"] == 2
    assert set(results["allocated_over_plan"]) == {"full", "scalekv", "centroid"}
    for share in results["allocated_over_plan"].values():
        assert memory.LEAST <= share <= 1


@pytest.mark.filterwarnings("ignore")  # the profiler's own
def test_memory(call, monkeypatch):
    monkeypatch.setattr(memory, "FULL", memory.TINY)
    report = call("memory", "--policy", "scalekv", "--policy", "ragged fold")
    results = report["results"]
    assert {result["policy"] for result in results} == {"scalekv", "ragged fold"}
    assert {result["kv_dtype"] for result in results} == set(memory.FORMATS)
    assert {result["chunks"] for result in results} == {1, memory.TINY.rows}
    assert {result["ragged"] for result in results} == {True, False}
    assert set(memory.POLICIES) >= set(POLICY_NAMES) and len(memory.POLICIES) == 17
    done = call("memory", "--policy", "none", code=2)
    assert "'none' is not one of full, scalekv" in done.stderr


def test_process(call, monkeypatch):
    """Processes of two pictures and of too many; what they tell is added up."""
    asked = []

    def attempt(name, pictures, growth):
        asked.append((name, pictures))
        if pictures > {"its own": 6, "full": 1, "scalekv 10 %": 40}.get(name, 60):
            return None, "died while it drew"
        return {"pictures": pictures, "bytes": {"pages": growth // 2, "rest": 7}}, ""

    monkeypatch.setattr(whole_process, "attempt", attempt)
    results = call("process", "--growth", "1MiB")["results"]
    assert [fit["pictures"] for fit in results["fits"]] == [6, 1, 40, 60]
    assert results["fits"][0]["bytes"] == {"pages": 2**19, "rest": 7}
    assert {fit["more"] for fit in results["fits"]} == {"died while it drew"}
    assert len(asked) < 40
    monkeypatch.setattr(whole_process, "attempt", lambda *_: (None, "refused before it drew"))
    with pytest.raises(MemoryError, match="its own: not one picture is drawn within 9 bytes: refu"):
        whole_process.run(Progress(), 9)
    assert call("process", "--growth", "much", code=2)


@pytest.mark.full
def test_a_process_draws_until_the_system_refuses():
    told, _ = whole_process.attempt("scalekv 10 %", 1, 100 * 2**20)
    assert told["pictures"] == 1 and min(told["bytes"].values()) >= 0
    assert whole_process.attempt("scalekv 10 %", 30, 100 * 2**20)[0] is None
    refused = whole_process.attempt("full", 20, 100 * 2**20)
    assert refused == (None, "refused before it drew")


def test_soak(call, monkeypatch):
    monkeypatch.setattr(soak, "FAMILIES", 4)
    results = call("soak", "--generations", "60")["results"]
    assert sum(results["ended"].values()) == 60 and results["ended"]["drawn"] > 20
    assert results["violations"] == results["leaked_pages"] == 0


def test_a_soak_finds_what_is_not_as_alone(call, monkeypatch):
    def others(family, options):
        draw_alone(family, options)
        for inputs, _ in family.steps.values():
            inputs[1] += 1  # keys

    draw_alone = soak.Family.draw_alone
    monkeypatch.setattr(soak.Family, "draw_alone", others)
    monkeypatch.setattr(soak, "FAMILIES", 2)
    assert "not as alone" in str(call("soak", "--generations", "40", code=1).exception)


@pytest.mark.full
def test_fleet(call, monkeypatch, tmp_path):
    kept = {"scalekv 10 %": ("scalekv", 0.1, None)}
    monkeypatch.setattr(fleet, "POLICIES", kept | {"full": ("full", 1.0, None)})
    monkeypatch.setattr(fleet, "FAVOURITES", ("full", "scalekv 10 %"))
    monkeypatch.setattr(fleet, "CLOCKS", {"device": 0.0})
    results = call("fleet", "--quick", "--plot", str(tmp_path / "fleet.png"))["results"]
    (tmp_path / "fleet.png").unlink()
    assert [one["policy"] for one in results["carried"]] == ["scalekv 10 %", "full"]
    for one in results["carried"]:
        assert 7.5 < one["reserved"] < 8.5, "as many as peaks"
        assert 1.3 < one["ratio"] and 0.9 < one["share_of_bound"] <= 1.02
    assert [one["never_fit_share"] > 0 for one in results["day"]] == [True, True, False, False]
    assert 0 < results["decision_us"] < 20_000


def test_a_plan_that_is_wrong_ends_with_1(call, monkeypatch):
    monkeypatch.setattr(memory, "peak_allocated_bytes", lambda draw: 1)
    monkeypatch.setattr(memory, "FULL", memory.TINY)
    call("memory", "--policy", "full", code=1)


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(allocator, "run", lambda *args: pytest.fail("measured"))
    done = CliRunner().invoke(app, ["allocator", "--json", str(tmp_path)])
    assert done.exit_code == 2 and "cannot be written" in done.stderr


def fields(model):
    """Names of a schema's fields, through lists and nested records."""
    found = set(model.model_fields)
    for field in model.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if hasattr(part, "model_fields"):
                found |= fields(part)
    return found


def test_the_schemas_have_every_documented_name():
    text = (ROOT / "docs/policies.md").read_text()
    (paragraph,) = re.findall(r"^Benchmarks: .*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([a-z_]+)`", paragraph))
    known = set(REPORTS) | set(POLICY_NAMES)
    for report in REPORTS.values():
        known |= fields(report)
    assert {"attention", "full_ratio", "selection_share"} <= named <= known


def test_a_report_with_a_field_too_many_is_refused(call, monkeypatch):
    with pytest.raises(ValidationError):
        Report[int].model_validate({"version": 1, "benchmark": "x", "results": 1})
    monkeypatch.setattr(allocator, "run", lambda *args: {"pages": 1})
    with pytest.raises(ValidationError):
        app(["allocator"], standalone_mode=False)
