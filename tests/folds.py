"""What a fold stores, in float64: fitted to what queries see, and how far rounding may be off."""

import torch

from kvruntime.storage.layout import CodedFormat
from tests.codecs import coded


def evenly_spread(count, among):
    count = min(count, among)
    return [int((i + 0.5) * among / count) for i in range(count)]


def fit(queries, tokens, bias, members, log_counts, values, keys):
    """Log weights and values for centroids ``keys`` such that the queries see what they saw: the
    definition in kvruntime.step.refit in float64, its ridge solved for the values.
    """
    seen = (queries @ tokens[0].t() + bias).softmax(-1)
    normaliser = (queries @ tokens[0].t() + bias).logsumexp(-1, keepdim=True)
    masses = torch.stack([seen[:, mine].sum() for mine in members]).clamp(min=1e-30)
    logits, moved = queries @ keys.t(), torch.zeros_like(log_counts)
    for _ in range(2):
        got = (logits - normaliser + log_counts + moved).exp().sum(0).clamp(min=1e-30)
        moved = (moved + (masses / got).log()).clamp(-1, 1)
    weights = (logits + log_counts + moved).softmax(-1)
    ridge = 0.03 * weights.square().sum(0).mean()
    normal = weights.t() @ weights + ridge * torch.eye(keys.shape[0], dtype=torch.float64)
    gap = seen @ tokens[1] - weights @ values
    return values + torch.linalg.solve(normal, weights.t() @ gap), log_counts + moved


def rounding_bounds(tokens, records, dtype, transforms=None, error=1e-5):
    bounds = error * (1 + tokens.abs())
    if isinstance(records, CodedFormat):
        stored, slack = coded(tokens, records, transforms, bounds)
        bounds = bounds + (stored - tokens).abs() + slack
    elif records is not None:
        grouped = tokens.unflatten(-1, (records.groups, -1))
        step = (grouped.amax(-1) - grouped.amin(-1)) / (2**records.bits - 1)
        rounding = 2.0**-11 * (grouped.abs().amax(-1) + 2**records.bits * step)
        bounds = bounds + (0.501 * step + rounding).unsqueeze(-1).expand_as(grouped).flatten(-2)
    return bounds + torch.finfo(dtype).eps * (tokens.abs() + bounds)
