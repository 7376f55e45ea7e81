"""attach(): put the paged cache inside someone else's model, and take it out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from kvruntime.adapters import emoji, var
from kvruntime.adapters.attachment import Attachment
from kvruntime.adapters.patching import Adapter, ModelView, patched
from kvruntime.errors import UnsupportedModel
from kvruntime.options import CacheOptions
from kvruntime.step.run import Observer
from kvruntime.storage.pool import Pool
from policies import Policy

_ADAPTERS: dict[str, Adapter] = {"FoundationVision/VAR": var, "kvruntime's bundled model": emoji}


def view(model: nn.Module) -> ModelView:
    """What the first fitting adapter sees in the model. Raises UnsupportedModel."""
    missing: dict[str, list[str]] = {}
    for name, adapter in _ADAPTERS.items():
        missing[name] = adapter.missing(model)
        if not missing[name]:
            return adapter.view(model)
    raise UnsupportedModel(model, missing)


@contextmanager
def attach(
    model: nn.Module,
    policy: str | Policy = "scalekv",
    budget: float | str = 0.10,
    *,
    pool: Pool | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> Iterator[Attachment]:
    """Within the ``with`` block the model's own sampler runs on a paged cache of this policy and
    budget.

    model: a FoundationVision/VAR ``VAR`` or the bundled model, unmodified. Each call of its sampler
    is one generation; its pool is made when the first layer runs, since only then the number of
    rows is known.
    budget: a float is a fraction of the history in tokens (the tokens before the last scale), an
    int a token count, "2%" a share of the bytes of the model's own history, "512MiB" bytes.
    pool: shared with other caches; None: one of its own. observer: sees every step's queries and
    keys.
    options: profile, page_size, kv_dtype, kv_groups, kv_start, backend, paged_queries, memory,
    workspace, as in CacheOptions.

    Yields an Attachment with ``stats``. On exit the model is as it was, also after an exception.
    Raises UnsupportedModel, or ValueError for arguments that cannot work, before the model is
    touched.
    """
    seen = view(model)
    chosen = CacheOptions(policy=policy, budget=budget, **options)
    if chosen.profile is None and isinstance(policy, str):
        chosen = replace(chosen, profile=seen.profile())
    attachment = Attachment(seen, chosen, pool, observer)
    try:
        try:
            with patched(seen, attachment):
                yield attachment
        finally:
            attachment.detach()
    finally:
        attachment.detach()  # again, for an interrupt in the middle of the first time


__all__ = ["Attachment", "attach", "view"]
