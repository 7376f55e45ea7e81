"""The one place that changes a model: per-instance methods, put in on entry and taken out on
exit.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Protocol

from torch import Tensor, nn

from policies import Profile, ScaleSchedule

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class ModelView:
    """What an adapter found in a model.

    toggle: name of the attention method that starts (True) or drops (False) its own cache; while
    that is on, ``caching`` is true on the module. project(attention, x) -> q, k, v, each [rows, n,
    heads, head_dim]. finish(attention, out) -> what the attention module returns, from [rows, n,
    heads, head_dim].
    sampler: name of the model's method that runs a whole generation.
    """

    model: nn.Module
    attentions: list[nn.Module]
    schedule: ScaleSchedule
    heads: int
    head_dim: int
    softmax_scale: float
    toggle: str
    sampler: str
    project: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]
    finish: Callable[[Any, Tensor], Tensor]
    profile: Callable[[], Profile | None]


class Adapter(Protocol):
    """A module that knows one family of models."""

    def missing(self, model: nn.Module) -> list[str]:
        """What of the family's interface the model lacks; empty if it belongs to it."""
        ...

    def view(self, model: nn.Module) -> ModelView: ...


class Serving(Protocol):
    """What a patched model talks to."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def is_attached(self) -> bool:
        """Whether the model's calls still come here."""
        ...

    def close(self) -> None:
        """End the open generation, if it is this thread's; refuse if it is another's."""
        ...

    def drawing(self) -> Any:
        """A context in which this thread, and no other one, draws with the model."""
        ...


class Patch:
    """A method of one module instance, and the one it stands for. A copy of the model, also a
    pickled one, gets the latter, bound to the copy.
    """

    def __init__(self, original: Callable[..., Any], call: Callable[..., Any]) -> None:
        update_wrapper(self, original)
        self._original, self._call = original, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self._original,)


def _same(original: Callable[..., Any]) -> Callable[..., Any]:
    return original


class _Patches:
    """The patches on every attribute, oldest first; several attachments may leave in any order."""

    def __init__(self) -> None:
        self._stacks: weakref.WeakKeyDictionary[nn.Module, dict[str, list[Any]]]
        self._stacks = weakref.WeakKeyDictionary()

    def put(self, module: nn.Module, name: str, patch: Patch) -> None:
        stack = self._stacks.setdefault(module, {}).setdefault(name, [])
        if not stack:
            stack.append(module.__dict__.get(name, _ABSENT))
        stack.append(patch)
        module.__dict__[name] = patch

    def remove(self, module: nn.Module, name: str, patch: Patch) -> None:
        """Take one out; the newest of the others, or what was there at first, stands. Twice is
        allowed.
        """
        stack = self._stacks.get(module, {}).get(name, [])
        rest = [value for value in stack[1:] if value is not patch]
        if stack and module.__dict__.get(name) in stack[1:]:  # else somebody put in their own
            newest = rest[-1] if rest else stack[0]
            if newest is _ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = newest
        if stack:
            stack[1:] = rest
            if not rest:
                self._stacks[module].pop(name, None)


_patches = _Patches()


def lacking(thing: object, path: str, names: tuple[str, ...]) -> list[str]:
    """Those of ``path.name`` that the object lacks."""
    return [f"{path}.{name}" for name in names if not hasattr(thing, name)]


@contextmanager
def patched(seen: ModelView, serving: Serving) -> Iterator[None]:
    """Route the attention modules through ``serving``; restore every attribute at the end, also
    when an interrupt comes while that is done.
    """
    done: list[tuple[nn.Module, str, Patch]] = []
    caching = [bool(attention.caching) for attention in seen.attentions]

    def put(module: nn.Module, name: str, call: Callable[..., Any]) -> None:
        patch = Patch(getattr(module, name), call)
        done.append((module, name, patch))
        _patches.put(module, name, patch)

    def restore() -> None:
        for module, name, patch in done:
            _patches.remove(module, name, patch)
        for attention, before in zip(seen.attentions, caching, strict=True):
            if attention.caching != before:  # a sampler that raised left its own cache switched on
                getattr(attention, seen.toggle)(before)

    try:
        try:
            for layer, attention in enumerate(seen.attentions):
                put(attention, "forward", _forward(seen, serving, layer, attention))
            first = seen.attentions[0]
            put(first, seen.toggle, _starting(getattr(first, seen.toggle), serving))
            put(seen.model, seen.sampler, _sampling(getattr(seen.model, seen.sampler), serving))
            yield
        finally:
            restore()
    finally:
        restore()  # again, for an interrupt in the middle of the first time


def _forward(
    seen: ModelView, serving: Serving, layer: int, attention: nn.Module
) -> Callable[..., Any]:
    """The attention's forward: through the paged cache while the model caches, its own
    otherwise.
    """
    original = attention.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not attention.caching or not serving.is_attached():
            return original(x, *args, **kwargs)
        q, k, v = seen.project(attention, x)
        return seen.finish(attention, serving.attend(layer, q, k, v))

    return forward


def _starting(toggle: Callable[..., Any], serving: Serving) -> Callable[..., Any]:
    """The switch of the model's own cache: whatever generation is open ends there."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if serving.is_attached():
            serving.close()
        return toggle(*args, **kwargs)

    return call


def _sampling(sampler: Callable[..., Any], serving: Serving) -> Callable[..., Any]:
    """The sampler, for one thread at a time; a generation that fails is closed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not serving.is_attached():
            return sampler(*args, **kwargs)
        with serving.drawing():
            return sampler(*args, **kwargs)

    return call
