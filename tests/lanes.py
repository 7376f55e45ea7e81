"""What lanes should hold, as plain tensors in float64 beside the pages."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from kvruntime.storage.records import dequantize, quantize
from tests.support import dense_attention


@dataclass(frozen=True)
class Lane:
    """tokens: [2, n, head_dim], K and V in the model's number format. log_weights: float64 [n].
    numbers: of the tokens, for policies that choose by them. bounds: how far what is stored may
    lie from ``tokens``, float64, of the same shape; None: not at all. weight_bounds: likewise.
    """

    tokens: torch.Tensor
    log_weights: torch.Tensor
    numbers: torch.Tensor
    bounds: torch.Tensor | None = None
    weight_bounds: torch.Tensor | None = None

    def take(self, places):
        return replace(
            self,
            tokens=self.tokens[:, places],
            log_weights=self.log_weights[places],
            numbers=self.numbers[places],
        )


class Dense:
    """One layer's lanes, kept by the policy's recorded choices."""

    def __init__(self, case):
        self.case = case
        dtype = getattr(torch, case.geometry.key_dtype)
        empty = Lane(
            torch.zeros(2, 0, case.geometry.head_dim, dtype=dtype),
            torch.zeros(0, dtype=torch.float64),
            torch.zeros(0, dtype=torch.int64),
        )
        self.lanes = [[empty] * case.geometry.heads for _ in range(case.rows)]

    @property
    def lengths(self):
        return np.array([lane.numbers.numel() for lane in self.lanes[0]])

    def change(self, function):
        self.lanes = [
            [function(r, h, lane) for h, lane in enumerate(row)] for r, row in enumerate(self.lanes)
        ]

    def add(self, k, v, scale):
        numbers = torch.arange(*self.case.schedule.span(scale))

        def longer(r, h, lane):
            return Lane(
                torch.cat((lane.tokens, torch.stack((k[r, :, h], v[r, :, h]))), 1),
                torch.cat((lane.log_weights, torch.zeros(numbers.numel(), dtype=torch.float64))),
                torch.cat((lane.numbers, numbers)),
            )

        self.change(longer)

    def keep(self, plan, scale, layer, before):
        """Drop or fold what the policy did not choose, and store the rest as the plan says."""
        after, policy = plan.tokens[scale, layer], self.case.policy
        records = plan.records if plan.quantised[scale, layer] else None
        was = plan.was_quantised(scale, layer)
        drops = after.any() and (after < self.lengths).any()
        folds = drops and policy.needs.weights
        if records is not None and not folds:
            self.change(lambda r, h, lane: rounded(lane, records, before[h] if was else 0))
        if not after.any():
            self.change(lambda r, h, lane: lane.take([]))
        elif drops and policy.needs.content:
            self._choose(after, before, records if folds else None, folds)
        elif drops:
            self._choose_by_number(scale, after)
        assert (self.lengths == after).all(), f"scale {scale}, layer {layer}: {self.lengths}"

    def _choose_by_number(self, scale, after):
        """The recorded choice among the very tokens that these lanes hold."""
        mine = [sorted(lane.numbers.tolist()) for lane in self.lanes[0]]

        def is_ours(choice):
            heads = len(choice.keep)
            offered = [sorted(line[line >= 0].tolist()) for line in choice.positions[0]]
            alike = heads == len(mine) or all(numbers == mine[0] for numbers in mine)
            return (
                choice.scale == scale
                and alike
                and (choice.keep == after[:heads]).all()
                and offered == mine[:heads]
            )

        found = [choice for choice in self.case.policy.known if is_ours(choice)]
        assert found, "the policy was not asked about these tokens"
        choice = found[0]

        def kept(r, h, lane):
            head = min(h, len(choice.keep) - 1)
            places = choice.selection.keep[0, head, : after[h]]
            chosen = torch.from_numpy(choice.positions[0, head])[places]
            assert (chosen >= 0).all() and chosen.unique().numel() == after[h]
            return lane.take(torch.isin(lane.numbers, chosen))

        self.change(kept)

    def _choose(self, after, before, records, folds):
        """The recorded choices of this step, by chunk of rows."""
        chosen = self.case.policy.chosen
        assert chosen and all((choice.keep == after).all() for choice in chosen)
        padded = int(before.max())
        assert all(choice.cached == padded for choice in chosen)
        keep = torch.cat([choice.selection.keep for choice in chosen])
        assert keep.shape[0] == self.case.rows, "every row is chosen for once"

        def own(h, places):
            """Places of the padded candidates among a lane's own."""
            short = int(before[h])
            assert not ((places >= short) & (places < padded)).any(), "kept an empty place"
            return torch.where(places >= padded, places - padded + short, places)

        if not folds:
            self.change(lambda r, h, lane: lane.take(own(h, keep[r, h, : after[h]])))
            return
        into = torch.cat([choice.selection.into for choice in chosen])
        values, log_weights = (
            None if parts[0] is None else torch.cat(parts)
            for parts in (
                [choice.selection.values for choice in chosen],
                [choice.selection.log_weights for choice in chosen],
            )
        )

        def folded(r, h, lane):
            count, there = int(after[h]), torch.arange(into.shape[2])
            mine = into[r, h, (there < before[h]) | (there >= padded)]
            fitted = values[r, h, :count] if values is not None else None
            weights = log_weights[r, h, :count].double() if log_weights is not None else None
            places = own(h, keep[r, h, :count])
            return fold(lane, places, mine, fitted, weights, records)

        self.change(folded)


