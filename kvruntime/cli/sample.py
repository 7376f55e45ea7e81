"""kvruntime sample, also under torchrun."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import Progress

from kvruntime.cli.building import (
    Aspect,
    Device,
    Dtype,
    Name,
    Repo,
    Resolution,
    StandIns,
    TextEncoder,
    Weights,
    built_model,
)
from kvruntime.cli.common import (
    JSON,
    BudgetText,
    KVDtype,
    PolicyName,
    exit_codes,
    parse_budget,
    print_json,
)
from kvruntime.models import Built
from kvruntime.models.prompts import read_prompts
from kvruntime.sampling import Settings, finished_in, read_manifest, sample, tidy
from kvruntime.sizes import check_positive


def sample_command(
    model: Name,
    out: Annotated[Path, typer.Option(help="Folder of the PNGs and manifest.jsonl.")],
    count: Annotated[
        int | None, typer.Option(help="Pictures; by default one of each prompt, or 64.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="One a line, or JSON; for class models numbers or names. Without: classes in turn."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="How many at once.")] = 8,
    policy: PolicyName = "scalekv",
    budget: BudgetText = "0.10",
    kv_dtype: KVDtype = None,
    text_encoder: TextEncoder = None,
    repo: Repo = None,
    weights: Weights = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    resolution: Resolution = None,
    aspect: Aspect = "1.000",
    stand_ins: StandIns = False,
    as_json: JSON = False,
) -> None:
    """Draw many pictures into a folder; torchrun splits them over processes. Called again, it goes
    on.
    """
    rank, world = (int(os.environ.get(name, at)) for name, at in (("RANK", 0), ("WORLD_SIZE", 1)))
    with exit_codes():
        said = [] if prompts is None else read_prompts(prompts)
        count = (len(said) or 64) if count is None else count
        check_positive("count", count)
        check_positive("batch", batch)
        if device == "cuda" and world > 1:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        settings = Settings(
            model=model,
            weights=None if weights is None else str(weights),
            resolution=resolution,
            aspect=aspect,
            policy=policy,
            budget=parse_budget(budget),
            kv_dtype=kv_dtype,
            dtype=dtype,
            batch=batch,
        )
        built, drawing = built_model(
            model, repo, weights, device, dtype, resolution, aspect, stand_ins, text_encoder
        )
        out.mkdir(parents=True, exist_ok=True)
        share: dict[str, Any] = {"prompts": said, "rank": rank, "world": world, **drawing}
        if world > 1:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        try:
            _draw(built, settings, count, out, share)
            if world > 1:
                dist.barrier()
        finally:
            if world > 1:
                dist.destroy_process_group()
        if rank == 0:
            tidy(out)
            _tell(out, settings, said, as_json)


def _draw(built: Built, settings: Settings, count: int, out: Path, share: dict[str, Any]) -> None:
    """This rank's share; rank 0 shows how far all are."""
    console = Console(stderr=True, quiet=share["rank"] > 0)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("pictures", total=count)

        def tick(finished: int) -> None:
            progress.update(bar, completed=finished)

        sample(built, settings, count, out, tick=tick, **share)


def _tell(out: Path, settings: Settings, prompts: list[str], as_json: bool) -> None:
    """How many there are now, and what they took."""
    pictures = len(set(finished_in(out, settings, prompts)))
    last = list(read_manifest(out))[-1]
    if as_json:
        told = {"pictures": pictures, "page_bytes": last.page_bytes, "own_bytes": last.own_bytes}
        print_json({"folder": str(out), **settings.model_dump(), **told})
        return
    Console().print(
        f"{pictures} pictures in {out}; a batch had {last.page_bytes} bytes of pages in place of "
        f"{last.own_bytes}",
        soft_wrap=True,
    )
