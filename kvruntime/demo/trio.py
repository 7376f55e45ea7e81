"""The demo in short: the model's own cache, a published policy, and ours at 2 % of the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from kvruntime.adapters import Attachment, attach
from kvruntime.demo.compare import MOST_PICTURES, Own, compare, demo_labels, draw_own
from kvruntime.reference import EmojiVAR, load_classes, load_model
from kvruntime.report.capture import Capture, picture_of
from kvruntime.report.record import Layer, Other, Quality, Run
from policies import TORCH_DTYPES

OURS: dict[str, Any] = {"policy": "centroid", "kv_dtype": "int4"}
OUR_BUDGET = "2%"
MOST_SHOWN = 16  # pictures of a record


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """name: for people. pictures: [count, 3, 64, 64]. figures: as ``compare`` gives them. run: its
    record, with the own cache's pictures beside.
    """

    name: str
    pictures: Tensor
    figures: dict[str, Any]
    run: Run


def run_trio(
    published: dict[str, Any],
    budget: int | float | str,
    count: int,
    seed: int,
    dtype: str,
    progress: Progress,
) -> tuple[Tensor, float, list[Drawn]]:
    """Draw ``count`` pictures three times. published: policy and pages of the second one.

    Returns the own cache's pictures and seconds, and the other two. Raises ValueError for what
    cannot be drawn, before anything is.
    """
    if not 0 < count <= MOST_PICTURES:
        raise ValueError(f"count must be in 1..{MOST_PICTURES}, got {count}")
    model, labels = load_model(TORCH_DTYPES[dtype]), demo_labels(count)
    wanted = [(published, budget), (OURS, OUR_BUDGET)]
    for options, asked in wanted:
        with attach(model, budget=asked, **options):
            pass
    bar = progress.add_task("its own cache", total=7)
    own = draw_own(model, labels, seed)
    progress.update(bar, advance=2)
    drawn: list[Drawn] = []
    for options, asked in wanted:
        progress.update(bar, description=options["policy"])
        drawn.append(_draw(model, labels, seed, own, asked, options, drawn))
        progress.update(bar, advance=2.5)
    return own.pictures, own.seconds, drawn


def _draw(
    model: EmojiVAR,
    labels: Tensor,
    seed: int,
    own: Own,
    budget: int | float | str,
    options: dict[str, Any],
    before: list[Drawn],
) -> Drawn:
    """All pictures with one policy, and the record of it."""
    captured: list[Capture] = []

    def watch(attached: Attachment) -> None:
        captured.append(Capture(attached))

    figures, drawn = compare(model, labels, seed, own, budget, options, watch)
    names = load_classes()
    shown = zip(labels[:MOST_SHOWN].tolist(), drawn, own.pictures, strict=False)
    run = captured[0].record(
        "demo",
        "emoji64",
        budget,
        figures["seconds"],
        [picture_of(names[label], ours, theirs) for label, ours, theirs in shown],
        labels.shape[0],
        quality=Quality(psnr_db=figures["psnr_db"]["mean"], kl=figures["kl"]),
        others=[_other(one) for one in before],
        origin=_origin(model, labels[:1], seed, options, figures["budget_tokens"]),
    )
    return Drawn(_name(options, budget), drawn, figures, run)


def _name(options: dict[str, Any], budget: int | float | str) -> str:
    if isinstance(budget, str):
        share = budget.replace("%", " % of the bytes")
    else:
        share = f"{100 * budget:g} %" if isinstance(budget, float) else f"{budget} tokens"
    pages = options.get("kv_dtype")
    return f"{options['policy']}{f' {pages}' if pages else ''}, {share}"


def _other(one: Drawn) -> Other:
    return Other(policy=one.name, page_bytes=one.run.bytes.pages, quality=_quality(one))


def _quality(one: Drawn) -> Quality:
    assert one.run.quality is not None
    return one.run.quality


def _origin(
    model: EmojiVAR, label: Tensor, seed: int, options: dict[str, Any], tokens: int
) -> list[Layer]:
    """Where the tokens come from that the first picture keeps: drawn once more, remembering."""
    with attach(model, budget=tokens, provenance=True, **options) as attached, torch.no_grad():
        capture = Capture(attached)
        model.generate_codes(label, seed)
        return capture.layers
