"""Which attention back end a cache gets, and why."""

from __future__ import annotations

from types import ModuleType

import torch

from kvruntime.attention import sdpa
from kvruntime.attention.base import TESTED_VERSIONS, Backend
from kvruntime.errors import BackendUnavailable
from kvruntime.planning.demand import Plan
from policies import TORCH_DTYPES


def choose_backend(
    wanted: str, device: torch.device, plan: Plan, paged_queries: int
) -> tuple[Backend, str]:
    """The back end that runs such a plan on the device, and why it is this one.

    auto: xformers on a CUDA device where it can run, else torch's SDPA. xformers:
    BackendUnavailable with every reason where it cannot. paged_queries: most queries of a
    scale for which xformers reads pages; a finer scale is gathered.
    """
    if wanted == "sdpa":
        return sdpa.SDPA(), "asked for"
    if wanted == "auto" and device.type != "cuda":
        return sdpa.SDPA(), f"auto: the device is {device.type}, xformers needs cuda"
    reasons = reasons_against_xformers(device, plan)
    if not reasons:
        from kvruntime.attention.xformers import XFormers

        dtype = TORCH_DTYPES[plan.geometry.key_dtype]
        xformers = XFormers(device, dtype, plan.geometry.head_dim, paged_queries)
        why = "asked for" if wanted == "xformers" else "auto: it can run here"
        return xformers, f"{why}; gathered tokens go to {xformers.gathered_operator}"
    if wanted == "xformers":
        raise BackendUnavailable("xformers", reasons)
    return sdpa.SDPA(), f"auto: xformers cannot run here: {'; '.join(reasons)}"


def reasons_against_xformers(device: torch.device, plan: Plan) -> list[str]:
    """Why xformers cannot run such a plan on the device, in its operators' own words; empty if it
    can.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    xformers, why_not = import_xformers()
    if xformers is None:
        return [why_not]
    reasons: list[str] = xformers.reasons_against(
        device, TORCH_DTYPES[plan.geometry.key_dtype], plan
    )
    return reasons


def import_xformers() -> tuple[ModuleType | None, str]:
    """kvruntime.attention.xformers; or None, and what is in the way."""
    try:
        from kvruntime.attention import xformers
    except ModuleNotFoundError as error:
        return None, f"{error}: pip install 'kvruntime[xformers]'"
    except Exception as error:  # whatever a version that does not fit breaks
        what = f"{type(error).__name__}: {error}"
        return None, f"xformers cannot be imported ({what}); {TESTED_VERSIONS}"
    return xformers, ""
