"""Many pictures into a folder, by any number of processes, that can be stopped and gone on with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, ValidationError
from torch import Tensor

from kvruntime.adapters import attach
from kvruntime.models import Built
from kvruntime.report.capture import Capture, image_of, picture_of
from kvruntime.report.record import save_run

MANIFEST, RUN = "manifest.jsonl", "RUN.json"
_PICTURES_IN_RUN = 16


class Settings(BaseModel):
    """What all pictures of a folder have in common. batch: drawn at a time, whole ones only; the
    seed of a batch is the number of its first picture. So it does not matter who draws it, nor how
    many are wanted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    weights: str | None = None
    resolution: str | None = None
    aspect: str = "1.000"
    policy: str
    budget: int | float | str
    kv_dtype: str | None
    dtype: str
    batch: NonNegativeInt


class Drawn(Settings):
    """A line of the manifest: one finished picture. prompt: as the file has it; None: the model's
    own choice, of classes in turn. seconds: of its batch; page_bytes: that its batch had at the
    peak, and own_bytes what the model's own cache would have.
    """

    number: NonNegativeInt
    prompt: str | None = None
    seed: NonNegativeInt
    file: str
    seconds: NonNegativeFloat
    page_bytes: NonNegativeInt
    own_bytes: NonNegativeInt
    rank: NonNegativeInt


def sample(
    built: Built,
    settings: Settings,
    count: int,
    out: Path,
    *,
    prompts: Sequence[str] = (),
    rank: int = 0,
    world: int = 1,
    tick: Callable[[int], object] = lambda finished: None,
    **drawing: Any,
) -> None:
    """Draw this rank's share of ``count`` pictures into ``out``: every ``world``-th batch. Those
    that the manifest has, and whose file is there, are not drawn again.

    A picture appears whole or not at all, and then its line, so that killing it anywhere loses
    nothing. RUN.json tells of the first batch that rank 0 draws. prompts: in turn; none: what the
    model draws by itself. drawing: more arguments of ``built.draw``. tick: gets the pictures of all
    ranks so far. Raises ValueError where the folder holds pictures of other settings or prompts, or
    the model does not know a prompt.
    """
    finished = set(finished_in(out, settings, prompts))
    if prompts:
        built.check_prompts(prompts)
    tick(len(finished))
    options: dict[str, Any] = {"kv_dtype": settings.kv_dtype}
    with attach(built.model, settings.policy, settings.budget, **options) as attached:
        capture = Capture(attached) if rank == 0 else None
        for first in range(rank * settings.batch, count, world * settings.batch):
            numbers = range(first, min(first + settings.batch, count))
            if all(number in finished for number in numbers):
                continue
            said = [_prompt(prompts, first + place) for place in range(settings.batch)]
            if prompts:
                drawing |= built.prompted([str(prompt) for prompt in said])
            began = time.perf_counter()
            pictures = built.draw(settings.batch, first, **drawing)[: len(numbers)]
            seconds, stats = time.perf_counter() - began, attached.stats
            if capture is not None:
                _record(capture, settings, seconds, pictures, said, out)
                capture = None
            lines = []
            for number, prompt, picture in zip(numbers, said, pictures, strict=False):
                if number not in finished:
                    name = f"{number:06d}.png"
                    _save(picture, out / name, out / f".{name}.{rank}")
                    line = Drawn(
                        **settings.model_dump(),
                        number=number,
                        prompt=prompt,
                        seed=first,
                        file=name,
                        seconds=seconds,
                        page_bytes=stats.page_bytes,
                        own_bytes=stats.baseline_bytes,
                        rank=rank,
                    )
                    lines.append(line.model_dump_json())
            _append(out / MANIFEST, lines)
            tick((out / MANIFEST).read_bytes().count(b"\n"))


def read_manifest(out: Path) -> Iterator[Drawn]:
    """The pictures that are finished. A line that was cut short, since its process was killed, is
    none: its picture is drawn again.
    """
    path = out / MANIFEST
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield Drawn.model_validate_json(line)
        except ValidationError:
            continue


def _record(
    capture: Capture,
    settings: Settings,
    seconds: float,
    pictures: Tensor,
    prompts: list[str | None],
    out: Path,
) -> None:
    """RUN.json of the first batch."""
    titles = [f"picture {place}" if said is None else said for place, said in enumerate(prompts)]
    some = list(zip(titles, pictures[:_PICTURES_IN_RUN], strict=False))
    run = capture.record(
        "sample",
        settings.model,
        settings.budget,
        seconds,
        [picture_of(title[:80], picture) for title, picture in some],
        settings.batch,
    )
    beside = out / f".{RUN}"
    save_run(run, beside)
    os.replace(beside, out / RUN)


def _prompt(prompts: Sequence[str], number: int) -> str | None:
    return prompts[number % len(prompts)] if prompts else None


def finished_in(out: Path, settings: Settings, prompts: Sequence[str] = ()) -> Iterator[int]:
    """Numbers of pictures that are there. Raises ValueError for pictures of other settings or
    prompts.
    """
    for line in read_manifest(out):
        theirs = Settings(**line.model_dump(include=set(Settings.model_fields)))
        if theirs.model_dump_json() != settings.model_dump_json():  # 1 is not 1.0
            raise ValueError(
                f"{out} holds pictures of other settings, {theirs}: give another folder than for "
                f"{settings}"
            )
        if line.prompt != _prompt(prompts, line.number):
            raise ValueError(
                f"{out} holds picture {line.number} of {line.prompt!r}, not of "
                f"{_prompt(prompts, line.number)!r}: give another folder"
            )
        if (out / line.file).is_file():
            yield line.number


def tidy(out: Path) -> None:
    """Remove what killed processes left half written, when nobody draws there any more."""
    for path in out.glob(".*.png.*"):
        path.unlink()


def _save(picture: Tensor, path: Path, beside: Path) -> None:
    """A PNG of [3, height, width] in [0, 1], under its name only when it is whole."""
    image_of(picture).save(beside, "png")
    os.replace(beside, path)


def _append(path: Path, lines: Iterable[str]) -> None:
    """In one write, which others' do not come into; after a line that was cut short, a new one."""
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        is_cut = end > 0 and file.read(1) != b"\n"
        file.write(("\n" * is_cut + "".join(f"{line}\n" for line in lines)).encode())
