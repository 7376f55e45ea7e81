"""Files that authors of policies publish: ScaleKV's budgets, HeatKV's removal orders."""

from __future__ import annotations

from pathlib import Path

from pydantic import NonNegativeInt, RootModel

from policies.heatkv import HeatKV
from policies.profile import Preset, load_file
from policies.scalekv import ScaleKV, scalekv_from
from policies.schedule import ScaleSchedule

_BLOCK, _SCALE = "Block ", "Scale "


class _Budgets(RootModel[dict[str, dict[str, NonNegativeInt]]]):
    """Budgets of the cache that "Scale n" reads, counted from 1: whether "Block l" is a drafter,
    the tokens of drafters ("Max") and of refiners ("Min").
    """


class _Orders(RootModel[tuple[tuple[tuple[NonNegativeInt, NonNegativeInt], ...], ...]]):
    """(head, layer) in the order in which they lose a source scale, for each source scale."""


def load_scalekv_budgets(path: Path | str, schedule: ScaleSchedule) -> ScaleKV:
    """The policy of a budget file of ScaleKV's repository (``budgets/2b_10%_budget.json``).

    It holds at its own budget, which is ``published.budget_tokens``, and on this schedule; with
    others only the roles of layers are used. The file names no schedule.

    Raises ValueError for a file of another form, for scales that ``schedule`` has not, and for
    budgets that start too late or whose mean over layers changes from scale to scale.
    """
    scales = load_file(Path(path), _Budgets).root
    numbers = range(len(schedule) - len(scales) + 1, len(schedule) + 1)
    if not scales or list(scales) != [f"{_SCALE}{number}" for number in numbers]:
        raise ValueError(
            f"{path}: must name scales one after another up to {_SCALE}{len(schedule)}, the last "
            f"of this schedule; got {', '.join(scales) or 'none'}"
        )
    first = next(iter(scales.values()))
    layers = sum(name.startswith(_BLOCK) for name in first)
    drafters, budgets = [], []
    for name, scale in scales.items():
        missing = {"Max", "Min", *(f"{_BLOCK}{layer}" for layer in range(layers))} - set(scale)
        if missing or not layers:
            raise ValueError(f"{path}: {name} does not name {min(missing, default=_BLOCK + '0')}")
        drafters.append(tuple(layer for layer in range(layers) if scale[f"{_BLOCK}{layer}"]))
        budgets.append((scale["Max"], scale["Min"]))
    drafting = len(drafters[0])
    try:
        preset = Preset(
            version=1,
            model="",
            sizes=schedule.sizes,
            source=str(path),
            layers=layers,
            first_scale=numbers[0] - 1,
            budget_tokens=(drafting * first["Max"] + (layers - drafting) * first["Min"]) // layers,
            drafters=tuple(drafters),
            budgets=tuple(budgets),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return scalekv_from(None, preset)


def load_heatkv_orders(path: Path | str, sinks: int = 3, is_strict: bool = False) -> HeatKV:
    """The policy of an order file of HeatKV's repository (``orders/2b.json``); sinks: the first
    scales, which the file does not name and which stay.

    Raises ValueError for a file of another form, or that does not name every head once for each
    source scale; the model's layers and heads are compared when a generation opens.
    """
    orders = load_file(Path(path), _Orders).root
    swapped = tuple(tuple((layer, head) for head, layer in order) for order in orders)
    try:
        return HeatKV(swapped, sinks, is_strict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
