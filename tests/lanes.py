"""What lanes should hold, as plain tensors in float64 beside the pages."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from kvruntime.storage.layout import CodedFormat
from kvruntime.storage.records import dequantize, quantize
from tests.codecs import coded, transforms_of
from tests.folds import fit, rounding_bounds


@dataclass(frozen=True)
class Lane:
    """tokens: [2, n, head_dim], K and V in the model's number format. planes: float64 [n, planes],
    of plan.planes. numbers: of the tokens, for policies that choose by them. bounds: how far what
    is stored may lie from ``tokens``, float64, of the same shape; None: not at all. fitted: V and
    log weights for K as it is stored, where they are fitted to queries.
    """

    tokens: torch.Tensor
    planes: torch.Tensor
    numbers: torch.Tensor
    bounds: torch.Tensor | None = None
    fitted: Callable | None = None

    def take(self, places):
        return replace(
            self,
            tokens=self.tokens[:, places],
            planes=self.planes[places],
            numbers=self.numbers[places],
            bounds=None if self.bounds is None else self.bounds[:, places],
        )


class Dense:
    """One layer's lanes, kept by the policy's recorded choices."""

    def __init__(self, case, plan):
        self.case, self.plan = case, plan
        dtype = getattr(torch, case.geometry.key_dtype)
        empty = Lane(
            torch.zeros(2, 0, case.geometry.head_dim, dtype=dtype),
            torch.zeros(0, len(plan.planes), dtype=torch.float64),
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
        planes = self._fresh_planes(scale)

        def longer(r, h, lane):
            return Lane(
                torch.cat((lane.tokens, torch.stack((k[r, :, h], v[r, :, h]))), 1),
                torch.cat((lane.planes, planes)),
                torch.cat((lane.numbers, numbers)),
            )

        self.change(longer)

    def _fresh_planes(self, scale):
        *lines, columns = self.case.schedule.sizes[scale]
        places = [(i, j) for i in range(math.prod(lines)) for j in range(columns)]
        known = {
            "scale": [scale for _ in places],
            "line": [(i + 0.5) / math.prod(lines) for i, _ in places],
            "column": [(j + 0.5) / columns for _, j in places],
        }
        planes = [known.get(plane, [0] * len(places)) for plane in self.plan.planes]
        return (
            torch.tensor(planes, dtype=torch.float64).reshape(-1, len(places)).t().half().double()
        )

    def attended(self, before):
        """Which of a lane's tokens its queries attended to, if the policy said so in this step."""
        asked = self.case.policy.attended
        if not asked:
            return None
        places = torch.cat([part for _, part in asked])
        padded, counts = int(before.max()), asked[0][0]

        def of_lane(r, h):
            mine = places[r, h, : counts[h]]
            assert not ((mine >= before[h]) & (mine < padded)).any(), "attended to an empty place"
            assert mine.unique().numel() == mine.numel()
            return torch.where(mine >= padded, mine - padded + int(before[h]), mine)

        return of_lane

    def keep(self, scale, layer, before):
        """Drop or fold what the policy did not choose, and store the rest as the plan says."""
        plan = self.plan
        after, policy = plan.tokens[scale, layer], self.case.policy
        records = plan.format_after(scale, layer).records
        stays = plan.format_after(scale - 1, layer).records == records
        drops = after.any() and (after < self.lengths).any()
        asked = after.any() and (drops or policy.needs.every_scale)
        folds = asked and policy.needs.folds
        if records is not None and not folds:
            self.change(
                lambda r, h, lane: rounded(
                    lane, records, before[h] if stays else 0, self.transforms(layer, h)
                )
            )
        if not after.any():
            self.change(lambda r, h, lane: lane.take([]))
        elif asked and policy.needs.content:
            self._choose(after, before, records, folds, layer)
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

    def _choose(self, after, before, records, folds, layer):
        """The recorded choices of this step, by chunk of rows."""
        chosen = self.case.policy.chosen
        assert chosen and all((choice.keep == after).all() for choice in chosen)
        padded = int(before.max())
        assert all(choice.cached == padded for choice in chosen)
        keep = torch.cat([choice.selection.keep for choice in chosen])
        assert keep.shape[0] == self.case.rows, "every row is chosen for once"

        def there(h, numbers):
            place = torch.arange(numbers.shape[2])
            return (place < before[h]) | (place >= padded)

        def own(h, places):
            """Places of the padded candidates among a lane's own."""
            short = int(before[h])
            assert not ((places >= short) & (places < padded)).any(), "kept an empty place"
            return torch.where(places >= padded, places - padded + short, places)

        if chosen[0].selection.scores is not None:
            scores = torch.cat([choice.selection.scores for choice in chosen])
            self.change(lambda r, h, lane: self._with_scores(lane, scores[r, h, there(h, scores)]))
        if not folds:
            self.change(lambda r, h, lane: lane.take(own(h, keep[r, h, : after[h]])))
            return
        into, seen = torch.cat([choice.selection.into for choice in chosen]), None
        if self.case.policy.needs.refit:
            heads = self.case.geometry.heads
            seen = torch.cat([choice.seen_by.unflatten(0, (-1, heads)) for choice in chosen])

        def folded(r, h, lane):
            mine, places = into[r, h, there(h, into)], own(h, keep[r, h, : after[h]])
            queries = None if seen is None else seen[r, h]
            return self._fold(lane, places, mine, records, queries, self.transforms(layer, h))

        self.change(folded)

    def _with_scores(self, lane, scores):
        planes = lane.planes.clone()
        planes[:, self.plan.planes.index("score")] = scores.double()
        return replace(lane, planes=planes)

    def _fold(self, lane, places, into, records, queries, transforms):
        """Weighted means in float64, and how far float32 and the storage may be off them."""
        count, names = places.numel(), self.plan.planes
        weights = torch.ones(into.numel(), dtype=torch.float64)
        if "log_weight" in names:
            weights = lane.planes[:, names.index("log_weight")].exp()
        shares = torch.zeros(count, into.numel(), dtype=torch.float64)
        folded = into >= 0
        shares[into[folded], folded.nonzero().flatten()] = weights[folded]
        counts = shares.sum(1)
        mean = shares / counts[:, None]
        tokens = torch.einsum("cn,knd->kcd", mean, lane.tokens.double())
        planes = mean @ lane.planes
        if "log_weight" in names:
            planes[:, names.index("log_weight")] = counts.log()
        fitted = None
        if queries is not None and count:
            some = queries.double()
            bias = lane.planes[:, names.index("log_weight")]
            fitted = partial(
                fit, some, lane.tokens.double(), bias, shares > 0, counts.log(), tokens[1]
            )
        bounds = rounding_bounds(tokens, records, lane.tokens.dtype, transforms)
        return Lane(tokens, planes, lane.numbers[places], bounds, fitted)

    def transforms(self, layer, head):
        coding = self.case.options.get("coding")
        return None if coding is None else transforms_of(coding, layer, head)


