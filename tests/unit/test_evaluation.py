"""kvruntime eval: what a direct call of torchmetrics gives, and what does not go together."""

import json

import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from typer.testing import CliRunner

from kvruntime.cli import app
from kvruntime.evaluation import evaluate, read_picture
from kvruntime.quality import mean_interval


def folder(path, seed, count=4, size=(32, 24), noise=40):
    """PNGs that are the same for every seed, but for some noise."""
    path.mkdir()
    for number in range(count):
        plain = torch.randint(60, 190, (*size, 3), generator=torch.Generator().manual_seed(number))
        generator = torch.Generator().manual_seed(1000 * seed + number)
        off = torch.randint(-noise, noise + 1, (*size, 3), generator=generator) if seed else 0
        Image.fromarray((plain + off).to(torch.uint8).numpy()).save(path / f"{number}.png")
    return path


def test_the_numbers_are_those_of_torchmetrics(tmp_path):
    reference, near, far = (
        folder(tmp_path / name, seed, noise=noise)
        for name, seed, noise in (("own", 0, 0), ("near", 1, 10), ("far", 2, 40))
    )
    report = evaluate(reference, [near, far])
    for found, where in zip(report["folders"], (near, far), strict=True):
        for number, name in enumerate(report["pictures"]):
            ours, theirs = read_picture(where / name)[None], read_picture(reference / name)[None]
            psnr = peak_signal_noise_ratio(ours, theirs, data_range=1.0)
            ssim = structural_similarity_index_measure(ours, theirs, data_range=1.0)
            assert found["per_picture"]["psnr_db"][number] == pytest.approx(float(psnr))
            assert found["per_picture"]["ssim"][number] == pytest.approx(float(ssim))
        low, mean, high = (found["psnr_db"][name] for name in ("low", "mean", "high"))
        assert low < mean < high and found["identical"] == 0
        assert set(found) & {"lpips", "fid"} | set(found["missing"]) == {"lpips", "fid"}
    first, second = report["folders"]
    assert first["paired_with_first"]["psnr_db"]["mean"] == 0
    paired = second["paired_with_first"]["psnr_db"]
    assert paired["mean"] == pytest.approx(second["psnr_db"]["mean"] - first["psnr_db"]["mean"])
    assert paired["high"] < 0


def test_equal_pictures_and_few(tmp_path):
    own = folder(tmp_path / "own", 0, count=1)
    (found,) = evaluate(own, [own])["folders"]
    assert found["identical"] == 1 and found["psnr_db"]["mean"] is None
    assert found["ssim"] == {"mean": pytest.approx(1.0), "low": None, "high": None}
    wanted = {"mean": 2.0, "low": pytest.approx(2 - 1.96), "high": pytest.approx(2 + 1.96)}
    assert mean_interval([1.0, 3.0]) == wanted


def test_the_command(tmp_path):
    own, other = folder(tmp_path / "own", 0), folder(tmp_path / "other", 1)
    done = CliRunner().invoke(app, ["eval", str(own), str(other), str(own)])
    assert done.exit_code == 0 and "4 pictures beside" in done.stdout, done.output
    told = json.loads(CliRunner().invoke(app, ["eval", str(own), str(other), "--json"]).stdout)
    assert told["folders"][0]["psnr_db"]["mean"] > 10
    fewer, larger = folder(tmp_path / "fewer", 1, 3), folder(tmp_path / "larger", 1, size=(32, 32))
    broken = folder(tmp_path / "broken", 1)
    (broken / "2.png").write_bytes((broken / "2.png").read_bytes()[:200])
    small = folder(tmp_path / "small", 1, size=(5, 5))
    done = CliRunner().invoke(app, ["eval", str(small), str(small)])
    assert done.exit_code == 2 and "SSIM needs 11 pixels" in done.stderr.replace("\n", " ")
    for wrong, said in (
        (fewer, "lacks 1 of 4: 3.png first"),
        (larger, "(32, 24) and (32, 32) pixels"),
        (broken, "2.png: "),
        (tmp_path, "lacks 4 of 4"),
    ):
        done = CliRunner().invoke(app, ["eval", str(own), str(wrong)])
        assert done.exit_code == 2 and said in done.stderr.replace("\n", " "), done.output
    assert CliRunner().invoke(app, ["eval", str(tmp_path), str(own)]).exit_code == 2
