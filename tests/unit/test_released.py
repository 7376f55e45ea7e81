"""Files that authors of policies publish."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import kvruntime
from kvruntime.catalogue import infinity_schedule
from policies import (
    CacheGeometry,
    Problem,
    ScaleSchedule,
    load_heatkv_orders,
    load_preset,
    load_scalekv_budgets,
)

SCHEDULE = ScaleSchedule.of([1, 2, 3, 4, 5])  # what scales 1 to 4 read: 1, 5, 14, 30 tokens


def scale_of(drafters, most, least, layers=4):
    """One scale of a ScaleKV file, as its authors write it."""
    blocks = {f"Block {layer}": int(layer in drafters) for layer in range(layers)}
    return {**blocks, "High": len(drafters), "Max": most, "Min": least, "Limit": most}


BUDGETS = {"Scale 4": scale_of({0, 3}, 14, 6), "Scale 5": scale_of({1}, 19, 7)}  # 10 a layer


def written(tmp_path, content):
    path = tmp_path / "released.json"
    path.write_text(json.dumps(content))
    return path


def preset_as_released(preset):
    """The file that a shipped preset was taken from."""
    return {
        f"Scale {preset.first_scale + number + 1}": scale_of(set(drafters), *pair, preset.layers)
        for number, (drafters, pair) in enumerate(zip(preset.drafters, preset.budgets, strict=True))
    }


@pytest.mark.parametrize("name", ["infinity-2b", "infinity-8b"])
def test_scalekv_budgets_are_the_shipped_presets(name, tmp_path):
    preset = load_preset(name)
    path = written(tmp_path, preset_as_released(preset))
    if folder := os.environ.get("KVRUNTIME_SCALEKV"):
        path = Path(folder) / f"budgets/{name.removeprefix('infinity-')}_10%_budget.json"
    policy = load_scalekv_budgets(path, infinity_schedule())
    ours, theirs = (
        each.model_dump(exclude={"model", "source"}) for each in (policy.published, preset)
    )
    assert ours == theirs
    read, shipped = (kvruntime.plan(name, 1, each, 650).tokens for each in (policy, "scalekv"))
    assert (read == shipped).all()


def test_scalekv_budgets_of_any_start_scale(tmp_path):
    policy = load_scalekv_budgets(written(tmp_path, BUDGETS), SCHEDULE)
    assert (policy.published.first_scale, policy.published.budget_tokens) == (3, 10)
    problem = Problem(CacheGeometry(4, 1, 8), SCHEDULE, 10)
    tokens = replace(policy, grid=1).allocate(problem).tokens[:, :, 0]
    assert tokens[1:4].tolist() == [[5] * 4, [14, 6, 6, 14], [7, 19, 7, 7]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.clear(), "one after another up to Scale 5.*got none"),
        (lambda file: file.pop("Scale 5"), "up to Scale 5, the last of this schedule; got Scale 4"),
        (lambda file: file.update({"Scale 6": file["Scale 5"]}), "got Scale 4, Scale 5, Scale 6"),
        (lambda file: file["Scale 5"].pop("Block 2"), "Scale 5 does not name Block 2"),
        (lambda file: file["Scale 4"].pop("Min"), "Scale 4 does not name Min"),
        (lambda file: file.update({"Scale 4": {"Max": 1, "Min": 1}}), "does not name Block 0"),
        (lambda file: file["Scale 5"].update(Max=20), "20/7 do not average 10"),
        (lambda file: file["Scale 5"].update(Max=-1), "greater than or equal to 0"),
        (lambda file: file["Scale 5"].update(Max="much"), "valid integer"),
        (lambda file: file.pop("Scale 4"), "scale 3 reads 14 tokens, more than the budget of 10"),
    ],
)
def test_scalekv_budgets_that_are_wrong(change, message, tmp_path):
    file = json.loads(json.dumps(BUDGETS))
    change(file)
    path = written(tmp_path, file)
    with pytest.raises(ValueError, match=message) as failed:
        load_scalekv_budgets(path, SCHEDULE)
    assert str(path) in str(failed.value)


def test_heatkv_orders_name_the_head_first(tmp_path):
    path = written(tmp_path, [[[1, 0], [0, 0]], [[0, 0], [1, 0]]])
    policy = load_heatkv_orders(path, sinks=2, is_strict=True)
    assert policy.orders == (((0, 1), (0, 0)), ((0, 0), (0, 1)))
    assert (policy.sinks, policy.is_strict) == (2, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "valid array"),
        ([[[0]]], "Field required"),
        ([[[0, -1]]], "greater than or equal to 0"),
        ([[[0, 0], [0, 0]]], "each head of every layer once"),
        ([[[0, 0]], [[0, 1]]], "each head of every layer once"),
    ],
)
def test_heatkv_orders_that_are_wrong(content, message, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=message) as failed:
        load_heatkv_orders(path)
    assert str(path) in str(failed.value)
