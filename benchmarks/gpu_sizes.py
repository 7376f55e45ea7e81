"""How much `benchmarks gpu` measures: all on a device, next to nothing in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

from kvruntime.catalogue import find_model
from kvruntime.storage.layout import GROUPS
from policies import ScaleSchedule


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; TINY is for the interpreter."""

    schedule: ScaleSchedule
    pictures: int
    heads: int
    queries: tuple[int, ...]
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    page_sizes: tuple[int, ...]
    kv_groups: tuple[int, ...]
    budget: int
    copied_bytes: int
    backend: str  # of whole pictures
    policies: tuple[str, ...] = ("full", "scalekv", "centroid")


FULL = Sizes(
    find_model("infinity-2b").schedule,
    16,
    16,
    (1, 30, 300),
    ("float16", "bfloat16"),
    (64, 128),
    (16, 32, 64, 128),
    GROUPS,
    650,
    2**30,
    "auto",
)
TINY = Sizes(
    ScaleSchedule.of([1, 2, 4]),
    1,
    2,
    (3,),
    ("float16",),
    (32,),
    (16, 64),
    (1,),
    16,
    2**20,
    "sdpa",
    ("full", "scalekv"),
)
