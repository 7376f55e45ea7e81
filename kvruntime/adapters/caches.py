"""The paged caches of one attached model: one for each schedule and number format it draws in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvruntime.adapters.embedding import View
from kvruntime.admission import Admission
from kvruntime.cache import PagedKVCache
from kvruntime.errors import BackendUnavailable
from kvruntime.options import CacheOptions
from kvruntime.step.run import Observer
from kvruntime.storage.pool import Pool
from policies import CacheGeometry, ScaleSchedule

_MOST = 8  # caches kept; making one plans it anew
_Formats = tuple[torch.dtype, torch.dtype, torch.dtype]  # cached, the model's own keys and values


class Caches:
    """Memory is kept for the cache that served last."""

    def __init__(
        self,
        view: View,
        options: CacheOptions,
        pool: Pool | None,
        admission: Admission | None,
        observer: Observer | None,
        key_dtype: torch.dtype | None,
    ) -> None:
        self._view, self._options = view, options
        self._pool, self._admission = pool, admission
        self._observer, self._key_dtype = observer, key_dtype
        self._made: dict[tuple[ScaleSchedule, _Formats, torch.device], PagedKVCache] = {}
        self.latest: PagedKVCache | None = None

    def expected(self, schedule: ScaleSchedule) -> PagedKVCache:
        """The one that the model will probably need, by the number format of its weights.

        Raises what PagedKVCache raises. Float32 weights on a back end that cannot do that may yet
        run under autocast; if they do not, the first step refuses.
        """
        weight = _weight(self._view)
        formats = [self.dtype(weight)]
        if formats == [torch.float32]:
            formats += [torch.bfloat16, torch.float16]
        for dtype in formats:
            try:
                return self._cache(schedule, (dtype, dtype, dtype), weight.device)
            except BackendUnavailable:
                if dtype == formats[-1]:
                    raise
        raise AssertionError("the last one has raised")

    def of(self, schedule: ScaleSchedule, k: Tensor, v: Tensor) -> PagedKVCache:
        """The one for keys and values as the model would cache them itself."""
        cache = self._cache(schedule, (self.dtype(v), k.dtype, v.dtype), v.device)
        if self.latest is not cache and self.latest is not None:
            self.latest.let_go()
        self.latest = cache
        return cache

    def dtype(self, v: Tensor) -> torch.dtype:
        """What the cache keeps and computes in: that of ``attended``, unless asked otherwise."""
        return self._key_dtype or self.attended(v)

    @staticmethod
    def attended(v: Tensor) -> torch.dtype:
        """What the model's attention would compute in: under autocast that, else V's."""
        device = v.device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if casts and v.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return v.dtype

    def _cache(
        self, schedule: ScaleSchedule, formats: _Formats, device: torch.device
    ) -> PagedKVCache:
        key = (schedule, formats, device)
        if key not in self._made:
            cached, keys, values = (str(dtype).removeprefix("torch.") for dtype in formats)
            view = self._view
            sizes = (len(view.attentions), view.heads, view.head_dim)
            made = PagedKVCache(
                CacheGeometry(*sizes, cached, cached),
                schedule,
                self._options,
                softmax_scale=view.softmax_scale,
                pool=self._pool,
                admission=self._admission,
                device=device,
                observer=self._observer,
                own=CacheGeometry(*sizes, keys, values),
            )
            while len(self._made) >= _MOST:
                self._made.pop(next(iter(self._made)))
            self._made[key] = made
        if self.latest is None:
            self.latest = self._made[key]
        return self._made[key]

    def let_go(self) -> None:
        """Free what is kept between generations."""
        for cache in self._made.values():
            cache.let_go()


def _weight(view: View) -> Tensor:
    """Some number of the model's, for its format and device."""
    for module in (*view.attentions, view.model):
        if isinstance(module, nn.Module):
            for weight in module.parameters():
                return weight.detach().new_empty(0)
    return torch.empty(0)
