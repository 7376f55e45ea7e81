"""How many tokens a lane keeps after each scale, and which. Pure: no pool, no model."""

from collections.abc import Callable

from policies.ams_kv import AMSKV, ams_kv_from
from policies.base import Policy, Step, check_lengths, uniform
from policies.full import Full
from policies.profile import Preset, Profile, load_preset, load_profile
from policies.scalekv import ScaleKV, scalekv_from
from policies.schedule import DTYPE_BYTES, CacheGeometry, Lengths, ScaleSchedule
from policies.sliding_window import SlidingWindow
from policies.streaming_llm import StreamingLLM

_MAKERS: dict[str, Callable[[Profile | None, Preset | None], Policy]] = {
    "full": lambda profile, preset: Full(),
    "scalekv": scalekv_from,
    "ams_kv": lambda profile, preset: ams_kv_from(profile),
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
    "POLICY_NAMES",
    "CacheGeometry",
    "Full",
    "Lengths",
    "Policy",
    "Preset",
    "Profile",
    "ScaleKV",
    "ScaleSchedule",
    "SlidingWindow",
    "Step",
    "StreamingLLM",
    "check_lengths",
    "load_preset",
    "load_profile",
    "make_policy",
    "uniform",
]