def as_fitted(lane, keys, plan, records, transforms):
    """The lane with V and log weights for the keys that are stored."""
    values, log_weights = lane.fitted(keys)
    planes = lane.planes.clone()
    planes[:, plan.planes.index("log_weight")] = log_weights
    tokens = torch.stack((lane.tokens[0], values))
    dtype = getattr(torch, plan.geometry.key_dtype)
    bounds = rounding_bounds(tokens, records, dtype, transforms, error=1e-3)
    bounds[0] = lane.bounds[0]
    return replace(lane, tokens=tokens, planes=planes, bounds=bounds)


def rounded(lane, records, first, transforms):
    """What is stored now for the first time in this format, from token ``first`` on, loses
    precision; what was stored before does not change again.
    """
    if lane.tokens.shape[1] == first:
        return lane
    new, dtype = lane.tokens[:, first:], lane.tokens.dtype
    if isinstance(records, CodedFormat):
        stored, slack = coded(new, records, transforms, torch.zeros_like(new))
        old = lane.tokens[:, :first].double()  # turned back in other products, also of old records
        tokens, slack = torch.cat((old, stored), 1), torch.cat((1e-5 * (1 + old.abs()), slack), 1)
        bounds = slack + torch.finfo(dtype).eps * (tokens.abs() + slack)
        return replace(lane, tokens=tokens.to(dtype), bounds=bounds)
    into = torch.empty_like(new)
    words = quantize(new.flatten(0, 1), records).unflatten(0, new.shape[:2])
    dequantize(words, records, into)
    return replace(lane, tokens=torch.cat((lane.tokens[:, :first], into), 1))