def fold(lane, places, into, fitted, log_weights, records):
    """Count-weighted means in float64, and how far float32 and the storage may be off them."""
    count = places.numel()
    shares = torch.zeros(count, into.numel(), dtype=torch.float64)
    folded = into >= 0
    shares[into[folded], folded.nonzero().flatten()] = lane.log_weights[folded].exp()
    counts = shares.sum(1)
    tokens = torch.einsum("cn,knd->kcd", shares / counts[:, None], lane.tokens.double())
    if fitted is not None:
        tokens[1] = fitted.double()
    log_weights = counts.log() if log_weights is None else log_weights
    bounds = 1e-5 * (1 + tokens.abs())
    if records is not None:
        grouped = tokens.unflatten(-1, (records.groups, -1))
        step = (grouped.amax(-1) - grouped.amin(-1)) / (2**records.bits - 1)
        rounding = 2.0**-11 * (grouped.abs().amax(-1) + 2**records.bits * step)
        bounds = bounds + (0.501 * step + rounding).unsqueeze(-1).expand_as(grouped).flatten(-2)
    bounds = bounds + torch.finfo(lane.tokens.dtype).eps * (tokens.abs() + bounds)
    return Lane(tokens, log_weights, lane.numbers[places], bounds, 1e-3 * (1 + log_weights.abs()))


def rounded(lane, records, first):
    """What is stored now for the first time in this format, from token ``first`` on, loses
    precision; what was stored before does not change again.
    """
    if lane.tokens.shape[1] == first:
        return lane
    new = lane.tokens[:, first:]
    into = torch.empty_like(new)
    words = quantize(new.flatten(0, 1), records).unflatten(0, new.shape[:2])
    dequantize(words, records, into)
    return replace(lane, tokens=torch.cat((lane.tokens[:, :first], into), 1))


def check_attention(dense, q, out, tolerance, where):
    """``out`` is attention over all that the lanes hold."""
    for r, row in enumerate(dense.lanes):
        for h, lane in enumerate(row):
            wanted = dense_attention(
                q[r, :, h], *lane.tokens, dense.case.softmax_scale, lane.log_weights
            )
            error = (out[r, :, h].double() - wanted).abs().max()
            assert error < tolerance, f"{where}: {error}"


def stored(generation, scale, layer, row, head):
    """A lane's tokens [2, n, head_dim] and log weights [n] or None, as its pages hold them."""
    plan, table = generation.plan, generation._tables[layer]
    pages = generation._runner.pages(bool(plan.quantised[scale, layer]))
    length, count = int(table.lengths[row, head]), int(table.num_pages[row, head])
    ids = torch.from_numpy(table.pages[row, head, :count].astype(np.int64))
    held = torch.stack([part[ids].flatten(0, 1)[:length] for part in (pages.keys, pages.values)])
    if pages.records is not None:
        dtype = getattr(torch, plan.geometry.key_dtype)
        numbers = torch.empty(2, length, plan.geometry.head_dim, dtype=dtype)
        dequantize(held, pages.records, numbers)
        held = numbers
    weights = None
    if pages.weights is not None:
        weights = pages.weights[ids][:, : pages.page_size].flatten()[:length]
    return held, weights


def check_contents(generation, scale, layer, dense):
    """Every lane holds what it should: bit for bit, and in any order where token numbers decide;
    means, which are rounded on their way, within their bounds. Those are what counts from now on.
    """
    in_order = dense.case.policy.needs.content

    def same(r, h, lane):
        held, weights = stored(generation, scale, layer, r, h)
        if lane.bounds is None and in_order:
            assert torch.equal(held, lane.tokens)
        elif lane.bounds is None:
            flat, wanted = (torch.cat(tuple(part), 1).tolist() for part in (held, lane.tokens))
            assert sorted(flat) == sorted(wanted)
            return lane
        else:
            assert ((held.double() - lane.tokens).abs() <= lane.bounds).all()
        if not dense.case.policy.needs.weights:
            assert not lane.log_weights.any()
            return lane
        weights = weights.double()
        allowed = 0.0 if lane.weight_bounds is None else lane.weight_bounds
        assert ((weights - lane.log_weights).abs() <= allowed).all()
        return Lane(held, weights, lane.numbers)

    dense.change(same)
