"""The one place that changes a model: methods of single objects, put in on entry and taken out on
exit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import update_wrapper
from inspect import getattr_static, isgenerator
from typing import Any, Protocol

from torch import nn

from kvruntime.adapters.embedding import View
from kvruntime.adapters.interception import ABSENT, put_back
from kvruntime.adapters.serving import SamplerCall
from kvruntime.errors import ScheduleError


class Host(Protocol):
    """What a patched model talks to."""

    def is_attached(self) -> bool:
        """Whether the model's calls still come here."""
        ...

    def is_drawing(self) -> bool:
        """Whether a call of the sampler runs here."""
        ...

    def takes(self, layer: int) -> bool:
        """Whether a forward of this layer is a step now: its cache is on."""
        ...

    def step(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the layer's forward returns."""
        ...

    def toggled(self, layer: int, enable: bool) -> None:
        """The sampler switches a layer's cache on, empty, or off."""
        ...

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SamplerCall:
        """The sampler is called."""
        ...

    def running(self, call: SamplerCall) -> AbstractContextManager[None]:
        """Its code runs in this thread, from here to there."""
        ...

    def end(self, call: SamplerCall, is_complete: bool) -> None:
        """It has returned, or failed."""
        ...

    def abandon(self, call: SamplerCall) -> None:
        """It will never go on, and another thread draws: its pages go back, no more."""
        ...


class Patch:
    """A method of one object, and the one it stands for. A copy of the object, also a pickled one,
    gets the latter, bound to the copy.
    """

    def __init__(
        self, original: Callable[..., Any], call: Callable[..., Any], host: Host | None = None
    ) -> None:
        update_wrapper(self, original)
        self.original, self._call, self.host = original, call, host

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.original,)


def _same(original: Callable[..., Any]) -> Callable[..., Any]:
    return original


class _ClassPatch:
    """A method of a class that is another one for a single object."""

    def __init__(self, model: Any, patch: Patch, original: Any) -> None:
        self._model, self._patch, self.original = model, patch, original

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self._patch if instance is self._model else self.original.__get__(instance, owner)


def original_of(owner: Any, name: str) -> Callable[..., Any]:
    """The method as it is without any attachment."""
    if _is_of_class(name):
        found = getattr_static(type(owner), name)
        while isinstance(found, _ClassPatch):
            found = found.original
        return found.__get__(owner, type(owner))  # type: ignore[no-any-return]
    method = getattr(owner, name)
    while isinstance(method, Patch):
        method = method.original
    return method  # type: ignore[no-any-return]


def _is_of_class(name: str) -> bool:
    """Whether Python looks the method up in the class, as it does "__call__"."""
    return name.startswith("__") and name.endswith("__")


class _Patches:
    """The patches on every attribute, oldest first; several attachments may leave in any order."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[int, str], list[Any]] = {}  # by id: not all can be hashed

    def put(self, owner: Any, name: str, patch: Any) -> None:
        stack = self._stacks.setdefault((id(owner), name), [])
        if not stack:
            stack.append(owner.__dict__.get(name, ABSENT))
        stack.append(patch)
        _set(owner, name, patch)

    def remove(self, owner: Any, name: str, patch: Any) -> None:
        """Take one out; the newest of the others, or what was there at first, stands. Twice is
        allowed.
        """
        stack = self._stacks.get((id(owner), name), [])
        rest = [value for value in stack[1:] if value is not patch]
        if stack and any(owner.__dict__.get(name) is put for put in stack[1:]):
            # else somebody put in their own
            _set(owner, name, rest[-1] if rest else stack[0])
        if stack:
            stack[1:] = rest
            if not rest:
                self._stacks.pop((id(owner), name), None)

    def drawing_below(self, owner: Any, name: str, host: Host) -> Patch | None:
        """That of the newest attachment older than ``host`` in which the sampler runs."""
        older = []
        for patch in self._stacks.get((id(owner), name), [])[1:]:
            if patch.host is host:
                break
            older.append(patch)
        return next((one for one in reversed(older) if one.host and one.host.is_drawing()), None)


def _set(owner: Any, name: str, value: Any) -> None:
    """In the object's own attributes, which neither properties nor torch modules see to."""
    if isinstance(owner, type):
        if value is ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    else:
        put_back(owner.__dict__, {name: value})


