"""attach(): put the paged cache inside someone else's model, and take it out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from kvruntime.adapters import emoji, var
from kvruntime.adapters.patching import Adapter, Attachment, ModelView, patched
from kvruntime.attention import PAGED_QUERIES
from kvruntime.errors import UnsupportedModel
from kvruntime.executor import Observer
from kvruntime.plan import choose_policy, profile_note
from policies import Policy, Profile, load_profile

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
    budget: float = 0.10,
    *,
    profile: Profile | str | Path | None = None,
    page_size: int | None = None,
    kv_dtype: str | None = None,
    kv_groups: int = 1,
    kv_start: int | None = None,
    backend: str = "auto",
    paged_queries: int = PAGED_QUERIES,
    memory: int | None = None,
    observer: Observer | None = None,
) -> Iterator[Attachment]:
    """Within the ``with`` block the model's own sampler runs on a paged cache of this policy and
    budget.

    model: a FoundationVision/VAR ``VAR`` or the bundled model, unmodified. Each call of its sampler
    is one generation; its pool is made when the first layer runs, since only then the number of
    rows is known.
    budget: a float is a fraction of the history (the tokens before the last scale), an int a token
    count.
    profile: statistics of this model, a file or an object; without one scalekv and ams_kv treat all
    layers alike.
    kv_dtype, kv_groups, kv_start: quantised pages from a scale on; backend, paged_queries: who
    computes attention; both as in PagedKVCache (docs/embedding.md).
    memory: most bytes that pool and workspace may take. observer: sees every step's queries and
    keys.

    Yields an Attachment with ``stats``. On exit the model is as it was, also after an exception.
    Raises UnsupportedModel, or ValueError for arguments that cannot work, before the model is
    touched.
    """
    seen = view(model)
    if profile is None and isinstance(policy, str):
        profile = seen.profile()
    if isinstance(policy, str) and isinstance(profile, str | Path):
        profile = load_profile(profile)
    chosen = choose_policy(policy, profile, len(seen.attentions))
    note = profile_note(policy, profile, seen.schedule)
    attachment = Attachment(
        seen,
        chosen,
        budget,
        note,
        observer,
        page_size=page_size,
        kv_dtype=kv_dtype,
        kv_groups=kv_groups,
        kv_start=kv_start,
        backend=backend,
        paged_queries=paged_queries,
        memory=memory,
    )
    with patched(seen, attachment):
        yield attachment


__all__ = ["Attachment", "attach", "view"]
