"""What to draw: prompts from a file, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError
from torch import Tensor

from kvruntime.extras import extra

MOST_BYTES = 2**24
_Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=10_000)]


class _Line(BaseModel):
    """An object of a JSON file; what else it says is not looked at."""

    model_config = ConfigDict(extra="ignore")

    prompt: _Prompt


_PROMPTS = TypeAdapter(list[_Prompt | _Line])


def read_prompts(path: Path) -> list[str]:
    """Of a .json file, a list of texts or of objects with a "prompt"; of a .jsonl one, one of these
    a line; of any other, a text a line. Raises ValueError for a file that is too large, empty or
    something else.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path}: {size} bytes, at most {MOST_BYTES} are read")
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]
        if path.suffix.lower() == ".json":
            given = _PROMPTS.validate_json(text)
        elif path.suffix.lower() == ".jsonl":
            given = _PROMPTS.validate_json(f"[{','.join(lines)}]")
        else:
            given = _PROMPTS.validate_python(lines)
    except (ValidationError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: prompts are lines of text, or JSON, a list of texts or of objects with a "
            f'"prompt": {error}'
        ) from None
    if not given:
        raise ValueError(f"{path} has no prompts")
    return [one if isinstance(one, str) else one.prompt for one in given]


def class_numbers(prompts: Sequence[str], count: int, names: Sequence[str] = ()) -> Tensor:
    """Labels of class-conditional models, [prompts]: each prompt a number below ``count``, or a
    name. Raises ValueError that says what there is.
    """
    found = []
    for prompt in prompts:
        if prompt in names:
            found.append(list(names).index(prompt))
        elif prompt.isdecimal() and len(prompt) < 10 and int(prompt) < count:
            found.append(int(prompt))
        else:
            others = f" or one of {', '.join(names)}" if names else ""
            raise ValueError(f"{prompt!r} is no class: a number of 0..{count - 1}{others}")
    return torch.tensor(found)


@cache
def text_encoder(folder: Path, device: torch.device) -> Callable[[Sequence[str]], list[Tensor]]:
    """Features of prompts, float32 [tokens, channels] each, by the T5 encoder that transformers
    reads from this folder (safetensors only). Infinity's is google/flan-t5-xl, at most 512 tokens.
    """
    with extra("text"):
        from transformers import AutoTokenizer, T5EncoderModel
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder with a T5 encoder, as google/flan-t5-xl")
    where: dict[str, Any] = {"pretrained_model_name_or_path": folder, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = T5EncoderModel.from_pretrained(**where, use_safetensors=True, dtype=dtype)
    model.to(device).eval().requires_grad_(False)

    def encode(prompts: Sequence[str]) -> list[Tensor]:
        tokens = tokenizer(
            list(prompts), max_length=512, padding=True, truncation=True, return_tensors="pt"
        ).to(device)
        with torch.inference_mode():
            features = model(**tokens)["last_hidden_state"].float()
        lengths = tokens["attention_mask"].sum(-1).tolist()
        return [line[:length] for line, length in zip(features, lengths, strict=True)]

    return encode
