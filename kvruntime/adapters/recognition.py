"""Whether a model is one of its authors' code, as they publish it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any


def not_a(thing: Any, module: str, name: str) -> list[str]:
    """Nothing if the object is of that class, or of one derived from it, in a module whose name
    ends so; else what is missing. Packages may be vendored under another name.
    """
    for kind in type(thing).__mro__:
        if kind.__name__ == name and kind.__module__.split(".")[-1] == module:
            return []
    return [f"the class {module}.{name}, it is {type(thing).__module__}.{type(thing).__name__}"]


def lacking(thing: Any, path: str, names: Sequence[str]) -> list[str]:
    """Those of ``path.name`` that the object lacks."""
    return [f"{path}.{name}" for name in names if not hasattr(thing, name)]


def other_arguments(thing: Any, path: str, method: str, names: Sequence[str]) -> list[str]:
    """Nothing if the method of the object's class takes these arguments first, in this order."""
    found = list(inspect.signature(getattr(type(thing), method)).parameters)[1:]
    if found[: len(names)] == list(names):
        return []
    return [f"{path}.{method}({', '.join(names)}), it takes ({', '.join(found)})"]
