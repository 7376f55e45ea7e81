"""Weights, profiles and presets from strangers: a clear error, never a crash, never code."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvruntime.reference import FOLDER, load_classes, load_model
from policies import ScaleSchedule, load_preset, load_profile
from policies.profile import MAX_FILE_BYTES, Preset
from tests.profiles import profile_of

SCHEDULE = ScaleSchedule.of([1, 2, (2, 3)])


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.json"
    profile_of(SCHEDULE, 2).save(path)
    return path


def test_a_profile_survives_the_file(profile):
    loaded = load_profile(profile)
    assert loaded == profile_of(SCHEDULE, 2)
    assert loaded.schedule == SCHEDULE and loaded.layers == 2


def drop_a_layer(data):
    data["similarity"][1].pop()


def drop_a_scale(data):
    data["selectivity"].pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=3), "version: Input should be 1 or 2"),
        (lambda data: data.update(version=2), "column_variance must be 2 layers"),
        (lambda data: data.update(kind="scalekv-preset"), "kind: Input should be 'profile'"),
        (lambda data: data.update(extra=1), "extra: Extra inputs"),
        (lambda data: data.pop("selectivity"), "selectivity: Field required"),
        (lambda data: data.update(sizes=[[1, 0]]), "sizes.0.1: Input should be greater than 0"),
        (
            lambda data: data.update(sizes=[[1]] * 3),
            "a scale is a tuple of 2 or 3 positive integers",
        ),
        (lambda data: data.update(sizes=[]), "at least one scale"),
        (lambda data: data.update(pictures=0), "pictures: Input should be greater than 0"),
        (lambda data: data["selectivity"][0].__setitem__(0, "x"), "selectivity.0.0"),
        (drop_a_layer, "similarity must be 3 scales of 2 layers"),
        (drop_a_scale, "selectivity must be 3 scales of 2 layers"),
        (
            lambda data: [
                data.update({k: [[]] * 3}) for k in ("selectivity", "similarity", "cached_mass")
            ],
            "at least one layer",
        ),
    ],
)
def test_hostile_profiles(profile, change, message):
    data = json.loads(profile.read_text())
    change(data)
    profile.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        load_profile(profile)
    assert str(profile) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"version": 1', b"\xff\xfe\x00", pickle.dumps({"version": 1})],
)
def test_profiles_that_are_no_profiles(profile, content):
    profile.write_bytes(content)
    with pytest.raises(ValueError, match=r"profile\.json"):
        load_profile(profile)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_are_finite(profile, number):
    data = json.loads(profile.read_text())
    data["selectivity"][1][0] = 12345
    profile.write_text(json.dumps(data).replace("12345", number))
    with pytest.raises(ValueError, match=r"selectivity\.1\.0"):
        load_profile(profile)


def test_truncated_profiles(profile):
    content = profile.read_bytes()
    for length in range(0, len(content) - 2, 37):
        profile.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"profile\.json"):
            load_profile(profile)


def test_a_huge_profile_is_not_read(profile):
    with profile.open("r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match="at most"):
        load_profile(profile)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/stdin", "/proc/self/mem"])
def test_devices_are_not_read(device):
    """A device may never end; its size says nothing."""
    with pytest.raises((ValueError, OSError)):
        load_profile(device)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders_are_not_read(tmp_path, make):
    make(tmp_path / "profile.json")
    with pytest.raises(ValueError, match=r"profile\.json: not a regular file"):
        load_profile(tmp_path / "profile.json")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_profile(tmp_path / "none.json")
    assert load_preset("no-such-model") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafters": [[0]]}, "must name 1 scales"),
        ({"budgets": []}, "must name 1 scales"),
        ({"drafters": [[9]], "budgets": [[4, 2]]}, "not all in 0..1"),
        ({"drafters": [[0]], "budgets": [[5, 2]]}, "do not average 3"),
    ],
)
def test_presets_are_validated(change, message):
    good = {
        "version": 1,
        "model": "m",
        "sizes": [[1, 1], [2, 2], [3, 3]],
        "source": "s",
        "layers": 2,
        "first_scale": 2,
        "budget_tokens": 3,
        "drafters": [[0]],
        "budgets": [[4, 2]],
    }
    Preset.model_validate(good)
    if "budgets" not in change:
        change = change | {"budgets": [[4, 2], [4, 2]]}
    with pytest.raises(ValueError, match=message):
        Preset.model_validate(good | change)


@pytest.fixture
def folder(tmp_path):
    for name in ("emoji64.safetensors", "classes.json", "profile.json"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    return tmp_path


def test_the_bundled_files_are_small_and_load(folder):
    model = load_model(torch.bfloat16, folder)
    assert (folder / "emoji64.safetensors").stat().st_size < 20 * 2**20
    assert model.profile is not None and model.profile.layers == len(model.blocks)
    assert next(model.parameters()).dtype == torch.bfloat16 and not model.training


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_truncated_weights(folder, keep):
    path = folder / "emoji64.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(folder=folder)


def test_a_header_that_claims_the_sky(folder):
    path = folder / "emoji64.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(folder=folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("start"), "other tensors than the model's: start"),
        (lambda w: w.update(evil=torch.zeros(1)), "other tensors than the model's: evil"),
        (lambda w: w.update(start=torch.zeros(3)), r"start is torch.float32 \(3,\)"),
        (lambda w: w.update(start=w["start"].int()), "start is torch.int32"),
        (lambda w: w.update(start=w["start"].to(torch.float8_e4m3fn)), "start is torch.float8"),
        (lambda w: w.update(start=w["start"].double() * 1e300), "start is torch.float64"),
        (lambda w: w.update(start=w["start"] * torch.nan), "start has numbers that are not finite"),
    ],
)
def test_foreign_weights(folder, change, message):
    path = folder / "emoji64.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    with pytest.raises(ValueError, match=message):
        load_model(folder=folder)


def test_pickled_weights_are_not_run(folder):
    path = folder / "emoji64.safetensors"
    torch.save({"start": torch.zeros(192)}, path)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(folder=folder)


def test_huge_weights_are_not_read(folder):
    with (folder / "emoji64.safetensors").open("r+b") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match="at most"):
        load_model(folder=folder)


@pytest.mark.parametrize(
    "content", ["", "{}", '["a", 1]', "[", "3", "[" * 200_000, " " * 2**17 + "[]"]
)
def test_damaged_classes(folder, content):
    (folder / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=r"classes\.json"):
        load_classes(folder)
