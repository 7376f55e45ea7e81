"""attach(): put the paged cache inside someone else's model, and take it out again. check(): may it
be trusted?
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvruntime.adapters import emoji, infinity, var
from kvruntime.adapters.attachment import Attachment
from kvruntime.adapters.caches import Caches
from kvruntime.adapters.embedding import Call, Embedding, View, examine
from kvruntime.adapters.emoji import EMOJI
from kvruntime.adapters.infinity import INFINITY
from kvruntime.adapters.parity import Parity, Shadow, siblings_watched
from kvruntime.adapters.patching import patches_of, replaced
from kvruntime.adapters.var import VAR
from kvruntime.admission import Admission
from kvruntime.coding import Coding
from kvruntime.errors import UnsupportedModel
from kvruntime.options import CacheOptions
from kvruntime.preset import CachePreset, load_cache_preset
from kvruntime.step.run import Observer
from kvruntime.storage.pool import Pool
from policies import CacheGeometry, Policy

_KNOWN = ((VAR, var.missing), (INFINITY, infinity.missing), (EMOJI, emoji.missing))
_CHECKED_SCALES = 4
_checked: weakref.WeakKeyDictionary[Embedding, set[type]] = weakref.WeakKeyDictionary()


def view_of(model: Any, embedding: Embedding | None = None) -> View:
    """The model through this description, or through the known one that fits. Raises
    UnsupportedModel or EmbeddingError.
    """
    if embedding is not None:
        if not isinstance(embedding, Embedding):
            raise ValueError(f"embedding must be an Embedding, got {embedding!r}")
        return examine(model, embedding)
    missing: dict[str, list[str]] = {}
    for known, lacks in _KNOWN:
        missing[known.name] = lacks(model)
        if not missing[known.name]:
            return examine(model, known)
    raise UnsupportedModel(model, missing)


@contextmanager
def attach(
    model: Any,
    policy: str | Policy | None = None,
    budget: float | str | None = None,
    *,
    preset: CachePreset | str | Path | None = None,
    embedding: Embedding | None = None,
    check: bool = False,
    key_dtype: str | None = None,
    pool: Pool | None = None,
    admission: Admission | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Iterator[Attachment]:
    """Within the ``with`` block the model's own sampler runs on a paged cache of this policy and
    budget.

    model: FoundationVision's VAR or Infinity or the bundled model, unmodified, or whatever
    ``embedding`` describes. Each call of its sampler is one generation; its pool is made when the
    first layer runs, since only then the number of rows is known.
    policy, budget: "scalekv" and 0.10 where there is no preset. A float is a fraction of the
    history in tokens (the tokens before the last scale), an int a token count, "2%" a share of the
    bytes of the model's own history, "512MiB" bytes.
    preset: policy, budget and kv_dtype, as kvruntime.tuning found them; a file or an object.
    check: compare the first scales of the first call with the model's own cache (see ``check``),
    once for each description and class of attention.
    key_dtype: "float32" keeps and computes everything in that; None: as the model's attention
    would, V's format, under autocast autocast's.
    pool: shared with other caches; None: one of its own. admission: who may draw, of all that share
    its pool; calls of the sampler wait for their turn, inside the model's attention.
    observer: sees every step's queries, keys and values.
    options: profile, page_size, kv_dtype, kv_groups, kv_start, coding, backend, paged_queries,
    memory, workspace, provenance, as in CacheOptions. coding: None: ``model.coding``, if it has
    one.

    Yields an Attachment with ``stats``. On exit the model is as it was, also after an exception.
    Raises UnsupportedModel, EmbeddingError, or ValueError for arguments that cannot work, before
    the model is touched; EmbeddingError from the sampler where it does not run as described.
    """
    if observer is not None and not callable(observer):
        raise ValueError(f"observer must be a function, got {observer!r}")
    view = view_of(model, embedding)
    if options.get("coding") is None:
        options["coding"] = own_coding(model)
    chosen = CacheOptions(**_with_preset(policy, budget, preset, options))
    chosen.coding_for(CacheGeometry(len(view.attentions), view.heads, view.head_dim))
    caches = Caches(view, chosen, pool, admission, observer, _dtype(key_dtype))
    shadow = None
    checked = _checked.setdefault(view.embedding, set())
    if check and type(view.attentions[0]) not in checked:
        shadow = Shadow(view, _CHECKED_SCALES, is_drawing=True)
    with _attached(view, caches, shadow) as attachment:
        yield attachment
    if shadow is not None and not shadow.is_watching:
        checked.add(type(view.attentions[0]))


@contextmanager
def _attached(view: View, caches: Caches, shadow: Shadow | None) -> Iterator[Attachment]:
    attachment = Attachment(view, caches, shadow)
    try:
        try:
            with replaced(patches_of(view, attachment)):
                yield attachment
        finally:
            attachment.detach()
    finally:
        attachment.detach()  # again, for an interrupt in the middle of the first time


def check(model: Any, draw: Callable[[], object], embedding: Embedding | None = None) -> Parity:
    """Whether policy ``full`` computes what the model's own cache does: at every step of
    ``draw()``, which calls the model's sampler, on the very same input. The model draws its own
    picture. embedding: as ``attach`` takes it.

    Exact in float32 on a CPU; elsewhere kernels may round differently (adapters.parity.TOLERANCE).
    Costs the memory of the model's own cache and of ``full``, and twice the attention.
    Raises UnsupportedModel, and EmbeddingError that says what to change in the description.
    """
    view = view_of(model, embedding)
    shadow = Shadow(view, None, is_drawing=False)
    caches = Caches(view, CacheOptions("full", 1.0), None, None, None, None)
    with siblings_watched(view), _attached(view, caches, shadow):
        draw()
    return shadow.parity()


def own_coding(model: Any) -> Coding | None:
    """What the model object itself says of how its pages are coded; None if it says nothing."""
    coding = getattr(model, "coding", None)
    return coding if isinstance(coding, Coding) else None


def _with_preset(
    policy: str | Policy | None,
    budget: float | str | None,
    preset: CachePreset | str | Path | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Options for CacheOptions. Raises ValueError where a preset and the call say the same."""
    given = {"policy": policy, "budget": budget}
    given = {name: value for name, value in given.items() if value is not None}
    if preset is None:
        return {"policy": "scalekv", "budget": 0.10} | given | options
    if not isinstance(preset, CachePreset):
        preset = load_cache_preset(preset)
    both = sorted((given.keys() | options.keys()) & preset.options.keys())
    if both:
        raise ValueError(f"the preset of {preset.model} says {', '.join(both)}: give one of both")
    return preset.options | options


def _dtype(name: str | None) -> torch.dtype | None:
    if name not in (None, "float32"):
        raise ValueError(f"key_dtype must be float32 or None, got {name!r}")
    return None if name is None else torch.float32


__all__ = [
    "EMOJI",
    "INFINITY",
    "VAR",
    "Attachment",
    "Call",
    "Embedding",
    "Parity",
    "attach",
    "check",
    "own_coding",
    "view_of",
]
