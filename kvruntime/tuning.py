"""Tuning: every policy and format at one budget, on what a model's drawing asks of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvruntime.adapters import Embedding, attach, own_coding, view_of
from kvruntime.cache import PagedKVCache
from kvruntime.coding import Coding
from kvruntime.errors import WillNeverFit
from kvruntime.options import CacheOptions
from kvruntime.planning import Plan
from kvruntime.preset import CachePreset, Trial, best_first
from kvruntime.sizes import check_positive, parse_share
from kvruntime.storage.layout import CODED
from policies import POLICY_NAMES, CacheGeometry, Profile, ScaleSchedule

FORMATS = (None, "int4", "coded3", "coded2")
CANDIDATES = tuple(
    (policy, kv_dtype) for policy in POLICY_NAMES if policy != "full" for kv_dtype in FORMATS
)


@dataclass(eq=False)
class Steps:
    """q, k, v [rows, n, heads, head_dim] of every step of one drawing, by (scale, layer)."""

    schedule: ScaleSchedule | None = None
    parts: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def geometry(self) -> CacheGeometry:
        """Raises ValueError for a drawing that is not whole."""
        layers = 1 + max((layer for _, layer in self.parts), default=-1)
        if self.schedule is None or len(self.parts) != layers * len(self.schedule) or not layers:
            raise ValueError("draw() did not run the model's sampler through all scales")
        q, _, _ = self.parts[0, 0]
        dtype = str(q.dtype).removeprefix("torch.")
        return CacheGeometry(layers, q.shape[2], q.shape[3], dtype, dtype)


def record(
    model: Any, draw: Callable[[], object], rows: int, embedding: Embedding | None = None
) -> Steps:
    """The steps of the first generation that ``draw()`` runs: of at most ``rows`` rows, those that
    stay to the end.
    """
    steps = Steps()

    def observe(
        scale: int, layer: int, first_row: int, q: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        steps.schedule = steps.schedule or attached.schedule
        if first_row == 0 and (scale, layer) not in steps.parts:
            fresh = (part[:rows, :, -q.shape[1] :].transpose(1, 2) for part in (keys, values))
            k, v = (part.to(q.dtype).clone() for part in fresh)
            steps.parts[scale, layer] = q[:rows].clone(), k, v

    with attach(model, "full", 1.0, embedding=embedding, observer=observe) as attached:
        draw()
    stay = min((q.shape[0] for q, _, _ in steps.parts.values()), default=0)  # guidance may end
    for place, (q, k, v) in steps.parts.items():
        steps.parts[place] = q[:stay], k[:stay], v[:stay]
    return steps


def attend_all(
    steps: Steps, options: CacheOptions, softmax_scale: float
) -> tuple[Plan, list[Tensor]]:
    """The generation's plan, and attention of every recorded step over a cache of these options."""
    geometry, outputs = steps.geometry(), []
    assert steps.schedule is not None
    first = steps.parts[0, 0][0]
    cache = PagedKVCache(
        geometry, steps.schedule, options, softmax_scale=softmax_scale, device=first.device
    )
    with torch.no_grad(), cache.open(first.shape[0]) as generation:
        for (_, layer), (q, k, v) in sorted(steps.parts.items()):
            outputs.append(generation.attend(layer, q, k, v))
        return generation.plan, outputs


def attention_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Root of the mean square of the differences over that of what is wanted."""
    squares = [0.0, 0.0]
    for ours, whole in zip(found, wanted, strict=True):
        squares[0] += float((ours - whole).double().square().sum())
        squares[1] += float(whole.double().square().sum())
    return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0


def tune(
    model: Any,
    draw: Callable[[], object],
    budget: str,
    name: str,
    *,
    embedding: Embedding | None = None,
    profile: Profile | None = None,
    coding: Coding | None = None,
    rows: int = 2,
    candidates: Iterable[tuple[str, str | None]] = CANDIDATES,
    tick: Callable[[], object] = lambda: None,
) -> CachePreset:
    """Draw once on the uncompressed cache, then try every policy and format on what was drawn: the
    one whose attention is nearest to that over the whole history is the preset.

    budget: a share of the bytes of the model's own history, such as "2%": it means the same for any
    number of rows. candidates: (policy, kv_dtype) to try; coded ones are left out where there is no
    coding (None: ``model.coding``). rows: of the drawing that are tried. tick: called after each.
    Costs one drawing and an attention pass for each candidate; holds q, k, v and outputs of all
    steps of these rows (Infinity-2B at 1M, one row, bfloat16: 6.9 GB).
    Raises ValueError for a budget that is no share, and where no candidate can work with it.
    """
    if not isinstance(budget, str) or parse_share(budget) is None:
        raise ValueError(f"budget must be a share of the history's bytes, as '2%', got {budget!r}")
    check_positive("rows", rows)
    scale = view_of(model, embedding).softmax_scale
    coding = coding or own_coding(model)
    steps = record(model, draw, rows, embedding)
    _, wanted = attend_all(steps, CacheOptions("full", 1.0), scale)
    trials = []
    for policy, kv_dtype in candidates:
        if kv_dtype not in CODED or coding is not None:
            options = {"policy": policy, "budget": budget, "kv_dtype": kv_dtype}
            trials.append(_try(steps, wanted, options, scale, profile, coding))
        tick()
    worked = best_first(trials)
    if not worked:
        raise ValueError(f"nothing works with {budget}: {trials[0].refused if trials else 'none'}")
    best = worked[0]
    assert steps.schedule is not None
    return CachePreset(
        version=1,
        model=name,
        sizes=steps.schedule.sizes,
        policy=best.policy,
        budget=budget,
        kv_dtype=best.kv_dtype,
        trials=tuple(trials),
    )


def _try(
    steps: Steps,
    wanted: list[Tensor],
    options: dict[str, Any],
    softmax_scale: float,
    profile: Profile | None,
    coding: Coding | None,
) -> Trial:
    asked = {"policy": options["policy"], "kv_dtype": options["kv_dtype"]}
    try:
        chosen = CacheOptions(**options, profile=profile, coding=coding)
        plan, outputs = attend_all(steps, chosen, softmax_scale)
    except (ValueError, WillNeverFit) as error:
        return Trial(**asked, tokens=0, page_bytes=0, attention_error=None, refused=str(error))
    return Trial(
        **asked,
        tokens=int(plan.tokens.max()),
        page_bytes=plan.page_bytes,
        attention_error=attention_error(outputs, wanted),
    )
