"""What the runtime must know of a foreign next-scale model: a description, none of its code."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from kvruntime.errors import EmbeddingError
from kvruntime.options import check_softmax_scale
from policies import ScaleSchedule

Call = Mapping[str, Any]
"""The arguments of one call of the sampler by name, defaults included; empty outside of one."""


def _heads_of(attention: Any) -> tuple[int, int]:
    """Heads and head dimension of an attention module that names them as most do."""
    return attention.num_heads, attention.head_dim


def _all_stay(model: Any, call: Call, rows: int) -> Mapping[int, int]:
    """No rows go."""
    return {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """How the self-attention of a model is found and taken over, for ``attach(embedding=...)``.

    Each attention module's own forward runs, and its one call of
    ``torch.nn.functional.scaled_dot_product_attention`` goes to the paged cache; the module's own
    cache is kept empty. Projections, norms, rotation and the output projection stay the model's.

    name: for messages.
    attentions(model): the self-attention modules in the order they run, each once in a scale.
    sampler: name of the model's method that runs a whole generation, a generator function or
        "__call__" among them. The model may be any object.
    schedule(model, call): sizes of the scales, as ScaleSchedule.of takes them. None where only a
        call's arguments tell and ``call`` is empty.
    softmax_scale(attention): factor on q . k: 1 for cosine attention.
    toggle: name of the attention's method that starts an empty cache of its own, toggle(True), or
        drops it, toggle(False). None: it has none, and every forward during the sampler is a step.
    heads(attention): heads and head dimension.
    flags: attributes of the attention during its forward, such as using_flash=False where the
        module would call a kernel of its own.
    rows(model, call, rows): {scale: rows from there on}, where the sampler drops rows half way or
        repeats them all as often, not both at one scale; given those of its first scale. Of rows
        that go the first ones stay; repeated ones lie next to each other.
    project(attention, *args, **kwargs of its forward) -> q, k, v and finish(attention, out) -> what
        its forward returns: for attention that makes no such call. Both or none.
    layout: of q, k, v and out of those two: "bhnd" [rows, heads, n, head_dim], or "bnhd".
    """

    name: str
    attentions: Callable[[Any], Sequence[nn.Module]]
    sampler: str
    schedule: Callable[[Any, Call], Iterable[Any] | None]
    softmax_scale: Callable[[Any], float]
    toggle: str | None = "kv_caching"
    heads: Callable[[Any], tuple[int, int]] = _heads_of
    flags: Mapping[str, Any] = field(default_factory=dict)
    rows: Callable[[Any, Call, int], Mapping[int, int]] = _all_stay
    project: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    finish: Callable[[Any, Tensor], Any] | None = None
    layout: Literal["bhnd", "bnhd"] = "bhnd"

    def __post_init__(self) -> None:
        if (self.project is None) != (self.finish is None):
            raise ValueError("project and finish go together: give both, or none")
        if self.layout not in ("bhnd", "bnhd"):
            raise ValueError(f"layout must be bhnd or bnhd, got {self.layout!r}")


@dataclass(frozen=True, slots=True)
class View:
    """A model as its embedding shows it: what ``attach`` works with."""

    model: Any
    embedding: Embedding
    attentions: tuple[nn.Module, ...]
    heads: int
    head_dim: int
    softmax_scale: float
    sampler: inspect.Signature

    def schedule(self, call: Call) -> ScaleSchedule | None:
        """The scales of this call; None where ``call`` does not tell. Raises EmbeddingError."""
        with _described(self.embedding, "schedule(model, call)"):
            sizes = self.embedding.schedule(self.model, call)
            return None if sizes is None else ScaleSchedule.of(sizes)

    def rows_from(self, call: Call, rows: int) -> Mapping[int, int]:
        """{scale: rows from there on} of this call. Raises EmbeddingError."""
        with _described(self.embedding, f"rows(model, call, {rows})"):
            given = self.embedding.rows(self.model, call, rows)
            return {operator.index(scale): operator.index(left) for scale, left in given.items()}

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The sampler's arguments by name. Raises TypeError where they do not fit it."""
        return self._named(self.sampler.bind(*args, **kwargs))

    def some_arguments(self, kwargs: Mapping[str, Any]) -> Call:
        """The same where only some are given. Raises TypeError for others than the sampler's."""
        return self._named(self.sampler.bind_partial(**kwargs))

    def _named(self, bound: inspect.BoundArguments) -> Call:
        bound.apply_defaults()
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if self.sampler.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            else:
                named[name] = value
        return MappingProxyType(named)

    def error(self, what: str) -> EmbeddingError:
        return EmbeddingError(self.embedding.name, what)


def examine(model: Any, embedding: Embedding) -> View:
    """The model through its description. Raises EmbeddingError that says what does not fit."""

    def wrong(what: str) -> EmbeddingError:
        return EmbeddingError(embedding.name, what)

    with _described(embedding, "attentions(model)"):
        attentions = tuple(embedding.attentions(model))
    if not attentions or not all(isinstance(module, nn.Module) for module in attentions):
        kinds = sorted({type(module).__name__ for module in attentions}) or "nothing"
        raise wrong(f"attentions(model) must give torch modules, it gives {kinds}")
    if len(set(map(id, attentions))) < len(attentions):
        raise wrong("attentions(model) names a module twice: each layer needs one of its own")
    for name in (embedding.toggle, *embedding.flags):
        lacking = [module for module in attentions if name and not hasattr(module, name)]
        if lacking:
            role = "toggle" if name == embedding.toggle else "flag"
            raise wrong(f"{type(lacking[0]).__name__} has no attribute {name!r}, named as {role}")
    if not hasattr(model, "__dict__"):
        raise wrong(f"{type(model).__name__} has no __dict__: its methods cannot be replaced")
    sampler = getattr(model, embedding.sampler, None)
    if not callable(sampler):
        raise wrong(f"{type(model).__name__} has no method {embedding.sampler!r}, the sampler")
    found = set()
    for module in attentions:
        with _described(embedding, "heads(attention)"):
            heads, head_dim = embedding.heads(module)
        with _described(embedding, "softmax_scale(attention)"):
            found.add((heads, head_dim, check_softmax_scale(embedding.softmax_scale(module))))
    if len(found) > 1:
        raise wrong(f"layers differ in (heads, head_dim, softmax scale): {sorted(found)}")
    return View(model, embedding, attentions, *found.pop(), inspect.signature(sampler))


@contextmanager
def _described(embedding: Embedding, what: str) -> Iterator[None]:
    """Whatever a function of the description raises is an EmbeddingError that names it."""
    try:
        yield
    except Exception as error:
        said = f"{what} fails: {type(error).__name__}: {error}"
        raise EmbeddingError(embedding.name, said) from error
