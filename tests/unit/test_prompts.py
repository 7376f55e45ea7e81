"""Prompts from files, and what models make of them."""

import importlib.util
import json

import pytest
import torch
from typer.testing import CliRunner

from kvruntime.cli import app
from kvruntime.models import build
from kvruntime.models.prompts import class_numbers, read_prompts, text_encoder
from kvruntime.reference import load_classes
from kvruntime.sampling import Settings, read_manifest, sample

SETTINGS = Settings(
    model="emoji64", policy="full", budget=1.0, kv_dtype=None, dtype="float32", batch=2
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a red cat\n\n  the moon \n"),
        ("p.prompts", "a red cat\r\nthe moon"),
        ("p.json", '["a red cat", " the moon "]'),
        ("p.JSON", '\ufeff["a red cat", "the moon"]'),
        ("p.txt", "\ufeffa red cat\nthe moon"),
        ("p.jsonl", '{"prompt": "a red cat"}\n\n"the moon"\n'),
        ("p.json", '[{"prompt": "a red cat", "seed": 7}, "the moon"]'),
    ],
)
def test_files_of_prompts(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == ["a red cat", "the moon"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", b"\n \n", "has no prompts"),
        ("p.json", b"[]", "has no prompts"),
        ("p.json", b'{"prompt": "a"}', "valid array"),
        ("p.json", b'["", "b"]', "at least 1 character"),
        ("p.json", b"[3]", "valid string"),
        ("p.json", b'["a"', "Invalid JSON"),
        ("p.txt", b"\xff\xfe", "lines of text, or JSON"),
        ("p.txt", b"a" * 10_001, "at most 10000 characters"),
        ("p.txt", b"a\n" * (2**23 + 1), f"{2**24 + 2} bytes, at most {2**24} are read"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_prompts(tmp_path / name)


def test_a_line_ends_where_lines_end(tmp_path):
    (tmp_path / "p.txt").write_text("a\u2028b\x0bc\x85d\ne")
    assert read_prompts(tmp_path / "p.txt") == ["a\u2028b\x0bc\x85d", "e"]


def test_classes_by_number_or_name():
    assert class_numbers(["2", "hat", "0"], 3, ("cap", "hat", "2nd")).tolist() == [2, 1, 0]
    for bad in ("3", "-1", "Hat", "²", "1.0", "9" * 5000):
        with pytest.raises(ValueError, match=r"is no class: a number of 0..2 or one of cap, hat"):
            class_numbers(["0", bad], 3, ("cap", "hat", "2nd"))


def test_pictures_of_prompts_know_them(tmp_path):
    built, names = build("emoji64"), load_classes()
    prompts = [names[5], "3", names[0]]
    sample(built, SETTINGS, 5, tmp_path, prompts=prompts)
    lines = {line.number: line.prompt for line in read_manifest(tmp_path)}
    assert lines == {0: names[5], 1: "3", 2: names[0], 3: names[5], 4: "3"}
    drawn = built.draw(2, 2, labels=torch.tensor([0, 5]))
    again = tmp_path / "again"
    again.mkdir()
    sample(build("emoji64"), SETTINGS, 4, again, prompts=prompts)
    for number in range(4):
        name = f"{number:06d}.png"
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()
    from PIL import Image

    pixels = torch.tensor(list(Image.open(tmp_path / "000003.png").tobytes()))
    assert torch.equal(pixels.view(64, 64, 3), (255 * drawn[1]).round().long().permute(1, 2, 0))


def test_a_folder_of_other_prompts_is_refused(tmp_path):
    built = build("emoji64")
    sample(built, SETTINGS, 2, tmp_path, prompts=["3", "4"])
    before = (tmp_path / "manifest.jsonl").read_bytes()
    for prompts, says in (
        (["3", "5"], "picture 1 of '4', not of '5'"),
        ([], "picture 0 of '3', not of None"),
        (["3", "4", "no such class"], "'no such class' is no class"),
    ):
        with pytest.raises(ValueError, match=says):
            sample(built, SETTINGS, 4, tmp_path, prompts=prompts)
        assert (tmp_path / "manifest.jsonl").read_bytes() == before
    sample(built, SETTINGS, 3, tmp_path, prompts=["3", "4", "3"])
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_the_command_draws_one_of_each(tmp_path):
    listed = tmp_path / "p.json"
    listed.write_text(json.dumps(["heart", {"prompt": "emotion"}]))
    out = tmp_path / "out"
    call = ["sample", "emoji64", "--out", str(out), "--batch", "2", "--prompts", str(listed)]
    done = CliRunner().invoke(app, [*call, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["pictures"] == 2
    assert [line.prompt for line in read_manifest(out)] == ["heart", "emotion"]
    listed.write_text('["a heart"]')
    done = CliRunner().invoke(app, [*call[:3], str(tmp_path / "other"), *call[4:]])
    assert done.exit_code == 2 and "'a heart' is no class" in done.stderr


def test_a_text_encoder_says_what_it_needs(tmp_path):
    if importlib.util.find_spec("transformers") is None:
        with pytest.raises(ImportError, match=r"pip install 'kvruntime\[text\]'"):
            text_encoder(tmp_path, torch.device("cpu"))
    else:
        with pytest.raises(FileNotFoundError, match="no folder with a T5 encoder"):
            text_encoder(tmp_path / "nowhere", torch.device("cpu"))
