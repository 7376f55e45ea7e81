"""Policies and formats side by side: what a picture takes, and how many fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvruntime.catalogue import Model
from kvruntime.options import CacheOptions
from kvruntime.planning import planner
from kvruntime.planning.demand import Plan
from kvruntime.planning.rows import most_that_fit

WAYS: tuple[tuple[str, str, float | str, str | None], ...] = (
    ("full", "full", 1.0, None),
    ("full, int4", "full", 1.0, "int4"),
    ("ams_kv 10 %", "ams_kv", 0.10, None),
    ("scalekv 10 %", "scalekv", 0.10, None),
    ("scalekv 10 %, int4", "scalekv", 0.10, "int4"),
    *((f"{name} 10 %", name, 0.10, None) for name in ("h2o", "snapkv", "pyramidkv", "hack")),
    ("streaming_llm 10 %", "streaming_llm", 0.10, None),
    ("centroid 10 %", "centroid", 0.10, None),
    ("centroid 2 %, int4", "centroid", "2%", "int4"),
)
MOST_PICTURES = 2**14


@dataclass(frozen=True, slots=True)
class Way:
    """A policy, budget and format. policy None: the model's own cache, with torch.cat's copies.
    picture_bytes: of one picture's pages, and workspace_bytes beside them; pictures: that fit at
    once.
    """

    name: str
    policy: str | None
    budget: float | str | None
    kv_dtype: str | None
    picture_bytes: int
    workspace_bytes: int
    pictures: int


def most_pictures(needs: Callable[[int], int], room: int) -> int:
    """The most that fit, of ``needs(pictures)`` bytes, up to MOST_PICTURES; 0 if not one does."""
    return most_that_fit(needs, room, MOST_PICTURES)


def compare_ways(model: Model, room: int, running_bytes: int = 0) -> list[Way]:
    """The own cache and WAYS, for a model of the catalogue, in the pages' default sizes. room:
    bytes for cache, workspace and what layers compute (running_bytes a picture).
    """
    rows = model.rows_per_picture
    exact = planner(model, CacheOptions("full", 1.0))

    def own(pictures: int) -> int:
        held = exact(pictures * rows).baseline_bytes()["with_cat_copy_bytes"]
        return held + pictures * running_bytes

    found = [
        Way("own cache", None, None, None, own(1) - running_bytes, 0, most_pictures(own, room))
    ]
    for name, policy, budget, kv_dtype in WAYS:
        plan_for = planner(model, CacheOptions(policy, budget, kv_dtype=kv_dtype))
        one = plan_for(rows)

        def needs(pictures: int, plan_for: Callable[[int], Plan] = plan_for) -> int:
            return plan_for(pictures * rows).total_bytes + pictures * running_bytes

        way = (name, policy, budget, kv_dtype, one.page_bytes, one.workspace_bytes)
        found.append(Way(*way, most_pictures(needs, room)))
    return found
