"""For the API page: lines such as "rows: how many there are" become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAMED = re.compile(r"^([A-Za-z_][\w.]*(?:\([^)]*\))?(?:, [A-Za-z_][\w.]*(?:\([^)]*\))?)*): (.*)$")


def listed(text: str) -> str:
    """Every paragraph whose lines begin with names and colons, as a list in Markdown."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines: list[str] = []
        for line in paragraph.splitlines():
            named = _NAMED.match(line)
            if named:
                lines += ["", f"- `{named[1]}`: {named[2]}"]
            else:
                is_item = any(one.startswith("- ") for one in lines)
                lines.append(f"  {line.strip()}" if is_item else line.strip())
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


class Listed(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
