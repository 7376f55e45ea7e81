"""One forward of an attention module whose attention proper is computed elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode

from kvruntime.adapters.embedding import View

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [rows, n, heads, head_dim] -> the same shape."""

_SDPA = torch._C._nn.scaled_dot_product_attention  # whatever name a model imports it by
ABSENT = object()  # in place of an attribute that an instance has not


def take_over(
    view: View,
    layer: int,
    forward: Callable[..., Any],
    empty: Callable[[], None],
    attend: Attend,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """What the module's forward returns, its attention computed by ``attend``.

    forward: its own. empty: empties its own cache. Raises EmbeddingError for a forward that does
    not attend as described.
    """
    embedding, attention = view.embedding, view.attentions[layer]
    if embedding.project is not None and embedding.finish is not None:
        q, k, v = embedding.project(attention, *args, **kwargs)
        if embedding.layout == "bnhd":
            return embedding.finish(attention, attend(q, k, v))
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return embedding.finish(attention, out.transpose(1, 2))
    catch = _Catch(view, layer, attend)

    def watched(*args: Any, **kwargs: Any) -> Any:
        try:  # a `with` may be interrupted before it leaves
            try:
                catch.__enter__()  # type: ignore[no-untyped-call]
                return forward(*args, **kwargs)
            finally:
                _withdraw(catch)
        finally:
            _withdraw(catch)  # again, for an interrupt in the middle of the first time

    try:
        empty()
        out = run_with_flags(view, layer, watched, args, kwargs)
    finally:
        empty()
    if not catch.calls:
        raise view.error(
            f"the forward of layer {layer} ({type(attention).__name__}) made no call of "
            "torch.nn.functional.scaled_dot_product_attention (nn.MultiheadAttention hides "
            "its own): name the flags that keep it from flash-attn, xformers or a compiled kernel "
            "in flags=, or give project and finish"
        )
    return out


def run_with_flags(
    view: View,
    layer: int,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """The module's forward with the description's flags."""
    attributes, flags = view.attentions[layer].__dict__, view.embedding.flags
    before = {name: attributes.get(name, ABSENT) for name in flags}
    try:
        try:
            attributes.update(flags)
            return forward(*args, **kwargs)
        finally:
            put_back(attributes, before)
    finally:
        put_back(attributes, before)  # again, for an interrupt in the middle of the first time


def put_back(attributes: dict[str, Any], before: Mapping[str, Any]) -> None:
    """What was there before, ABSENT where nothing was."""
    for name, value in before.items():
        if value is ABSENT:
            attributes.pop(name, None)
        else:
            attributes[name] = value


def _withdraw(mode: TorchFunctionMode) -> None:
    """Take it from the thread's stack of modes, if it is there."""
    while mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
        _pop_mode()  # type: ignore[no-untyped-call]


class _Catch(TorchFunctionMode):
    """Hands the one attention call of a forward to ``attend``."""

    def __init__(self, view: View, layer: int, attend: Attend) -> None:
        super().__init__()
        self._view, self._layer, self._attend = view, layer, attend
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not _SDPA:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attention(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As torch's, [rows, heads, n, head_dim]."""
        if self.calls > 1:
            raise self._wrong(
                "calls attention twice: list the modules of self-attention alone, or give project "
                "and finish"
            )
        if (attn_mask is not None and attn_mask.numel()) or is_causal:
            raise self._wrong(
                "masks its attention: in next-scale drawing every query sees all cached and all "
                "fresh tokens; a mask belongs to training or to another kind of attention"
            )
        if dropout_p:
            raise self._wrong(f"drops {dropout_p} of its attention: call model.eval() first")
        if query.ndim != 4 or key.shape != value.shape:
            shapes = ", ".join(str(tuple(part.shape)) for part in (query, key, value))
            raise self._wrong(f"must attend with [rows, heads, n, head_dim], got {shapes}")
        if enable_gqa or key.shape[1] != query.shape[1]:
            raise self._wrong(
                f"has grouped heads, {query.shape[1]} of queries and {key.shape[1]} of keys: "
                "repeat the keys and values in project"
            )
        if key.shape[2] != query.shape[2]:
            raise self._wrong(
                f"has {key.shape[2]} keys for {query.shape[2]} queries: its own cache is not "
                "empty, or this is cross-attention; toggle= must name what empties the cache, "
                "attentions= self-attention"
            )
        used = query.shape[3] ** -0.5 if scale is None else float(scale)
        if not math.isclose(used, self._view.softmax_scale, rel_tol=1e-6):
            raise self._wrong(
                f"attends with scale {used:.6g}, softmax_scale(attention) says "
                f"{self._view.softmax_scale:.6g}"
            )
        parts = (part.transpose(1, 2) for part in (query, key, value))
        return self._attend(*parts).transpose(1, 2)

    def _wrong(self, what: str) -> Exception:
        name = type(self._view.attentions[self._layer]).__name__
        return self._view.error(f"layer {self._layer} ({name}) {what}")
