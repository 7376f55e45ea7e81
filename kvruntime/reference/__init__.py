"""The bundled model: a small class-conditional VAR that draws 64 x 64 emoji. See MODEL_CARD.md."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kvruntime.coding import load_coding
from kvruntime.reference.transformer import EmojiVAR
from policies import load_profile

FOLDER = Path(__file__).parent
MAX_CLASS_BYTES = 2**16
MAX_WEIGHT_BYTES = 64 * 2**20

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def load_classes(folder: Path = FOLDER) -> list[str]:
    """Names of the classes, by label. Raises ValueError for a file that is not a list of names."""
    path = folder / "classes.json"
    try:
        classes = json.loads(path.read_bytes()[:MAX_CLASS_BYTES])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{path}: not a list of names")
    return classes


def load_model(dtype: torch.dtype = torch.float32, folder: Path = FOLDER) -> EmojiVAR:
    """The model with its weights and profile. Raises ValueError for damaged or foreign files; runs
    no pickle.
    """
    path = folder / "emoji64.safetensors"
    size = path.stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise ValueError(f"{path}: {size} bytes, at most {MAX_WEIGHT_BYTES} are read")
    model = EmojiVAR(len(load_classes(folder)))
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    wanted = model.state_dict()
    if weights.keys() != wanted.keys():
        names = ", ".join(sorted(weights.keys() ^ wanted.keys())[:3])
        raise ValueError(f"{path}: other tensors than the model's: {names} ...")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape or tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"the model has {tuple(wanted[name].shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} has numbers that are not finite")
    model.load_state_dict(weights)
    profile = folder / "profile.json"
    model.profile = load_profile(profile) if profile.exists() else None
    coding = folder / "coding.safetensors"
    model.coding = load_coding(coding) if coding.exists() else None
    return model.to(dtype).eval()


__all__ = ["EmojiVAR", "load_classes", "load_model"]
