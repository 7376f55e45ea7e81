"""What an attention back end promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvruntime.storage.pages import Pages

TESTED_VERSIONS = "tested with xformers 0.0.35 and triton 3.7.1: pip install 'kvruntime[xformers]'"


@dataclass(frozen=True, slots=True, eq=False)
class Lanes:
    """What some lanes hold: of the pages that int64 tables [lanes, width] name, in order, the first
    ``lengths`` tokens, int64 [lanes]; at most ``longest``. weighted: their log weights lie beside
    them and are added to their logits.
    """

    pages: Pages
    tables: Tensor
    lengths: Tensor
    longest: int
    weighted: bool = False


class Backend(Protocol):
    """Attention of all queries to all keys of their lane; no gradients."""

    name: str

    def reads_pages(self, pages: Pages, num_queries: int, is_ragged: bool) -> bool:
        """Whether a step goes to ``attend_pages``; else tokens are gathered for ``attend``."""
        ...

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, softmax_scale: float
    ) -> Tensor:
        """Attention of q [rows, n, heads, head_dim] to keys and values [rows, heads, tokens,
        head_dim].

        bias: float32 [rows or 1, heads, 1, tokens] added to the logits, or None. It is never
        spread out to all queries. Returns [rows, n, heads, head_dim].
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
