"""How far two sets of pictures, or two models' predictions, are apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from kvruntime.extras import extra

with extra("cli"):
    from torchmetrics.functional.image import peak_signal_noise_ratio


def psnr_db(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture [pictures], dB; infinite for equal ones. Values in
    [0, 1].
    """
    return torch.stack(
        [
            peak_signal_noise_ratio(ours, theirs, data_range=1.0)
            for ours, theirs in zip(pictures, reference, strict=True)
        ]
    )


def kl_of_tokens(logs: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || ours) of each token, nats, from log-probabilities [..., tokens, codes]."""
    return (reference.exp() * (reference - logs)).sum(-1)


def kl_nats(logs: list[Tensor], reference: list[Tensor]) -> float:
    """Mean over all tokens of KL(reference || ours), from log-probabilities per scale [..., tokens,
    codes].
    """
    total = sum(
        float(kl_of_tokens(ours, theirs).sum())
        for ours, theirs in zip(logs, reference, strict=True)
    )
    return total / sum(part[..., 0].numel() for part in reference)


def mean_interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and its 95 % interval, from the standard error; None where there are too few."""
    if len(values) < 2:
        return {"mean": values[0] if values else None, "low": None, "high": None}
    mean, half = statistics.fmean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}
