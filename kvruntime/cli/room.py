"""What of a card a plan takes, as a bar; policies side by side, as a table and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvruntime.cards import Card, Reserve, find_card, reserve_of
from kvruntime.catalogue import Model
from kvruntime.planning import Plan
from kvruntime.planning.compare import Way
from kvruntime.sizes import in_units, parse_bytes

_WIDTH = 64  # characters of the bar


@dataclass(frozen=True, slots=True)
class Room:
    """total: of the card or the memory. reserve: what of that is not for the cache."""

    name: str
    total: int
    reserve: Reserve

    @property
    def left(self) -> int:
        """Bytes for pages, workspace and what layers compute."""
        return self.total - self.reserve.fixed


def room_of(
    model: Model,
    card: str | None,
    memory: str | None,
    reserved: int | None,
    running: str | None,
    with_text_encoder: bool,
) -> Room | None:
    """Of a card, or of so much memory; None where neither is given. Raises ValueError for options
    that do not go together.
    """
    if card is not None and memory is not None:
        raise ValueError("give --card or --memory, not both")
    given = None if running is None else parse_bytes(running, "running") if running != "0" else 0
    if card is not None:
        found: Card = find_card(card)
        reserve = reserve_of(model, with_text_encoder, given)
        if reserved is not None:
            reserve = Reserve(reserved, 0, 0, reserve.running)
        return Room(found.name, found.num_bytes, reserve)
    if memory is None:
        if reserved is not None:
            raise ValueError("--reserved goes with --memory or --card")
        return None
    return Room(memory, parse_bytes(memory), Reserve(reserved or 0, 0, 0, given or 0))


def print_bar(room: Room, made: Plan, pictures: int, console: Console) -> None:
    """The parts of the memory, a letter each as long as its share, and the same in numbers."""
    reserve = room.reserve
    parts = [
        ("W", "weights and tokenizer", reserve.weights, "white on blue"),
        ("T", "text encoder", reserve.text_encoder, "white on dark_cyan"),
        ("C", "CUDA context", reserve.context, "white on grey37"),
        ("R", "what layers compute", pictures * reserve.running, "black on yellow"),
        ("w", "workspace", made.workspace_bytes, "black on green3"),
        ("P", "pages", made.page_bytes, "white on dark_red"),
    ]
    taken = sum(size for _, _, size, _ in parts)
    unit = max(room.total, taken) / _WIDTH
    bar = Text()
    for letter, _, size, style in parts:
        bar.append(letter * round(size / unit), style)
    bar.append("." * max(0, round((room.total - taken) / unit)))
    console.print(bar)
    for letter, what, size, style in parts:
        if size:
            console.print(Text.assemble((f" {letter} ", style), f" {what}: {in_units(size)}"))
    free = room.total - taken
    what = f"free: {in_units(free)}" if free >= 0 else f"too much by {in_units(-free)}"
    console.print(f" .  {what} of {room.name}, {in_units(room.total)}")
    if not reserve.running:
        console.print("    what layers compute is not known for this model: give --running")


def print_ways(ways: list[Way], model: Model, room: Room, console: Console) -> None:
    """A line a policy and format."""
    title = f"{model.name} on {room.name}: {in_units(room.left)} for caches"
    if room.reserve.running:
        title += f" and {in_units(room.reserve.running)} a picture for what layers compute"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("policy", no_wrap=True)
    for heading in ("pages of a picture", "workspace", "pictures that fit"):
        table.add_column(heading, justify="right")
    for way in ways:
        workspace = in_units(way.workspace_bytes) if way.policy else ""
        table.add_row(way.name, in_units(way.picture_bytes), workspace, str(way.pictures))
    console.print(table)


def save_ways(ways: list[Way], model: Model, room: Room, path: Path) -> None:
    """Pictures that fit, a bar a policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axis = plt.subplots(figsize=(8, 0.42 * len(ways) + 1.2), constrained_layout=True)
    names = [f"{way.name}  ({in_units(way.picture_bytes)})" for way in ways]
    ours = ["centroid" in way.name for way in ways]
    colours = [
        "0.55" if way.policy is None else "tab:blue" if own else "tab:orange"
        for way, own in zip(ways, ours, strict=True)
    ]
    bars = axis.barh(names, [way.pictures for way in ways], color=colours)
    axis.bar_label(bars, padding=4)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("pictures at once")
    axis.set_title(
        f"{model.name} on {room.name}; in brackets the pages of one picture", fontsize=10
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