_patches = _Patches()


@contextmanager
def replaced(patches: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Put (owner, attribute, patch) in; restore every attribute at the end, also when an interrupt
    comes while that is done.
    """
    done: list[tuple[Any, str, Any]] = []

    def restore() -> None:
        for owner, name, patch in done:
            _patches.remove(owner, name, patch)

    try:
        try:
            for owner, name, patch in patches:
                done.append((owner, name, patch))
                _patches.put(owner, name, patch)
            yield
        finally:
            restore()
    finally:
        restore()  # again, for an interrupt in the middle of the first time


def patches_of(view: View, host: Host) -> Iterator[tuple[Any, str, Any]]:
    """What routes the model through ``host``."""
    model, sampler, toggle = view.model, view.embedding.sampler, view.embedding.toggle
    for layer, attention in enumerate(view.attentions):
        yield attention, "forward", _forward(host, layer, attention)
        if toggle is not None:
            yield attention, toggle, _toggle(host, layer, attention, toggle)
    patch = _sampler(host, model, sampler)
    if _is_of_class(sampler):
        others = getattr_static(type(model), sampler)
        yield type(model), sampler, _ClassPatch(model, patch, others)
    else:
        yield model, sampler, patch


def _forward(host: Host, layer: int, attention: nn.Module) -> Patch:
    """A step while the layer's cache is on, the module's own forward otherwise."""
    original = original_of(attention, "forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        older = _older_in_turn(host, attention, "forward")
        if older is not None:
            return older(*args, **kwargs)
        if host.is_attached() and host.takes(layer):
            return host.step(layer, args, kwargs)
        return original(*args, **kwargs)

    return Patch(original, forward, host)


def enables(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """What a toggle is called with."""
    return bool(args[0] if args else next(iter(kwargs.values()), True))


def _older_in_turn(host: Host, attention: nn.Module, name: str) -> Patch | None:
    """The patch of an older attachment that is in the middle of a drawing, while this is not."""
    return None if host.is_drawing() else _patches.drawing_below(attention, name, host)


def _toggle(host: Host, layer: int, attention: nn.Module, name: str) -> Patch:
    """The switch of a layer's own cache, which stays empty."""
    original = original_of(attention, name)

    def toggle(*args: Any, **kwargs: Any) -> Any:
        older = _older_in_turn(host, attention, name)
        if older is not None:
            return older(*args, **kwargs)
        if host.is_attached():
            host.toggled(layer, enables(args, kwargs))
        return original(*args, **kwargs)

    return Patch(original, toggle, host)


def _sampler(host: Host, model: Any, name: str) -> Patch:
    """The sampler, for one thread at a time; a generation ends with its call, also if that
    fails.
    """
    original = original_of(model, name)

    def sampler(*args: Any, **kwargs: Any) -> Any:
        if not host.is_attached():
            return original(*args, **kwargs)
        call = host.begin(args, kwargs)
        try:
            with host.running(call):
                out = original(*args, **kwargs)
            if isgenerator(out):
                return Steps(out, host, call)
        except BaseException:
            host.end(call, is_complete=False)
            raise
        host.end(call, is_complete=True)
        return out

    return Patch(original, sampler, host)


class Steps(Generator[Any, Any, Any]):
    """A sampler that yields on its way; each time that it goes on it is the one that draws."""

    def __init__(self, steps: Generator[Any, Any, Any], host: Host, call: SamplerCall) -> None:
        self._steps, self._host, self._call = steps, host, call

    def send(self, value: Any) -> Any:
        return self._go_on(lambda: self._steps.send(value))

    def throw(self, *error: Any) -> Any:
        if self._call.has_ended or not self._host.is_attached():
            return self._steps.throw(*error)
        return self._go_on(lambda: self._steps.throw(*error))

    def _go_on(self, resume: Callable[[], Any]) -> Any:
        with self._host.running(self._call):
            try:
                return resume()
            except BaseException as error:
                self._host.end(self._call, is_complete=isinstance(error, StopIteration))
                raise

    def __del__(self) -> None:
        try:
            self.close()  # what its own code does at the end is done as part of this call
        except ScheduleError:
            self._host.abandon(self._call)
