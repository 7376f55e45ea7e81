"""Attention back ends: what they promise, and which one a cache gets."""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from kvruntime.attention import sdpa
from kvruntime.errors import BackendUnavailable
from kvruntime.plan import Plan
from kvruntime.pool import TORCH_DTYPES, Lanes, Pages

BACKENDS = ("auto", "sdpa", "xformers")
TESTED_VERSIONS = "tested with xformers 0.0.35 and triton 3.7.1: pip install 'kvruntime[xformers]'"
PAGED_QUERIES = 256  # not measured yet: no GPU in our tests; `python -m benchmarks gpu` tells


class Backend(Protocol):
    """Attention of all queries to all keys of their lane, without a mask; no gradients."""

    name: str

    def reads_pages(self, pages: Pages, num_queries: int, is_ragged: bool) -> bool:
        """Whether a step goes to ``attend_pages``; else tokens are gathered for ``attend``."""
        ...

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, softmax_scale: float
    ) -> Tensor:
        """Attention of q [rows, n, heads, head_dim] to keys and values [rows, heads, tokens,
        head_dim].

        bias: [heads, 1, tokens] added to the logits, or None. Returns [rows, n, heads, head_dim].
        """
        ...

    def attend_pages(
        self, q: Tensor, k: Tensor, v: Tensor, cached: Lanes, softmax_scale: float
    ) -> Tensor:
        """Attention of q to what the rows * heads lanes hold and to the fresh k and v, all [rows,
        n, heads, head_dim].
        """
        ...


def last_line(text: str) -> str:
    """What an error says at its end; a word where it says nothing."""
    return (text.strip().splitlines() or ["no message"])[-1]


def choose_backend(
    wanted: str, device: torch.device, plan: Plan, paged_queries: int
) -> tuple[Backend, str]:
    """The back end that runs such a plan on the device, and why it is this one.

    auto: xformers on a CUDA device where it can run, else torch's SDPA. xformers:
    BackendUnavailable with every reason where it cannot. paged_queries: most queries of a
    scale for which xformers reads pages; a finer scale is gathered.
    """
    if wanted not in BACKENDS:
        raise ValueError(f"backend {wanted!r} is not one of {', '.join(BACKENDS)}")
    if isinstance(paged_queries, bool) or not isinstance(paged_queries, int) or paged_queries < 0:
        raise ValueError(f"paged_queries must be a number of queries, got {paged_queries!r}")
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
