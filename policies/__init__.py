"""How many tokens a lane keeps after each scale, which, and what becomes of the others. Pure: no
pool, no model.
"""

from collections.abc import Callable

from policies.ams_kv import AMSKV, ams_kv_from
from policies.base import (
    ORIGIN,
    PLANES,
    Allocation,
    Candidates,
    Needs,
    Policy,
    Problem,
    Selection,
    StepSizes,
)
from policies.budgets import check_allocation
from policies.by_head import CentroidByHead, FoldErrors, centroid_by_head_from
from policies.centroid import Centroid, centroid_from
from policies.h2o import H2O
from policies.hack import Hack, hack_from
from policies.hackpp import HackPP, hackpp_from
from policies.heatkv import HeatKV, heatkv_from
from policies.profile import Preset, Profile, load_preset, load_profile, preset_names
from policies.random import Random
from policies.recency import Full, SlidingWindow, StreamingLLM
from policies.released import load_heatkv_orders, load_scalekv_budgets
from policies.scalekv import ScaleKV, scalekv_from
from policies.schedule import DTYPE_BYTES, CacheGeometry, Lengths, ScaleSchedule
from policies.scratch import TORCH_DTYPES, Region, held_bytes, torch_bytes
from policies.snapkv import PyramidKV, SnapKV

_MAKERS: dict[str, Callable[[Profile | None, Preset | None], Policy]] = {
    "full": lambda profile, preset: Full(),
    "scalekv": scalekv_from,
    "ams_kv": lambda profile, preset: ams_kv_from(profile),
    "centroid": lambda profile, preset: centroid_from(profile),
    "centroid_by_head": lambda profile, preset: centroid_by_head_from(profile),
    "hack": lambda profile, preset: hack_from(profile),
    "hackpp": lambda profile, preset: hackpp_from(profile),
    "heatkv": lambda profile, preset: heatkv_from(profile),
    "h2o": lambda profile, preset: H2O(),
    "snapkv": lambda profile, preset: SnapKV(),
    "pyramidkv": lambda profile, preset: PyramidKV(),
    "random": lambda profile, preset: Random(),
    "sliding_window": lambda profile, preset: SlidingWindow(),
    "streaming_llm": lambda profile, preset: StreamingLLM(),
}
POLICY_NAMES = tuple(_MAKERS)


def make_policy(name: str, profile: Profile | None = None, preset: Preset | None = None) -> Policy:
    """The policy of that name, its roles taken from the profile or else from the preset."""
    if name not in _MAKERS:
        raise ValueError(f"unknown policy {name!r}; there are {', '.join(POLICY_NAMES)}")
    return _MAKERS[name](profile, preset)


__all__ = [
    "AMSKV",
    "DTYPE_BYTES",
    "H2O",
    "ORIGIN",
    "PLANES",
    "POLICY_NAMES",
    "TORCH_DTYPES",
    "Allocation",
    "CacheGeometry",
    "Candidates",
    "Centroid",
    "CentroidByHead",
    "FoldErrors",
    "Full",
    "Hack",
    "HackPP",
    "HeatKV",
    "Lengths",
    "Needs",
    "Policy",
    "Preset",
    "Problem",
    "Profile",
    "PyramidKV",
    "Random",
    "Region",
    "ScaleKV",
    "ScaleSchedule",
    "Selection",
    "SlidingWindow",
    "SnapKV",
    "StepSizes",
    "StreamingLLM",
    "check_allocation",
    "held_bytes",
    "load_heatkv_orders",
    "load_preset",
    "load_profile",
    "load_scalekv_budgets",
    "make_policy",
    "preset_names",
    "torch_bytes",
]
