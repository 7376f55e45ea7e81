"""In place of packages that others' code imports and sampling on a CPU can do without.

Only on demand: ``build(..., stand_ins=True)``. Whatever is not computed here raises when it is
called.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAND_INS = {
    "flash_attn": "flash_attn_varlen_kvpacked_func is computed by torch, sequence by sequence",
    "timm": "DropPath lets everything through, as it does in eval mode",
    "huggingface_hub": "PyTorchModelHubMixin does nothing",
    "torchvision": "whatever is called of it raises",
    "imageio": "whatever is called of it raises",
}


@contextmanager
def standing_in() -> Iterator[None]:
    """Modules for those of STAND_INS that are not installed, as long as others' code is imported;
    each is logged.
    """
    absent = [name for name in STAND_INS if name not in sys.modules and not _is_installed(name)]
    if "flash_attn" in absent and _is_installed("xformers"):
        importlib.import_module("xformers.ops")  # it looks for flash-attn while it is imported
    modules = {module.__name__: module for name in absent for module in _modules(name)}
    sys.modules.update(modules)
    for name in absent:
        logging.getLogger(__name__).warning("stands in for %s: %s", name, STAND_INS[name])
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _modules(name: str) -> list[ModuleType]:
    if name == "flash_attn":
        return [
            _module(
                name,
                flash_attn_func=_refusal("flash_attn.flash_attn_func"),
                flash_attn_varlen_kvpacked_func=varlen_kvpacked,
            )
        ]
    if name == "timm":
        layers = _module("timm.models.layers", DropPath=DropPath, drop_path=_refusal("drop_path"))
        models = _module("timm.models", register_model=lambda function: function, layers=layers)
        loss = _module("timm.loss", SoftTargetCrossEntropy=type("SoftTargetCrossEntropy", (), {}))
        return [_module(name, models=models, loss=loss), models, layers, loss]
    if name == "huggingface_hub":
        return [_module(name, PyTorchModelHubMixin=PyTorchModelHubMixin)]
    if name == "torchvision":
        transforms = _module("torchvision.transforms")
        return [_module(name, transforms=transforms), transforms]
    return [_module(name)]


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    module.__spec__ = ModuleSpec(name, loader=None, is_package=True)
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    return module


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ImportError(f"{name} is called, and only a stand-in for it is there: install it")

    return refuse


def varlen_kvpacked(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> Tensor:
    """flash-attn's function: q [queries, heads, head_dim], kv [keys, 2, heads, head_dim], each a
    run of sequences that end where the cumulated lengths say. Returns the shape of q.
    """
    if dropout_p:
        raise ValueError(f"the stand-in has no dropout, got {dropout_p}")
    count = cu_seqlens_q.shape[0] - 1
    if q.shape[0] == count * max_seqlen_q and kv.shape[0] == count * max_seqlen_k:
        parts = (q, *kv.unbind(1))  # all as long as the longest: no length need be read back
        query, key, value = (
            part.view(count, -1, *part.shape[1:]).transpose(1, 2) for part in parts
        )
        batch = F.scaled_dot_product_attention(query, key, value, scale=softmax_scale)
        return batch.transpose(1, 2).flatten(0, 1)
    out = torch.empty_like(q)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(count):
        queries, keys = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        k, v = kv[keys].unbind(1)
        query, key, value = (part.transpose(0, 1)[None] for part in (q[queries], k, v))
        one = F.scaled_dot_product_attention(query, key, value, scale=softmax_scale)
        out[queries] = one[0].transpose(0, 1)
    return out


class DropPath(nn.Module):
    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop_prob:
            raise ImportError("timm's DropPath is needed to train, and only a stand-in is there")
        return x


class PyTorchModelHubMixin:
    def __init_subclass__(cls, **_: Any) -> None:
        super().__init_subclass__()
