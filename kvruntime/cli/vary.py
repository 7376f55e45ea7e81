"""kvruntime vary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvruntime.cli.common import (
    JSON,
    BudgetText,
    KVDtype,
    PolicyName,
    exit_codes,
    parse_budget,
    print_json,
)


def vary(
    from_scale: Annotated[int, typer.Option(help="The first scale that differs, 1 to 9.")] = 4,
    count: Annotated[int, typer.Option(help="Variations of each picture.")] = 6,
    pictures: Annotated[int, typer.Option(help="Pictures, of the classes in turn.")] = 4,
    seed: int = 0,
    policy: PolicyName = "full",
    budget: BudgetText = "1.0",
    kv_dtype: KVDtype = None,
    page_size: Annotated[
        int, typer.Option(help="Tokens of a page; what lanes share is whole pages.")
    ] = 8,
    out: Annotated[Path, typer.Option(help="The PNG: a row for each picture.")] = Path("vary.png"),
    as_json: JSON = False,
) -> None:
    """Draw emoji with the bundled model, alike up to a scale and then several ways, in pages that
    they share until one writes.
    """
    with exit_codes():
        from kvruntime.demo.variations import check_out, draw_variations, save_grid

        check_out(out)
        figures, drawn = draw_variations(
            from_scale,
            count,
            pictures,
            seed,
            policy,
            parse_budget(budget),
            kv_dtype=kv_dtype,
            page_size=page_size,
        )
        save_grid(drawn, out)
        if as_json:
            print_json(figures)
            return
        saved = 100 * (1 - figures["planned_pages"] / figures["apart_pages"])
        console = Console()
        console.print(
            f"{pictures} pictures, {count} variations of each from scale {from_scale} on, in "
            f"{figures['seconds']:.1f} s\n"
            f"pages: {figures['planned_pages']} planned, {figures['peak_pages']} used; drawn apart "
            f"{figures['apart_pages']} ({saved:.0f} % saved)\n"
            f"{figures['shared_pages']} held what the {count} had in common when they parted\n"
            f"wrote {out}",
            soft_wrap=True,
        )
