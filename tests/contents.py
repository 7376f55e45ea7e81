"""What pages hold and attention gives, against the dense copies of lanes."""

import numpy as np
import torch

from kvruntime.storage.layout import CodedFormat
from kvruntime.storage.records import dequantize
from tests.codecs import lend_scratch
from tests.lanes import Lane, as_fitted
from tests.support import dense_attention


def check_attention(dense, q, out, tolerance, where, attended=None):
    """``out`` is attention over all that the lanes hold, or over ``attended(row, head)`` of it."""
    for r, row in enumerate(dense.lanes):
        for h, lane in enumerate(row):
            if attended is not None:
                lane = lane.take(attended(r, h))
            names, bias = dense.plan.planes, None
            if "log_weight" in names:
                bias = lane.planes[:, names.index("log_weight")]
            wanted = dense_attention(q[r, :, h], *lane.tokens, dense.case.softmax_scale, bias)
            error = (out[r, :, h].double() - wanted).abs().max()
            assert error < tolerance, f"{where}: {error}"


def stored(generation, scale, layer, row, head):
    """A lane's tokens [2, n, head_dim] and planes [n, planes], as its pages hold them."""
    plan, table = generation.plan, generation._tables[layer]
    pages = generation._runner.pages(scale, layer)
    length, count = int(table.lengths[row, head]), int(table.num_pages[row, head])
    ids = torch.from_numpy(table.pages[row, head, :count].astype(np.int64))
    held = torch.stack(
        [part.cpu()[ids].flatten(0, 1)[:length] for part in (pages.keys, pages.values)]
    )
    if pages.records is not None:
        dtype = getattr(torch, plan.geometry.key_dtype)
        numbers = torch.empty(2, length, plan.geometry.head_dim, dtype=dtype)
        if isinstance(pages.records, CodedFormat):
            scratch = lend_scratch(numbers, (1,))
            for transform, words, into in zip(
                generation._runner.coding.layer(layer, held.device), held, numbers, strict=True
            ):
                mine = transform.of(slice(head, head + 1))
                mine.decode(words[None], (length,), pages.records, into[None], scratch)
        else:
            dequantize(held, pages.records, numbers)
        held = numbers
    planes = torch.zeros(length, 0)
    if pages.planes is not None:
        planes = pages.planes.cpu()[ids][:, : pages.page_size].flatten(0, 1)[:length]
    return held, planes.double()


def check_contents(generation, scale, layer, dense):
    """Every lane holds what it should: bit for bit, and in any order where token numbers decide;
    means, which are rounded on their way, within their bounds. Those are what counts from now on.
    """
    in_order = dense.case.policy.needs.content

    def same(r, h, lane):
        held, planes = stored(generation, scale, layer, r, h)
        if lane.bounds is not None and not in_order and lane.numbers.numel():
            lane = lane.take(torch.cdist(held[0].double(), lane.tokens[0].double()).argmin(1))
            assert lane.numbers.unique().numel() == lane.numbers.numel()
        elif not in_order:
            flat, wanted = (
                torch.cat((*part, numbers), 1).tolist()
                for part, numbers in ((held.double(), planes), (lane.tokens.double(), lane.planes))
            )
            assert sorted(flat) == sorted(wanted)
            return lane
        if lane.fitted is not None:
            records = dense.plan.format_after(scale, layer).records
            lane = as_fitted(
                lane, held[0].double(), dense.plan, records, dense.transforms(layer, h)
            )
        if lane.bounds is None:
            assert torch.equal(held, lane.tokens)
        else:
            assert ((held.double() - lane.tokens).abs() <= lane.bounds).all()
        assert ((planes - lane.planes).abs() <= 1e-3 * (1 + lane.planes.abs())).all()
        return Lane(held, planes, lane.numbers)

    dense.change(same)
