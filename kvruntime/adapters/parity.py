"""Is a description right? Every step beside the model's own cache, on the same input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvruntime.adapters.attachment import empty
from kvruntime.adapters.caches import Caches
from kvruntime.adapters.embedding import View
from kvruntime.adapters.interception import take_over
from kvruntime.adapters.patching import Patch, enables, original_of, replaced
from kvruntime.adapters.serving import SamplerCall, Serving
from kvruntime.options import CacheOptions

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True, slots=True)
class Parity:
    """How far policy ``full`` is from the model's own cache.

    steps: layers that were compared, over so many scales. dtype: that the model computed in.
    max_error: largest difference of what an
    attention module returned, as a share of its largest number; 0 where all bits are the same.
    """

    steps: int
    scales: int
    dtype: str
    max_error: float


class Shadow:
    """Runs each step three times: on the model's own cache, on policy ``full``, and for real.

    The module's own cache lives on between the steps, so it takes the memory that the model takes
    without the runtime; only ``scales`` scales are watched if that is given.
    Raises EmbeddingError at the first step whose results differ by more than rounding.
    """

    def __init__(self, view: View, scales: int | None, is_drawing: bool) -> None:
        self._view, self._scales, self._is_drawing = view, scales, is_drawing
        self._caches = Caches(view, CacheOptions("full", 1.0), None, None, None, None)
        self._serving = Serving(view, self._caches)
        self._twins: dict[SamplerCall, SamplerCall] = {}
        self._own: dict[tuple[SamplerCall, int], _Held] = {}  # the model's own cache of each layer
        self._last: dict[int, SamplerCall] = {}  # whose own cache the layer's module holds
        self._steps = self._most_scales = 0
        self._reached = (0, 0)  # scales that are done, and that there are
        self._max_error = 0.0
        self._dtype: torch.dtype | None = None
        self.is_watching = True

    def step(
        self,
        call: SamplerCall,
        layer: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        ours: Callable[[], Any],
    ) -> Any:
        """What ``ours`` returns; where nobody draws with the cache, what the module does."""
        same = SamplerCall(call.arguments, call.schedule, call.is_on, branch=call.branch)
        twin = self._twins.setdefault(call, same)
        view, attention = self._view, self._view.attentions[layer]
        forward = original_of(attention, "forward")
        if self._last.get(layer, call) is not call and (call, layer) in self._own:
            _give_back(attention, self._own[call, layer])  # calls that take turns
        own = forward(*args, **kwargs)
        self._last[layer], self._own[call, layer] = call, _held_by(attention)
        with _put_back(attention):
            full = take_over(
                view,
                layer,
                forward,
                lambda: empty(view, layer),
                lambda q, k, v: self._serving.attend(twin, layer, q, k, v),
                args,
                kwargs,
            )
            self._compare(twin, layer, own, full)
            if self._is_drawing:
                own = ours()
        assert twin.generation is not None
        self._reached = (twin.generation.scale, len(twin.generation.plan.schedule))
        if twin.generation.scale == self._scales:
            self._stop()
            for number in range(len(view.attentions)):
                empty(view, number)
        return own

    def _compare(self, twin: SamplerCall, layer: int, own: Any, full: Any) -> None:
        assert twin.generation is not None
        theirs, mine = _first_tensor(own), _first_tensor(full)
        largest = float(theirs.abs().max())
        error = float((mine.double() - theirs.double()).abs().max()) / (largest or 1.0)
        place, dtype = twin.generation.place, theirs.dtype
        scale, allowed = place.scale - (place.layer == 0), TOLERANCE.get(dtype, 0.0)
        if not error <= allowed:
            raise self._view.error(
                f"scale {scale}, layer {layer}: the result is {error:.2g} of its largest number "
                f"away from the model's own, {allowed:.2g} is rounding in {dtype}. Either "
                "softmax_scale, flags, project or finish is wrong, or other rows stay than the "
                "first ones, or the forward reads its own cache, which is kept empty"
            )
        self._steps, self._max_error = self._steps + 1, max(self._max_error, error)
        self._most_scales, self._dtype = max(self._most_scales, scale + 1), dtype

    def begins(self, call: SamplerCall) -> None:
        """Whatever was open ends."""
        twin = self._twins.get(call)
        if twin is not None:
            self._serving.close(twin)
        self._forget(call)

    def ends(self, call: SamplerCall, is_complete: bool) -> None:
        """Raises EmbeddingError for scales that never came."""
        twin = self._twins.pop(call, None)
        self._forget(call)
        if twin is None:
            return
        self._serving.close(twin)
        if not is_complete or not self.is_watching:
            return
        drawn, planned = self._reached
        if self._scales is not None:
            self._stop()
        elif drawn < planned:
            raise self._view.error(
                f"schedule(model, call) has {planned} scales, the sampler drew {drawn}: it must "
                "give those that are drawn; a call that stops early is nothing to check with"
            )

    def _forget(self, call: SamplerCall) -> None:
        for layer in range(len(self._view.attentions)):
            self._own.pop((call, layer), None)
            if self._last.get(layer) is call:
                del self._last[layer]

    def _stop(self) -> None:
        """All is well."""
        self.is_watching = False
        self._serving.let_go()
        self._twins.clear()
        self._own.clear()

    def parity(self) -> Parity:
        """Of all steps so far. Raises EmbeddingError where there was none."""
        self._serving.let_go()
        if self._dtype is None:
            raise self._view.error("draw() ran no step of the described attention")
        name = str(self._dtype).removeprefix("torch.")
        return Parity(self._steps, self._most_scales, name, self._max_error)


_Held = dict[str, tuple[Any, Any]]
"""Attributes of a module, and what lists, dicts and sets among them hold; tensors as they are."""


def _held_by(module: nn.Module) -> _Held:
    def content(value: Any) -> Any:
        return copy.copy(value) if type(value) in (list, dict, set) else None

    return {name: (value, content(value)) for name, value in module.__dict__.items()}


def _give_back(module: nn.Module, held: _Held) -> None:
    for name in [name for name in module.__dict__ if name not in held]:
        del module.__dict__[name]
    for name, (value, content) in held.items():
        if isinstance(content, list):
            value[:] = content
        elif content is not None:
            value.clear()
            value.update(content)
        module.__dict__[name] = value


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    """Whatever attributes and buffers it gets meanwhile, they are as before at the end."""
    held = _held_by(module)
    try:
        yield
    finally:
        _give_back(module, held)


def _first_tensor(out: Any) -> Tensor:
    while isinstance(out, tuple | list):
        out = out[0]
    assert isinstance(out, Tensor)
    return out


@contextmanager
def siblings_watched(view: View) -> Iterator[None]:
    """Raise EmbeddingError at the end if modules of the described classes cached as well."""
    model, toggle = view.model, view.embedding.toggle
    if toggle is None:  # who caches cannot be told
        yield
        return
    held = [model] if isinstance(model, nn.Module) else getattr(model, "__dict__", {}).values()
    kinds = {type(module) for module in view.attentions}
    noted: dict[str, None] = {}
    patches: list[tuple[Any, str, Any]] = []
    for root in held:
        if isinstance(root, nn.Module):
            for name, module in root.named_modules():
                if type(module) in kinds and module not in view.attentions:
                    patches.append((module, toggle, _noting(module, toggle, name, noted)))
    with replaced(patches):
        yield
    if noted:
        raise view.error(
            f"attentions(model) gives {len(view.attentions)} modules, and these cache as well: "
            f"{', '.join(noted)}"
        )


def _noting(module: nn.Module, toggle: str, name: str, noted: dict[str, None]) -> Patch:
    """Its toggle, which writes down that a cache was switched on."""
    original = original_of(module, toggle)

    def call(*args: Any, **kwargs: Any) -> Any:
        if enables(args, kwargs):
            noted[name] = None
        return original(*args, **kwargs)

    return Patch(original, call)
