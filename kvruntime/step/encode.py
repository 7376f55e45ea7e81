"""Tokens as records and back, in whichever format a step stores them."""

from __future__ import annotations

from torch import Tensor

from kvruntime.planning.shapes import Kind
from kvruntime.step.prepare import Prepared
from kvruntime.storage.layout import CodedFormat
from kvruntime.storage.records import dequantize, quantize


def encode(step: Prepared, part: int, tokens: Tensor) -> Tensor:
    """Records [rows, n, words], in "encoded", of tokens [rows, n, head_dim], head by head, which
    the step writes. part: KEYS or VALUES (storage.coding).
    """
    writes, commits = step.shape.writes, step.views.commit
    assert writes is not None
    encoded = commits["encoded"].view(*tokens.shape[:2], -1)
    if isinstance(writes, CodedFormat):
        return step.transform(part).encode(tokens, _lengths(step), writes, encoded, commits)
    quantize(tokens.flatten(0, 1), writes, commits["encoded"], commits)
    return encoded


def read_back(step: Prepared, part: int, out: Tensor) -> None:
    """What "encoded" holds as float32 tokens [rows, n, head_dim]."""
    writes, commits = step.shape.writes, step.views.commit
    assert writes is not None
    encoded = commits["encoded"].view(*out.shape[:2], -1)
    if isinstance(writes, CodedFormat):
        step.transform(part).decode(encoded, _lengths(step), writes, out, commits)
    else:
        dequantize(encoded.flatten(0, 1)[None], writes, out.flatten(0, 1)[None], commits)


def _lengths(step: Prepared) -> tuple[int, ...]:
    """Tokens that each head writes."""
    if step.shape.kind is Kind.SHIFT:
        added = step.shape.sources - step.shape.moved
        return (added,) * step.shape.heads
    return tuple(step.after.tolist())
