"""The memory that steps work in, made once and lent region by region."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvruntime.planning.regions import StepRegions
from kvruntime.planning.shapes import StepShape
from policies import TORCH_DTYPES, Region, held_bytes


@dataclass(frozen=True, slots=True)
class StepViews:
    """Tensors of a step by phase and name."""

    base: dict[str, Tensor]
    kept: dict[str, Tensor]
    read: dict[str, Tensor]
    select: dict[str, Tensor]
    commit: dict[str, Tensor]


class Workspace:
    """``num_bytes`` on a device. A step's views are made once for each shape of a step.

    Phases share their bytes: what one phase leaves in its regions the next one overwrites.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # it outlives a caller's inference_mode
            self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._views: dict[StepShape, StepViews] = {}

    def views(self, shape: StepShape, regions: StepRegions) -> StepViews:
        """The regions of a step as tensors."""
        if shape not in self._views:
            kept_at = held_bytes(regions.base)
            start = kept_at + held_bytes(regions.kept)
            with torch.inference_mode(False):
                self._views[shape] = StepViews(
                    base=self._carve(regions.base, 0),
                    kept=self._carve(regions.kept, kept_at),
                    read=self._carve(regions.read, start),
                    select=self._carve(regions.select, start),
                    commit=self._carve(regions.commit, start),
                )
        return self._views[shape]

    def _carve(self, regions: Iterable[Region], start: int) -> dict[str, Tensor]:
        tensors = {}
        for region in regions:
            if region.by_torch:
                continue
            dtype = TORCH_DTYPES[region.dtype]
            part = self.memory[start : start + region.num_bytes].view(dtype)
            count = int(torch.Size(region.shape).numel())
            tensors[region.name] = part[:count].view(region.shape)
            start += region.num_bytes
        return tensors


class Workspaces:
    """Workspaces of one cache: as many as steps run at the same time, in threads of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle: list[Workspace] = []

    def borrow(self, num_bytes: int) -> Workspace:
        """One of at least so many bytes, for one step."""
        try:
            workspace = self._idle.pop()
        except IndexError:
            return Workspace(num_bytes, self._device)
        if workspace.memory.numel() < num_bytes:
            del workspace  # before the new one comes
            return Workspace(num_bytes, self._device)
        return workspace

    def give_back(self, workspace: Workspace) -> None:
        self._idle.append(workspace)

    def clear(self) -> None:
        self._idle.clear()

    @property
    def tensors(self) -> list[Tensor]:
        """What is held from one step to the next."""
        return [workspace.memory for workspace in self._idle]
