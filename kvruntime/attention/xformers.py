"""xformers' memory-efficient attention: its paged Triton kernel over the pool's pages.

A lane is a row of the kernel's batch with one head.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

from kvruntime.attention.base import TESTED_VERSIONS, Lanes, last_line
from kvruntime.attention.operators import (
    BLOCKS,
    IS_INTERPRETED,
    Tile,
    attend_with_lse,
    block_of,
    fmha,
    operator_for_gathered,
    paged_bias,
    paged_operator,
    spread,
    with_bias,
)
from kvruntime.attention.sdpa import SDPA
from kvruntime.planning.demand import Plan
from kvruntime.storage.layout import RecordFormat, Records
from kvruntime.storage.pages import Pages, flat
from kvruntime.storage.records import quantize

_LEAST_GROUP = 16  # numbers of a group: less is too short for a matrix product on the device
_MOST_SLOTS = 2**31  # the kernel numbers slots in int32


class XFormers:
    """Reads pages where a scale has few queries or heads differ in length, else gathers.

    Split-K is made for few queries: each block of 16 to 128 of them reads all pages of its lane
    again. With many, one gather and flash attention read less: xformers' operators, or torch's
    where xformers has none that runs.
    """

    name = "xformers"

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        paged_queries: int,
        tile: Tile | None = None,
    ) -> None:
        self._paged_queries, self._tile = paged_queries, tile
        self._gathered_op = operator_for_gathered(device, dtype, head_dim, None)
        bias = spread(torch.zeros(1, 1, 1, 16, dtype=dtype, device=device), 1, 16)
        self._biased_op = operator_for_gathered(device, dtype, head_dim, bias)

    @property
    def gathered_operator(self) -> str:
        """What attends to gathered tokens, by xformers' name of it if it is xformers'."""
        return SDPA.name if self._gathered_op is None else str(self._gathered_op.NAME)

    def reads_pages(self, pages: Pages, num_queries: int, is_ragged: bool) -> bool:
        num_pages, page_size, width = pages.keys.shape
        apart = pages.keys.stride(1) * pages.keys.element_size()
        head_dim, records = width, pages.records
        if isinstance(records, RecordFormat):
            head_dim = (width - records.groups) * 32 // records.bits
        if unreadable(page_size, apart, head_dim, records):
            return False
        if num_pages * page_size >= _MOST_SLOTS:
            return False
        return is_ragged or num_queries <= self._paged_queries

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, softmax_scale: float
    ) -> Tensor:
        op, added = (self._gathered_op if bias is None else self._biased_op), None
        if op is None:
            return SDPA().attend(q, keys, values, bias, softmax_scale)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        if bias is not None:
            added = spread(bias.to(q.dtype), q.shape[0], q.shape[1])
        with _on_device_of(q):
            out: Tensor = fmha.memory_efficient_attention_forward(
                q, k, v, added, scale=softmax_scale, op=op
            )
        return out

    def attend_pages(
        self, q: Tensor, k: Tensor, v: Tensor, cached: Lanes, softmax_scale: float
    ) -> Tensor:
        rows, n, heads, head_dim = q.shape
        pages = cached.pages
        groups = pages.records.groups if isinstance(pages.records, RecordFormat) else 1
        op = paged_operator(block_of(pages.page_size), groups, cached.weighted, self._tile)
        if cached.weighted:
            op = with_bias(op, _page_bias(cached))
        bias = paged_bias(n, cached.tables, cached.lengths, cached.longest, pages.page_size)
        queries = q.transpose(1, 2).reshape(1, -1, 1, head_dim)
        k_pages, v_pages = (
            flat(part).view(1, -1, 1, part.shape[2]) for part in (pages.keys, pages.values)
        )
        with _on_device_of(q):
            old, old_lse = fmha.memory_efficient_attention_partial(
                queries, k_pages, v_pages, bias, scale=softmax_scale, op=op
            )
            fresh, fresh_lse = attend_with_lse(q, k, v, softmax_scale)
        old_lse = old_lse.view(rows, heads, n)
        share = torch.sigmoid(fresh_lse - old_lse).float().unsqueeze(-1)
        fresh = fresh.transpose(1, 2).to(old.dtype)
        out = torch.lerp(old.view(rows, heads, n, head_dim), fresh, share)
        return out.transpose(1, 2).to(q.dtype)


def _page_bias(cached: Lanes) -> Tensor:
    """Log weights of the lanes in the order of their tables, float32 [lanes, width * page_size]."""
    planes = cached.pages.planes
    assert planes is not None
    log_weights = planes[:, : cached.pages.page_size, 0]  # the first of PLANES
    return log_weights[cached.tables].flatten(1).float()


def unreadable(page_size: int, token_bytes: int, head_dim: int, records: Records | None) -> str:
    """Why the kernel cannot read pages of such a format; empty if it can. token_bytes: from one
    token to the next.
    """
    if page_size % BLOCKS[-1]:
        return f"pages of {page_size} tokens, not a multiple of {BLOCKS[-1]}"
    if records is None:
        return "" if token_bytes % 16 == 0 else f"tokens {token_bytes} bytes apart"
    if not isinstance(records, RecordFormat) or records.bits != 4:
        return f"{records.name} pages"
    group = head_dim // records.groups
    return "" if group >= _LEAST_GROUP else f"groups of {group} values, at least {_LEAST_GROUP}"


def reasons_against(device: torch.device, dtype: torch.dtype, plan: Plan) -> list[str]:
    """Why the operators cannot run such a plan, in their own words; empty if they can."""
    head_dim = plan.geometry.head_dim
    lanes = torch.empty(1, 16, 1, head_dim, dtype=dtype, device=device)
    ints = torch.zeros(1, 1, dtype=torch.int64, device=device)
    bias = paged_bias(16, ints, ints[0], 16, 16)
    inputs = fmha.Inputs(lanes, lanes, lanes, bias, scale=1.0, is_partial=True)
    reasons: list[str] = list(paged_operator(16, 1).not_supported_reasons(inputs))
    if not reasons:
        reasons += _broken(device, dtype, head_dim, plan.records)
    return reasons


def operators(device: torch.device) -> dict[str, list[str]]:
    """Every forward operator, and why it cannot attend to gathered bfloat16 tokens, or to pages,
    on the device; empty if it can.
    """
    tokens = torch.empty(1, 16, 1, 128, dtype=torch.bfloat16, device=device)
    ints = torch.zeros(1, 1, dtype=torch.int64, device=device)
    gathered = fmha.Inputs(tokens, tokens, tokens, None, scale=1.0)
    bias = paged_bias(16, ints, ints[0], 16, 16)
    paged = fmha.Inputs(tokens, tokens, tokens, bias, scale=1.0, is_partial=True)
    found = {}
    for name in ("flash3", "flash", "cutlass", "cutlass_blackwell", "ck", "triton_splitk"):
        module = getattr(fmha, name, None)
        if module is not None:
            found[f"{module.FwOp.NAME}, gathered"] = module.FwOp.not_supported_reasons(gathered)
    found["triton_splitK, pages"] = paged_operator(16, 1).not_supported_reasons(paged)
    return found


@functools.cache
def _broken(
    device: torch.device, dtype: torch.dtype, head_dim: int, records: Records | None
) -> list[str]:
    """What goes wrong when the kernels run once on next to nothing: a version of triton that does
    not fit is known by its compiler, not by its number.
    """
    tokens = torch.zeros(1, 16, 1, head_dim, dtype=dtype, device=device)
    ints = torch.zeros(1, 1, dtype=torch.int64, device=device)
    kinds = [Pages(tokens[:, :, 0], tokens[:, :, 0], None, None)]
    if isinstance(records, RecordFormat) and not unreadable(16, 0, head_dim, records):
        stored = quantize(tokens[0, :, 0], records).unsqueeze(0)
        kinds.append(Pages(stored, stored, None, records))
    try:
        backend = XFormers(device, dtype, head_dim, 16)
        for pages in kinds:
            backend.attend_pages(tokens, tokens, tokens, Lanes(pages, ints, ints[0], 16), 1.0)
        backend.attend(tokens, tokens.transpose(1, 2), tokens.transpose(1, 2), None, 1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # the compiler's own kinds, and whatever a missing name raises
        what = f"{type(error).__name__}: {last_line(str(error))}"
        return [f"its kernels fail with triton {triton.__version__} ({what}); {TESTED_VERSIONS}"]
    return []


def _on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


__all__ = ["IS_INTERPRETED", "XFormers", "operators", "reasons_against", "unreadable"]
