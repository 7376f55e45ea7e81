"""Every option a user may give, checked once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvruntime.catalogue import profile_names
from kvruntime.coding import Coding, load_coding
from kvruntime.sizes import check_positive, parse_bytes, parse_share
from kvruntime.storage.layout import CodedFormat, Records, records_named
from policies import CacheGeometry, Policy, Profile, load_profile, preset_names

BACKENDS = ("auto", "sdpa", "xformers")
PAGED_QUERIES = 256  # not measured yet: no GPU in our tests; `python -m benchmarks gpu` tells


def check_budget(budget: object) -> None:
    """Raise ValueError unless ``budget`` is a fraction, a token count, a share or a size in
    bytes.
    """
    if isinstance(budget, str):
        if parse_share(budget) is None:
            try:
                if re.fullmatch(r"[\s\d.]*", budget):
                    raise ValueError
                parse_bytes(budget)
            except ValueError:
                raise ValueError(
                    "a budget in bytes is a share such as '2%' or a size such as '512MiB', "
                    f"got {budget!r}"
                ) from None
    elif isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ValueError(f"budget must be a number, got {budget!r}")
    elif isinstance(budget, int):
        if budget <= 0:
            raise ValueError(f"a budget in tokens must be positive, got {budget}")
    elif not 0.0 < budget <= 1.0:
        raise ValueError(f"a budget that is a fraction must be in (0, 1], got {budget}")


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """How a cache keeps what it keeps. Raises ValueError for what cannot work anywhere.

    policy, budget, profile: docs/policies.md. A budget that is a float is a fraction of the
        history in tokens, an int a token count for each lane, "2%" a share of the bytes of the
        model's own history, "512MiB" bytes of a generation's pages. profile: statistics of the
        model, a file or an object; None takes what the catalogue knows of the model.
    page_size: tokens in a page; by default 16 for histories below 1024 tokens, else 64, and for
        a budget in bytes whichever fits most tokens.
    kv_dtype, kv_groups, kv_start: int2, int4 or int8 pages with 1, 2, 4 or 8 groups of step size
        and shift, or transform-coded pages, coded2, coded3 or coded4, from that scale on; by
        default from where exact ones would take more. None: exact pages.
    coding: what transform-coded pages need to know of the model (calibrate_coding), a file or an
        object; None: attach() takes ``model.coding``, which the bundled model has.
    backend, paged_queries: auto, sdpa or xformers, and up to how many queries of a scale xformers
        reads pages.
    memory: most bytes that a generation's pages and workspace may take, a number or "20GiB".
    workspace: most bytes of the workspace; one row may exceed it, more rows may not. By default
        as the device's free memory allows.
    provenance: remember where each stored token comes from, 6 bytes a token
        (kvruntime.provenance).
    """

    policy: str | Policy = "scalekv"
    budget: float | str = 0.10
    profile: Profile | str | Path | None = None
    page_size: int | None = None
    kv_dtype: str | None = None
    kv_groups: int = 1
    kv_start: int | None = None
    coding: Coding | str | Path | None = None
    backend: str = "auto"
    paged_queries: int = PAGED_QUERIES
    memory: int | str | None = None
    workspace: int | str | None = None
    provenance: bool = False

    def __post_init__(self) -> None:
        for name in ("budget", "page_size", "kv_start", "paged_queries", "memory", "workspace"):
            value = getattr(self, name)
            if isinstance(value, np.integer | np.floating):
                object.__setattr__(self, name, value.item())
        check_budget(self.budget)
        _check_policy(self.policy, self.profile)
        for name in ("memory", "workspace"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, parse_bytes(value, name))
            elif value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value <= 0
            ):
                raise ValueError(f"{name} must be a positive number of bytes, got {value!r}")
        if self.page_size is not None:
            check_positive("page_size", self.page_size)
        records = self.records
        start = self.kv_start
        if start is not None:
            if records is None:
                raise ValueError(f"kv_start {start} goes with a kv_dtype")
            if isinstance(start, bool) or not isinstance(start, int):
                raise ValueError(f"kv_start must be a scale, got {start!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend {self.backend!r} is not one of {', '.join(BACKENDS)}")
        paged = self.paged_queries
        if isinstance(paged, bool) or not isinstance(paged, int) or paged < 0:
            raise ValueError(f"paged_queries must be a number of queries, got {paged!r}")
        if isinstance(self.profile, str | Path):
            object.__setattr__(self, "profile", _read_profile(self.profile))
        if isinstance(self.coding, str | Path):
            object.__setattr__(self, "coding", load_coding(self.coding))
        elif self.coding is not None and not isinstance(self.coding, Coding):
            raise ValueError(f"coding must be a file or a Coding, got {self.coding!r}")

    @property
    def is_shared_by_rows(self) -> bool:
        """Whether the budget is one of a generation, so that more rows have fewer tokens each."""
        return isinstance(self.budget, str) and parse_share(self.budget) is None

    def coding_for(self, geometry: CacheGeometry) -> Coding | None:
        """What pages of a model of this geometry are coded with; None where they are not. Raises
        ValueError where that is missing, or of another model.
        """
        if not isinstance(self.records, CodedFormat):
            return None
        if not isinstance(self.coding, Coding):
            raise ValueError(
                f"kv_dtype {self.kv_dtype} needs to know the model: give coding=, which "
                "calibrate_coding() measures"
            )
        self.coding.check(geometry)
        return self.coding

    @property
    def records(self) -> Records | None:
        """The format of kv_dtype and kv_groups; None for exact pages."""
        if self.kv_dtype is None:
            if self.kv_groups != 1:
                raise ValueError(f"kv_groups {self.kv_groups} goes with a kv_dtype")
            return None
        return records_named(self.kv_dtype, self.kv_groups)


def _check_policy(policy: str | Policy, profile: object) -> None:
    """Raise ValueError for what is neither a name nor a policy, and for a profile that does not go
    with it.
    """
    if profile is not None and not isinstance(profile, Profile | str | Path):
        raise ValueError(f"profile must be a file or a Profile, got {profile!r}")
    if isinstance(policy, str):
        return
    parts = ("name", "needs", "allocate", "scratch", "select")
    if isinstance(policy, type) or not all(hasattr(policy, part) for part in parts):
        raise ValueError(
            f"policy must be a name or an object with {', '.join(parts)}, got {policy!r}"
        )
    if profile is not None:
        raise ValueError(f"{policy.name} is an object with roles of its own: give no profile")


def _read_profile(path: str | Path) -> Profile:
    """Raises FileNotFoundError that says which models need no file."""
    try:
        return load_profile(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"profile {str(path)!r} is no file. Without one there are the profile of "
            f"{', '.join(profile_names())} and the published presets of "
            f"{', '.join(preset_names())}, which such a model gets by itself; calibrate() makes "
            "others"
        ) from None


def check_softmax_scale(softmax_scale: object) -> float:
    """The factor on q . k as a float. Raises ValueError for what is no finite number."""
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, int | float):
        raise ValueError(f"softmax_scale must be a number, got {softmax_scale!r}")
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return float(softmax_scale)
