"""Makes a record of what an attached model draws."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kvruntime.adapters import Attachment
from kvruntime.device import versions
from kvruntime.errors import ScheduleError
from kvruntime.extras import extra
from kvruntime.generation import Generation
from kvruntime.origin import provenance
from kvruntime.planning import Plan
from kvruntime.planning.baseline import history_bytes
from kvruntime.report.record import Bytes, Curves, Layer, Picture, Run
from policies import AMSKV, CacheGeometry, ScaleKV

with extra("cli"):
    from PIL import Image

_LAYERS_SHOWN = 8
_LARGEST_SIDE = 512  # pixels of a picture in a record; larger ones are made smaller
_JPEG_FROM = 192  # a side from which PNGs get too large for a page


class Capture:
    """Watches an attachment's first generation from now on.

    ``layers`` holds what layers store before the last scale, if the cache remembers where tokens
    come from (``attach(..., provenance=True)``).
    """

    def __init__(self, attached: Attachment) -> None:
        self._attached = attached
        self._generation: Generation | None = None
        self.layers: list[Layer] = []
        attached.on_scale(self._look)

    def _look(self, generation: Generation) -> None:
        if self._generation is None:
            self._generation = generation
        plan = generation.plan
        if generation.scale != len(plan.schedule) - 1:
            return
        self._attached.on_scale(None)
        if "column" in plan.planes:
            count = min(_LAYERS_SHOWN, plan.geometry.layers)
            chosen = np.linspace(0, plan.geometry.layers - 1, count).round().astype(int)
            self.layers = [_layer(generation, int(layer)) for layer in dict.fromkeys(chosen)]

    def record(
        self,
        command: Literal["demo", "sample"],
        model: str,
        budget: int | float | str,
        seconds: float,
        pictures: Sequence[Picture],
        pictures_drawn: int,
        **more: Any,
    ) -> Run:
        """Of that generation. more: ``quality``, ``others`` and ``origin`` of Run. Raises
        ScheduleError where it has not come to its end.
        """
        if self._generation is None or self._generation.scale < len(self._generation.plan.schedule):
            raise ScheduleError("nothing is drawn yet")
        plan, stats = self._generation.plan, self._generation.stats
        each = plan.bytes_per_page + plan.plane_bytes_per_page
        own, geometry = plan.baseline_bytes(), plan.geometry
        exact = CacheGeometry(geometry.layers, geometry.heads, geometry.head_dim)
        history = history_bytes(exact, plan.schedule, plan.rows)
        return Run(
            command=command,
            model=model,
            dtype=geometry.key_dtype,
            sizes=[list(size) for size in plan.schedule.sizes],
            layers=geometry.layers,
            heads=geometry.heads,
            head_dim=geometry.head_dim,
            rows=plan.rows,
            pictures_drawn=pictures_drawn,
            policy=stats.policy,
            budget=budget,
            budget_tokens=stats.budget_tokens,
            history_tokens=plan.schedule.history,
            history_share=plan.page_bytes / history,
            kv_dtype=stats.kv_dtype,
            kv_start=stats.kv_start,
            page_size=stats.page_size,
            backend=stats.backend,
            backend_reason=stats.backend_reason,
            profile=stats.profile,
            roles=roles_of(plan),
            seconds=seconds,
            tokens=plan.tokens.mean(axis=2).round(2).tolist(),
            curves=Curves(
                planned=(each * plan.occupancy.after).ravel().tolist(),
                used=[each * pages for pages in stats.events],
                own=plan.own_curve().ravel().tolist(),
            ),
            bytes=Bytes(
                kept=plan.token_bytes,
                pages=plan.page_bytes,
                planes=plan.plane_bytes,
                workspace=plan.workspace_bytes,
                own=own["all_scales_bytes"],
                own_copying=own["with_cat_copy_bytes"],
            ),
            pictures=list(pictures),
            versions=versions(),
            **{"quality": None, "others": [], "origin": [], **more},
        )


def _layer(generation: Generation, layer: int) -> Layer:
    """What the first head of the first row holds."""
    held = provenance(generation, layer)
    there = ~held.scale[0, 0].isnan()
    parts = {
        name: [round(float(value), 4) for value in getattr(held, name)[0, 0][there]]
        for name in ("scale", "column", "line", "weight")
    }
    return Layer(layer=layer, **parts)


def roles_of(plan: Plan) -> list[list[str]]:
    """What the policy takes each layer for after each scale, [scales][layers]; empty where it has
    no such roles.
    """
    policy, scales = plan.policy, range(len(plan.schedule))
    if isinstance(policy, ScaleKV) and policy.drafters:
        last = len(policy.drafters) - 1
        chosen = [policy.drafters[min(scale + 1, last)] for scale in scales]
        names = ("drafter", "refiner")
    elif isinstance(policy, AMSKV) and policy.demanding:
        chosen, names = [frozenset(policy.demanding) for _ in scales], ("demanding", "efficient")
    else:
        return []
    layers = range(plan.geometry.layers)
    return [[names[layer not in those] for layer in layers] for those in chosen]


def picture_of(title: str, drawn: Tensor, own: Tensor | None = None) -> Picture:
    """Of pictures [3, height, width] in [0, 1], made smaller where they are too large for a page;
    PSNR is of the whole ones.
    """
    psnr, is_equal = None, False
    if own is not None:
        error = float((drawn.double() - own.double()).square().mean())
        is_equal = error == 0
        psnr = None if is_equal else -10 * math.log10(error)
    kind: Literal["png", "jpeg"] = "png" if max(drawn.shape[1:]) < _JPEG_FROM else "jpeg"
    return Picture(
        title=title,
        kind=kind,
        data=_encoded(drawn, kind),
        own=None if own is None else _encoded(own, kind),
        psnr_db=psnr,
        is_equal=is_equal,
    )


def image_of(picture: Tensor) -> Image.Image:
    """Of numbers [3, height, width] in [0, 1]."""
    levels = (255 * picture.float().clamp(0, 1)).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _encoded(picture: Tensor, kind: str) -> str:
    image = image_of(picture)
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    file = io.BytesIO()
    image.save(file, kind, quality=85)
    return base64.b64encode(file.getvalue()).decode()
