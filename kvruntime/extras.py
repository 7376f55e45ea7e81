"""What only an extra installs: said by name where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """For imports of what ``pip install 'kvruntime[name]'`` brings along. Raises ImportError that
    says so.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed: pip install 'kvruntime[{name}]'", name=error.name
        ) from error
