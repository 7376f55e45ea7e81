"""One point of the frontier: the bundled model's pictures with one policy, format and share of the
bytes, beside those of its own cache. Runs in a process of its own, on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

import kvruntime
from kvruntime.catalogue import VAR_256, find_model
from kvruntime.coding import Coding
from kvruntime.quality import kl_of_tokens, psnr_db
from kvruntime.reference import EmojiVAR, load_classes, load_model
from kvruntime.reference.transformer import SelfAttention
from kvruntime.tuning import Steps, attend_all, attention_error
from policies import TORCH_DTYPES

BATCH = 20  # pictures at a time
STEP_PICTURES = 4  # whose queries, keys and values are kept, for the error of attention
REFERENCE = "reference.safetensors"


@dataclass(frozen=True, slots=True)
class Point:
    """A way to cache. share: of the bytes of the whole history in bfloat16."""

    policy: str
    kv_dtype: str | None
    share: str

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.kv_dtype or 'exact'}-{self.share.rstrip('%')}"


def evaluation_labels(pictures: int) -> Tensor:
    """Labels [pictures]: the classes of odd number in turn. Calibration draws the even ones."""
    return 2 * (torch.arange(pictures) % (len(load_classes()) // 2)) + 1


def batches(pictures: int, seed: int) -> Iterator[tuple[slice, Tensor, int]]:
    """Which pictures, their labels, and the seed of the first."""
    labels = evaluation_labels(pictures)
    for start in range(0, pictures, BATCH):
        part = slice(start, min(start + BATCH, pictures))
        yield part, labels[part], seed + start


def make_reference(folder: Path, pictures: int, seed: int, dtype: str) -> None:
    """Draw on the model's own cache and keep what points are compared with."""
    model = load_model(TORCH_DTYPES[dtype])
    drawn, codes, logs = [], [], []
    steps: dict[str, Tensor] = {}
    for _, labels, first in batches(pictures, seed):
        batch_codes, batch_drawn = model.generate_codes(labels, first)
        drawn.append(batch_drawn.float())
        codes.append(torch.cat(batch_codes, 1))
        logs.append(torch.cat(model.teacher_forced(labels, batch_codes), 1))
    some = min(STEP_PICTURES, pictures)
    with _recorded(steps):
        model.teacher_forced(evaluation_labels(some), _by_scale(codes[0][:some]))
    tensors = {"drawn": torch.cat(drawn), "codes": torch.cat(codes), "logs": torch.cat(logs)}
    save_file(tensors | steps, folder / REFERENCE)


@contextmanager
def _recorded(steps: dict[str, Tensor]) -> Iterator[None]:
    """Queries, keys and values of every step meanwhile, [3, rows, tokens, heads, head_dim], by
    number in the order of layers within scales.
    """
    project = SelfAttention.project

    def record(self: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = project(self, x)
        steps[f"step{len(steps)}"] = torch.stack(out)
        return out

    with patch.object(SelfAttention, "project", record):
        yield


def _by_scale(tokens: Tensor) -> list[Tensor]:
    return list(torch.split(tokens, list(VAR_256.tokens), dim=1))


def draw(point: Point, folder: Path, pictures: int, seed: int, dtype: str) -> dict[str, Any]:
    """Figures of each picture, and of the point. What the policy refuses is said in "refused"."""
    torch.set_num_threads(1)
    reference, model = load_file(folder / REFERENCE), load_model(TORCH_DTYPES[dtype])
    found: dict[str, list[float]] = {"psnr": [], "ssim": [], "kl": []}
    seconds = 0.0
    with ExitStack() as stack:
        try:
            attached = stack.enter_context(kvruntime.attach(model, **_options(point, dtype)))
        except (ValueError, kvruntime.WillNeverFit) as error:
            return asdict(point) | {"refused": str(error)}
        for part, labels, first in batches(pictures, seed):
            began = time.perf_counter()
            drawn = model.generate_codes(labels, first)[1].float()
            seconds += time.perf_counter() - began
            stats = attached.stats
            own = reference["drawn"][part]
            found["psnr"] += psnr_db(drawn, own).tolist()
            found["ssim"] += structural_similarity_index_measure(
                drawn, own, data_range=1.0, reduction="none"
            ).tolist()
            found["kl"] += _divergence(model, labels, reference, part).tolist()
    held = stats.page_bytes * stats.peak_pages / stats.planned_pages
    return asdict(point) | {
        "bytes_share": held / stats.history_bytes * _counted(point, dtype),
        "tokens": stats.budget_tokens,
        "page_size": stats.page_size,
        "kv_start": stats.kv_start,
        "seconds_per_picture": seconds / pictures,
        "attention_error": _attention_error(point, reference, dtype, model.coding),
        **found,
    }


def _options(point: Point, dtype: str) -> dict[str, Any]:
    """Policy, budget and pages for a model that computes in ``dtype``. In float32 records get half
    the share, which are as many bytes, and exact pages the tokens that they would hold in bfloat16.
    """
    options: dict[str, Any] = {
        "policy": point.policy,
        "budget": point.share,
        "kv_dtype": point.kv_dtype,
    }
    if dtype == "bfloat16":
        return options
    if point.kv_dtype is not None:
        return options | {"budget": f"{float(point.share.rstrip('%')) / 2}%"}
    known = find_model("emoji64").with_dtypes("bfloat16", "bfloat16")
    plan = kvruntime.plan(known, 1, point.policy, point.share)
    return options | {"budget": plan.budget_tokens, "page_size": plan.page_size}


def _counted(point: Point, dtype: str) -> float:
    """Bytes of the history in ``dtype`` over those that pages are measured by (``_options``)."""
    return 2.0 if dtype == "float32" and point.kv_dtype is not None else 1.0


def _divergence(
    model: EmojiVAR, labels: Tensor, reference: dict[str, Tensor], part: slice
) -> Tensor:
    """KL(own cache || this one) in nats, mean over the tokens of each picture, [pictures], while
    both are fed the same codes.
    """
    ours = torch.cat(model.teacher_forced(labels, _by_scale(reference["codes"][part])), 1)
    return kl_of_tokens(ours, reference["logs"][part]).mean(-1)


def _attention_error(
    point: Point, reference: dict[str, Tensor], dtype: str, coding: Coding | None
) -> float:
    """How far attention is from that over the whole history where both get the queries, keys and
    values of the model's own cache (kvruntime.tuning).
    """
    layers = sum(name.startswith("step") for name in reference) // len(VAR_256)
    steps = Steps(VAR_256)
    for number in range(len(VAR_256) * layers):
        q, k, v = reference[f"step{number}"]
        steps.parts[divmod(number, layers)] = q, k, v
    ours, whole = (
        attend_all(steps, kvruntime.CacheOptions(**options, coding=coding), 1.0)[1]
        for options in (_options(point, dtype), {"policy": "full", "budget": 1.0})
    )
    return attention_error(ours, whole)
