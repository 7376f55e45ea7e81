"""The authors' code from a checkout of their repository, and their weights from a folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kvruntime.models.stand_ins import STAND_INS, standing_in


@dataclass(frozen=True, slots=True)
class Wanted:
    """What ``build`` was asked for: its arguments, checked."""

    name: str
    repo: Path
    weights: Path | None
    device: torch.device
    dtype: torch.dtype
    stand_ins: bool
    depth: int | None
    text_encoder: Path | None


@dataclass(frozen=True, slots=True)
class Built:
    """A model that draws.

    model: for ``attach``. vae: decodes its codes. draw(pictures, seed, **settings): pictures
    [pictures, 3, height, width] in [0, 1], with the published settings unless told otherwise.
    prompted(prompts): settings of a draw of them, one for each picture. check_prompts(prompts):
    raises ValueError or ImportError where any of them cannot be drawn.
    """

    model: nn.Module
    vae: nn.Module
    draw: Callable[..., Tensor]
    prompted: Callable[[Sequence[str]], dict[str, Any]]
    check_prompts: Callable[[Sequence[str]], object]


def import_from(wanted: Wanted, name: str, marker: str) -> ModuleType:
    """A module of the checkout. marker: a file that tells that it is one.

    Raises FileNotFoundError for what is no checkout, and ImportError that names what its code
    imports and is not installed, or a package of the same name that is imported already.
    """
    repo = wanted.repo
    if not (repo / marker).is_file():
        raise FileNotFoundError(f"{repo} is no checkout: it has no {marker}")
    root = name.split(".")[0]
    loaded = sys.modules.get(root)
    where = getattr(loaded, "__file__", None)
    if where and repo.resolve() not in Path(where).resolve().parents:
        raise ImportError(
            f"{marker} imports its own package {root!r} and {where} is loaded under that name: "
            "build the model in a process of its own"
        )
    sys.path.insert(0, str(repo))
    try:
        with standing_in() if wanted.stand_ins else nullcontext():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        for part in [part for part in sys.modules if part.split(".")[0] == root]:
            del sys.modules[part]  # half imported
        lacks = (error.name or "?").split(".")[0]
        advice = (
            f"or build(..., stand_ins=True), where {STAND_INS[lacks]}"
            if lacks in STAND_INS
            else "nothing stands in for it"
        )
        raise ImportError(
            f"the code in {repo} imports {lacks}, which is not installed: pip install "
            f"{lacks.replace('_', '-')}, {advice}"
        ) from error
    finally:
        sys.path.remove(str(repo))


def autocast(wanted: Wanted) -> AbstractContextManager[object]:
    """What the model draws in."""
    if wanted.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(wanted.device.type, wanted.dtype)


def find_weights(folder: Path, name: str, where: str) -> Path:
    """A file or folder of weights. Raises FileNotFoundError that says who publishes it."""
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: its authors publish it at {where}")
    return path


def read_weights(path: Path) -> Mapping[str, Any]:
    """A state dict, mapped from the file; code in it is refused."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # type: ignore[no-any-return]


def load_into(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError that names what the file lacks."""
    missing, _ = model.load_state_dict(state, strict=False)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors of the model, {missing[0]} first")
