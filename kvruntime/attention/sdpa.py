"""torch's scaled_dot_product_attention over gathered tokens: any device, any number format."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kvruntime.attention.base import Lanes
from kvruntime.storage.pages import Pages


class SDPA:
    """Always gathers."""

    name = "torch-sdpa"

    def reads_pages(self, pages: Pages, num_queries: int, is_ragged: bool) -> bool:
        return False

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, softmax_scale: float
    ) -> Tensor:
        q = q.transpose(1, 2)
        if bias is not None and q.device.type == "cuda":
            bias = bias.to(q.dtype)  # torch 2.11's kernels read float32 as if it were that
        out = F.scaled_dot_product_attention(q, keys, values, bias, scale=softmax_scale)
        return out.transpose(1, 2)

    def attend_pages(
        self, q: Tensor, k: Tensor, v: Tensor, cached: Lanes, softmax_scale: float
    ) -> Tensor:
        raise NotImplementedError("torch has no attention over pages")
