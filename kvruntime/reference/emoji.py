"""The training pictures: Noto colour emoji, rendered with Pillow. Needed for training only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian: fonts-noto-color-emoji
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")  # Debian: unicode-data
_LINE = re.compile(r"^([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.+)$")
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_NATIVE_SIDE = 136


@dataclass(frozen=True, slots=True)
class Emoji:
    text: str
    name: str
    group: str
    subgroup: str


def read_list(path: Path = LIST) -> list[Emoji]:
    """Every fully qualified emoji without skin tone, in the order of Unicode's test file."""
    found: list[Emoji] = []
    group = subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.split(":", 1)[1].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        elif match := _LINE.match(line):
            text = "".join(chr(int(code, 16)) for code in match[1].split())
            if not _SKIN_TONES & set(text):
                found.append(Emoji(text, match[2], group, subgroup))
    return found


def render(emoji: Emoji, side: int) -> NDArray[np.uint8]:
    """The emoji on white, [side, side, 3]."""
    font = ImageFont.truetype(str(FONT), 109)
    canvas = Image.new("RGB", (_NATIVE_SIDE, _NATIVE_SIDE), "white")
    ImageDraw.Draw(canvas).text((0, 0), emoji.text, font=font, embedded_color=True)
    return np.asarray(canvas.resize((side, side), Image.Resampling.LANCZOS), dtype=np.uint8)


def load(groups: tuple[str, ...], side: int) -> tuple[list[Emoji], NDArray[np.uint8]]:
    """The distinct pictures of the groups: emoji and pixels [pictures, side, side, 3]."""
    seen: set[bytes] = set()
    kept: list[Emoji] = []
    pictures: list[NDArray[np.uint8]] = []
    for emoji in read_list():
        if emoji.group not in groups:
            continue
        pixels = render(emoji, side)
        if pixels.tobytes() in seen or pixels.min() == 255:
            continue
        seen.add(pixels.tobytes())
        kept.append(emoji)
        pictures.append(pixels)
    return kept, np.stack(pictures)
