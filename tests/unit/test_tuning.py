"""Tuning on a small model and on a foreign one, and presets that attach takes."""

import json

import pytest
import torch
from typer.testing import CliRunner

import kvruntime
from kvruntime.cli import app
from kvruntime.preset import CachePreset, load_cache_preset
from kvruntime.reference import FOLDER, load_model
from kvruntime.tuning import CANDIDATES, attend_all, attention_error, record, tune
from policies import POLICY_NAMES
from tests.look_alikes.described import PAINTER
from tests.look_alikes.painter import Painter

LABELS = torch.tensor([0, 1])
SOME = [("random", None), ("centroid", None), ("sliding_window", "int4"), ("scalekv", "coded3")]


def draw(model):
    return lambda: model.generate(LABELS, seed=3)


def test_every_policy_and_format_is_a_candidate():
    assert len(set(CANDIDATES)) == len(CANDIDATES) == 4 * (len(POLICY_NAMES) - 1)


def test_what_is_recorded_is_what_attention_was_asked(tiny_model):
    """Replayed over the whole history it gives what the own cache gives, for the first rows."""
    steps = record(tiny_model, draw(tiny_model), 3)
    geometry = steps.geometry()
    assert geometry.layers == len(tiny_model.blocks) and len(steps.parts) == 10 * geometry.layers
    plan, outputs = attend_all(steps, kvruntime.CacheOptions("full", 1.0), 1.0)
    assert plan.rows == 3
    for (scale, layer), out in zip(sorted(steps.parts), outputs, strict=True):
        q, _, _ = steps.parts[scale, layer]
        keys, values = (
            torch.cat([steps.parts[s, layer][part] for s in range(scale + 1)], 1) for part in (1, 2)
        )
        q, keys, values = (part.transpose(1, 2).double() for part in (q, keys, values))
        wanted = (q @ keys.transpose(2, 3)).softmax(-1) @ values
        assert torch.allclose(out.transpose(1, 2).double(), wanted, atol=1e-5)


def test_errors_are_of_root_mean_squares():
    wanted = [torch.tensor([3.0, 4.0]), torch.tensor([12.0])]
    found = [torch.tensor([3.0, 4.0]), torch.tensor([12.0 + 1.3])]
    assert attention_error(found, wanted) == pytest.approx(0.1)
    assert attention_error(wanted, wanted) == 0.0


def test_the_best_trial_is_the_preset(tiny_model, tmp_path):
    ticks = []
    preset = tune(
        tiny_model, draw(tiny_model), "15%", "tiny", candidates=SOME, tick=lambda: ticks.append(1)
    )
    assert len(ticks) == len(SOME)
    tried = {(trial.policy, trial.kv_dtype): trial for trial in preset.trials}
    assert list(tried) == SOME[:3], "no coding, no coded pages"
    worked = [trial for trial in preset.trials if trial.attention_error is not None]
    best = min(worked, key=lambda trial: trial.attention_error)
    assert (preset.policy, preset.kv_dtype) == (best.policy, best.kv_dtype)
    preset.save(tmp_path / "preset.json")
    assert load_cache_preset(tmp_path / "preset.json") == preset
    with kvruntime.attach(tiny_model, preset=tmp_path / "preset.json") as cache:
        tiny_model.generate(LABELS)
    assert (cache.stats.policy, cache.stats.kv_dtype) == (best.policy, best.kv_dtype)
    assert cache.stats.budget_tokens >= 1


def test_a_foreign_model_is_tuned_through_its_embedding():
    painter, text = Painter(), torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1))
    preset = tune(
        painter, lambda: painter(text), "50%", "painter", embedding=PAINTER, candidates=SOME
    )
    assert preset.model == "painter" and any(trial.attention_error for trial in preset.trials)


def test_a_budget_that_nobody_can_work_with(tiny_model):
    with pytest.raises(ValueError, match=r"nothing works with 0\.01%"):
        tune(tiny_model, draw(tiny_model), "0.01%", "tiny", candidates=SOME)
    for budget in ("512MiB", 0.1, "much"):
        with pytest.raises(ValueError, match="must be a share of the history's bytes"):
            tune(tiny_model, draw(tiny_model), budget, "tiny", candidates=SOME)
    with pytest.raises(ValueError, match="rows must be"):
        tune(tiny_model, draw(tiny_model), "10%", "tiny", rows=0, candidates=SOME)
    with pytest.raises(ValueError, match="did not run the model's sampler"):
        tune(tiny_model, lambda: None, "10%", "tiny", candidates=SOME)


def test_the_bundled_preset():
    preset, model = load_cache_preset(FOLDER / "preset.json"), load_model()
    assert (preset.policy, preset.kv_dtype, preset.budget) == ("centroid_by_head", "coded3", "2%")
    assert {trial.policy for trial in preset.trials} == set(POLICY_NAMES) - {"full"}
    with kvruntime.attach(model, preset=preset) as cache:
        model.generate(LABELS)
    assert cache.stats.page_bytes <= 0.02 * cache.stats.history_bytes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"policy": "h2o"}, "policy"),
        ({"budget": 0.2}, "budget"),
        ({"kv_dtype": "int4", "budget": 0.2}, "budget, kv_dtype"),
    ],
)
def test_a_preset_and_the_call_do_not_say_the_same(arguments, says, tiny_model):
    preset = FOLDER / "preset.json"
    with (
        pytest.raises(ValueError, match=f"says {says}: give one of both"),
        kvruntime.attach(tiny_model, preset=preset, **arguments),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policy": "lru"}, "policy 'lru' is not one of"),
        ({"budget": "no"}, "budget"),
        ({"kv_dtype": "int3"}, "int3"),
        ({"version": 2}, "version"),
        ({"kind": "profile"}, "kind"),
        ({"more": 1}, "more"),
        ({"sizes": [[0, 1]]}, "sizes"),
    ],
)
def test_damaged_presets_are_refused(changes, says, tmp_path):
    path = tmp_path / "preset.json"
    path.write_text(json.dumps(json.loads((FOLDER / "preset.json").read_text()) | changes))
    with pytest.raises(ValueError, match=says) as caught:
        load_cache_preset(path)
    assert str(path) in str(caught.value)


@pytest.mark.full
def test_the_command_for_people(tmp_path, monkeypatch):
    monkeypatch.setattr("kvruntime.tuning.CANDIDATES", SOME)
    done = CliRunner().invoke(
        app, ["tune", "emoji64", "--budget", "4%", "--out", str(tmp_path / "preset.json")]
    )
    assert done.exit_code == 0, done.output
    assert "4% of the bytes" in done.stdout and "centroid" in done.stdout


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("kvruntime.tuning.CANDIDATES", SOME[:2])
    out = tmp_path / "preset.json"
    arguments = ["tune", "emoji64", "--budget", "4%", "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert CachePreset.model_validate(report) == load_cache_preset(out)
    bad = CliRunner().invoke(app, [*arguments[:3], "1GiB", *arguments[4:]])
    assert bad.exit_code == 2 and "must be a share" in bad.stderr
    nowhere = CliRunner().invoke(app, [*arguments[:-1], "nowhere/x.json"])
    assert nowhere.exit_code == 2 and "cannot be written" in nowhere.stderr
