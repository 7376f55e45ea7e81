"""How far folders of pictures are from one another, by torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvruntime.extras import extra
from kvruntime.quality import mean_interval, psnr_db

with extra("cli"):
    from PIL import Image
    from torchmetrics.functional.image import structural_similarity_index_measure

_LEAST_SIDE = 11  # of the window of SSIM


def read_picture(path: Path) -> Tensor:
    """[3, height, width] in [0, 1]. Raises ValueError for what is no picture."""
    try:
        with Image.open(path) as picture:
            levels = np.asarray(picture.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {error}") from None
    return torch.from_numpy(levels.copy()).permute(2, 0, 1).float() / 255


def names_in(reference: Path, others: Sequence[Path]) -> list[str]:
    """Names of the PNGs of a folder, which all the others have too. Raises ValueError where one
    lacks some.
    """
    names = sorted(path.name for path in reference.glob("*.png"))
    if not names:
        raise ValueError(f"{reference} has no PNGs")
    for other in others:
        missing = [name for name in names if not (other / name).is_file()]
        if missing:
            raise ValueError(f"{other} lacks {len(missing)} of {len(names)}: {missing[0]} first")
    return names


def compare(
    reference: Path, other: Path, names: Sequence[str], tick: Callable[[], object]
) -> dict[str, list[float]]:
    """PSNR, dB, and SSIM of each picture; PSNR is infinite for equal ones. Raises ValueError for
    pictures of different size.
    """
    found: dict[str, list[float]] = {"psnr_db": [], "ssim": []}
    for name in names:
        theirs, ours = (read_picture(folder / name)[None] for folder in (reference, other))
        if theirs.shape != ours.shape:
            sizes = " and ".join(str(tuple(one.shape[-2:])) for one in (theirs, ours))
            raise ValueError(f"{name} is {sizes} pixels high and wide")
        if min(ours.shape[-2:]) < _LEAST_SIDE:
            raise ValueError(f"{name}: SSIM needs {_LEAST_SIDE} pixels to either side")
        found["psnr_db"].append(float(psnr_db(ours, theirs)))
        found["ssim"].append(_ssim(ours, theirs))
        tick()
    return found


def _ssim(ours: Tensor, theirs: Tensor) -> float:
    similarity = structural_similarity_index_measure(ours, theirs, data_range=1.0)
    assert isinstance(similarity, Tensor)
    return float(similarity)


def lpips_and_fid(
    reference: Path, other: Path, names: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Those of the two that can be computed here, and for the others what is missing: they need
    networks that torchmetrics gets from torchvision and torch-fidelity.
    """
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, metric in (("lpips", _lpips), ("fid", _fid)):
        try:
            values[name] = metric(reference, other, names)
        except (ImportError, OSError) as error:  # not installed, or its weights are not there
            missing[name] = f"pip install 'torchmetrics[image]', which downloads weights: {error}"
    return values, missing


def _lpips(reference: Path, other: Path, names: Sequence[str]) -> float:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    for name in names:
        metric.update(*(read_picture(folder / name)[None] for folder in (other, reference)))
    return float(metric.compute())


def _fid(reference: Path, other: Path, names: Sequence[str]) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(normalize=True)
    for folder, is_real in ((reference, True), (other, False)):
        for name in names:
            metric.update(read_picture(folder / name)[None], real=is_real)
    return float(metric.compute())


def _of_finite(values: Sequence[float]) -> dict[str, float | None]:
    return mean_interval([value for value in values if math.isfinite(value)])


def evaluate(
    reference: Path, others: Sequence[Path], tick: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Every folder beside the reference, picture by picture, and beside the first of the others,
    paired. Raises ValueError for folders that do not go together.
    """
    names = names_in(reference, others)
    folders = []
    first: dict[str, list[float]] = {}
    for other in others:
        found = compare(reference, other, names, tick)
        values, missing = lpips_and_fid(reference, other, names)
        first = first or found
        paired = {
            name: _of_finite([a - b for a, b in zip(found[name], first[name], strict=True)])
            for name in found
        }
        folders.append(
            {
                "folder": str(other),
                **{name: _of_finite(each) for name, each in found.items()},
                **values,
                "missing": missing,
                "identical": sum(math.isinf(value) for value in found["psnr_db"]),
                "paired_with_first": paired,
                "per_picture": {
                    name: [value if math.isfinite(value) else None for value in each]
                    for name, each in found.items()
                },
            }
        )
    return {"reference": str(reference), "pictures": names, "folders": folders}
