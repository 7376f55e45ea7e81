"""kvruntime check, calibrate and tune: on a published model, or on the bundled one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvruntime.adapters import check
from kvruntime.calibration import calibrate, calibrate_coding
from kvruntime.cli.building import (
    Aspect,
    Device,
    Dtype,
    Name,
    Repo,
    Resolution,
    StandIns,
    Weights,
    built_model,
)
from kvruntime.cli.common import JSON, exit_codes, print_json
from kvruntime.coding import load_coding
from kvruntime.preset import CachePreset, best_first
from kvruntime.sizes import check_positive
from kvruntime.tuning import CANDIDATES, tune
from policies import load_profile


def check_command(
    model: Name,
    repo: Repo = None,
    weights: Weights = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    resolution: Resolution = None,
    aspect: Aspect = "1.000",
    stand_ins: StandIns = False,
    as_json: JSON = False,
) -> None:
    """Compare every step of one picture with the model's own cache."""
    with exit_codes():
        built, settings = built_model(
            model, repo, weights, device, dtype, resolution, aspect, stand_ins
        )
        with Console(stderr=True).status("drawing a picture, each step twice"):
            parity = check(built.model, lambda: built.draw(1, 0, **settings))
        if as_json:
            print_json({"model": model, **asdict(parity)})
            return
        how = (
            "the same bits as its own cache"
            if parity.max_error == 0.0
            else f"at most {parity.max_error:.1g} of the largest number from its own cache"
        )
        Console().print(
            f"{model}: {parity.steps} steps over {parity.scales} scales in {parity.dtype}, {how}",
            soft_wrap=True,
        )


def calibrate_command(
    model: Name,
    out: Annotated[Path, typer.Option(help="The profile that is written, JSON.")],
    coding: Annotated[
        Path | None,
        typer.Option(help="Draw them again, and write what transform-coded pages need."),
    ] = None,
    pictures: Annotated[int, typer.Option(help="How many are drawn.")] = 16,
    batch: Annotated[int, typer.Option(help="How many at once.")] = 4,
    repo: Repo = None,
    weights: Weights = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    resolution: Resolution = None,
    aspect: Aspect = "1.000",
    stand_ins: StandIns = False,
    as_json: JSON = False,
) -> None:
    """Draw pictures on the whole cache and write the statistics that policies take roles from."""
    with exit_codes():
        check_positive("pictures", pictures)
        check_positive("batch", batch)
        _check_written(out, coding)
        built, settings = built_model(
            model, repo, weights, device, dtype, resolution, aspect, stand_ins
        )
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("drawing", total=pictures * (2 if coding else 1))

            def draw() -> None:
                for first in range(0, pictures, batch):
                    count = min(batch, pictures - first)
                    built.draw(count, 10_000 + first, **settings)  # apart from those of tests
                    progress.advance(bar, count)

            profile = calibrate(built.model, draw, pictures, model)
            profile.save(out)
            if coding:
                calibrate_coding(built.model, draw, model).save(coding)
        if as_json:
            written = {"profile": str(out), "coding": str(coding) if coding else None}
            print_json({"model": model, "pictures": pictures, **written})
            return
        Console().print(
            f"{out}: statistics of {profile.layers} layers at {len(profile.sizes)} scales, for "
            "attach(model, profile=...)",
            soft_wrap=True,
        )


def tune_command(
    model: Name,
    budget: Annotated[str, typer.Option(help="A share of the bytes of its own history.")],
    out: Annotated[Path, typer.Option(help="The preset that is written, JSON.")],
    profile: Annotated[Path | None, typer.Option(help="Its statistics.")] = None,
    coding: Annotated[Path | None, typer.Option(help="For transform-coded pages.")] = None,
    pictures: Annotated[int, typer.Option(help="How many are tried.")] = 1,
    repo: Repo = None,
    weights: Weights = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    resolution: Resolution = None,
    aspect: Aspect = "1.000",
    stand_ins: StandIns = False,
    as_json: JSON = False,
) -> None:
    """Try every policy and format at one budget, and write the best as a preset."""
    with exit_codes():
        check_positive("pictures", pictures)
        _check_written(out)
        statistics = None if profile is None else load_profile(profile)
        known = None if coding is None else load_coding(coding)
        built, settings = built_model(
            model, repo, weights, device, dtype, resolution, aspect, stand_ins
        )
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("trying", total=len(CANDIDATES))
            preset = tune(
                built.model,
                lambda: built.draw(pictures, 20_000, **settings),  # apart from calibration's
                budget,
                model,
                profile=statistics,
                coding=known,
                rows=2 * pictures,
                tick=lambda: progress.advance(bar),
            )
        preset.save(out)
        if as_json:
            print_json(preset.model_dump(mode="json"))
            return
        Console().print(_trials(preset))
        Console().print(f"{out}: for attach(model, preset=...)", soft_wrap=True)


def _check_written(*paths: Path | None) -> None:
    """Raise ValueError, before anything is drawn, where one of them cannot be written."""
    for path in paths:
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"{path} cannot be written")


def _trials(preset: CachePreset) -> Table:
    """The best first."""
    table = Table(title=f"{preset.model}, {preset.budget} of the bytes")
    for name in ("policy", "pages", "tokens", "error of attention"):
        table.add_column(name, justify="left" if name in ("policy", "pages") else "right")
    for trial in best_first(preset.trials):
        error = f"{trial.attention_error:.4f}"
        table.add_row(trial.policy, trial.kv_dtype or "exact", str(trial.tokens), error)
    return table
