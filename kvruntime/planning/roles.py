"""Which policy a cache gets, and where the roles of its layers come from."""

from __future__ import annotations

from kvruntime.catalogue import recognise
from kvruntime.options import CacheOptions
from policies import CacheGeometry, Policy, Profile, ScaleSchedule, load_preset, make_policy


def choose_policy(
    options: CacheOptions, geometry: CacheGeometry, schedule: ScaleSchedule
) -> tuple[Policy, str]:
    """The policy of these options for such a model, and where its roles come from, for people.

    A name gets the profile that was given; else, where the catalogue knows a model of this
    geometry and schedule, that model's shipped profile or published preset. An object is used as it
    is. Raises ValueError for a profile of another model.
    """
    policy, profile = options.policy, options.profile
    if not isinstance(policy, str):
        return policy, "the policy object's own"
    note = "none: all layers alike"
    preset = None
    if profile is not None:
        assert isinstance(profile, Profile), "CacheOptions loads files"
        if profile.layers != geometry.layers:
            raise ValueError(
                f"the profile has {profile.layers} layers, the model {geometry.layers}"
            )
        note = "given" if profile.schedule == schedule else "given, made for another schedule"
    else:
        known = recognise(geometry, schedule)
        if known is not None:
            profile = known.load_profile()
            preset = load_preset(known.name)
            kind = "profile" if profile else "published preset" if preset else ""
            note = f"{kind} of {known.name}" if kind else note
            sizes = profile.sizes if profile else preset.sizes if preset else schedule.sizes
            if sizes != schedule.sizes:
                note += ", made for another schedule"
    return make_policy(policy, profile, preset), note
