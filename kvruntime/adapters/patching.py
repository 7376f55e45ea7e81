"""The one place that changes a model: per-instance methods, put in on entry and taken out on
exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvruntime.cache import PagedKVCache, Stats
from kvruntime.errors import BackendUnavailable
from kvruntime.executor import Observer
from kvruntime.plan import Plan
from policies import CacheGeometry, Policy, Profile, ScaleSchedule

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


class Attachment:
    """A paged cache inside a model. ``stats`` tells about the generation that runs or ran last.

    options: of PagedKVCache, passed on.
    """

    def __init__(
        self,
        seen: ModelView,
        policy: Policy,
        budget: float,
        profile_note: str,
        observer: Observer | None,
        **options: Any,
    ) -> None:
        self._view = seen
        self._policy = policy
        self._budget = budget
        self._profile_note = profile_note
        self._options = options
        self._observer = observer
        parameter = next(seen.model.parameters())
        self._made_for = (parameter.dtype, parameter.device)
        try:
            self._cache = self._make_cache(*self._made_for)
        except BackendUnavailable:
            if parameter.dtype != torch.float32:
                raise
            self._cache = self._make_autocast_cache(parameter.device)
        self._last_stats: Stats | None = None

    @property
    def stats(self) -> Stats:
        if self._last_stats is not None:
            return self._last_stats
        return replace(self._cache.stats, profile=self._profile_note)

    def detach(self) -> None:
        """End the open generation and let the tensors go; ``stats`` stay."""
        self.close()
        self._last_stats = self.stats
        self._cache = self._make_cache(*self._made_for)

    def plan(self, pictures: int, rows_per_picture: int = 2) -> Plan:
        """What a generation of so many pictures will need, in the number format of the weights."""
        return self._cache.plan(pictures * rows_per_picture)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer's attention; the first call of a generation opens it. Under autocast V sets the
        dtype.
        """
        if not self._cache.is_open:
            if self._made_for != (v.dtype, v.device):
                self._cache = self._make_cache(v.dtype, v.device)
                self._made_for = (v.dtype, v.device)
            self._cache.open(q.shape[0])
        return self._cache.attend(layer, q.to(v.dtype), k.to(v.dtype), v)

    def close(self) -> None:
        self._cache.close()

    def _make_autocast_cache(self, device: torch.device) -> PagedKVCache:
        """For float32 weights and a back end that cannot do that: autocast may make it a number
        format that it can. If it does not, the first step refuses.
        """
        try:
            self._made_for = (torch.bfloat16, device)
            return self._make_cache(*self._made_for)
        except BackendUnavailable:
            self._made_for = (torch.float16, device)
            return self._make_cache(*self._made_for)

    def _make_cache(self, dtype: torch.dtype, device: torch.device) -> PagedKVCache:
        seen = self._view
        name = str(dtype).removeprefix("torch.")
        return PagedKVCache(
            CacheGeometry(len(seen.attentions), seen.heads, seen.head_dim, name, name),
            seen.schedule,
            self._policy,
            self._budget,
            softmax_scale=seen.softmax_scale,
            device=device,
            observer=self._observer,
            **self._options,
        )


def lacking(thing: object, path: str, names: tuple[str, ...]) -> list[str]:
    """Those of ``path.name`` that the object lacks."""
    return [f"{path}.{name}" for name in names if not hasattr(thing, name)]


@contextmanager
def patched(seen: ModelView, attachment: Attachment) -> Iterator[None]:
    """Route the attention modules through the attachment; restore every attribute at the end."""
    undo: list[tuple[nn.Module, str, object]] = []
    caching = [bool(attention.caching) for attention in seen.attentions]

    def put(module: nn.Module, name: str, value: object) -> None:
        undo.append((module, name, module.__dict__.get(name, _ABSENT)))
        module.__dict__[name] = value

    try:
        for layer, attention in enumerate(seen.attentions):
            put(attention, "forward", _forward(seen, attachment, layer, attention))
        first = seen.attentions[0]
        put(first, seen.toggle, _closing(getattr(first, seen.toggle), attachment, always=True))
        sampler = getattr(seen.model, seen.sampler)
        put(seen.model, seen.sampler, _closing(sampler, attachment, always=False))
        yield
    finally:
        attachment.detach()
        for module, name, value in reversed(undo):
            if value is _ABSENT:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value
        for attention, before in zip(seen.attentions, caching, strict=True):
            if attention.caching != before:  # a sampler that raised left its own cache switched on
                getattr(attention, seen.toggle)(before)


def _forward(
    seen: ModelView, attachment: Attachment, layer: int, attention: nn.Module
) -> Callable[..., Tensor]:
    """The attention's forward: through the paged cache while the model caches, its own
    otherwise.
    """
    original = attention.forward

    @wraps(original)
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not attention.caching:
            return original(x, *args, **kwargs)  # type: ignore[no-any-return]
        q, k, v = seen.project(attention, x)
        return seen.finish(attention, attachment.attend(layer, q, k, v))

    return forward


def _closing(
    method: Callable[..., Any], attachment: Attachment, always: bool
) -> Callable[..., Any]:
    """The method, and the end of the open generation: before every call, or when the call fails."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if always:
            attachment.close()
        try:
            return method(*args, **kwargs)
        except BaseException:
            attachment.close()
            raise

    return call
