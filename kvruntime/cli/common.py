"""What the commands share: options, exit codes, JSON."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from kvruntime.errors import KVRuntimeError, OutOfPages, WillNeverFit
from kvruntime.options import check_budget
from kvruntime.storage.layout import CODED, KV_DTYPES
from policies import POLICY_NAMES

BAD_INPUT, NOT_ENOUGH_MEMORY = 2, 3

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
BudgetText = Annotated[
    str,
    typer.Option(
        help="0.10: a fraction of the history (tokens before the last scale); 650: tokens; "
        "2%: of the bytes of the model's own history; 512MiB: bytes."
    ),
]
KVDtype = Annotated[
    str | None, typer.Option(help=f"Pages in fewer bits: {', '.join((*KV_DTYPES, *CODED))}.")
]
KVGroups = Annotated[int, typer.Option(help="Groups of a quantised row: 1, 2, 4 or 8.")]
KVStart = Annotated[
    int | None, typer.Option(help="Scale from which pages are quantised; by default planned.")
]
PolicyName = Annotated[str, typer.Option(help=f"One of {', '.join(POLICY_NAMES)}.")]


def parse_budget(text: str) -> float | str:
    """A share or a size in bytes as it stands, a float where the text has a point or an exponent,
    else an int. Raises ValueError.
    """
    text = text.strip()
    if re.search(r"[%a-df-zA-DF-Z]", text) and text.lower() not in ("nan", "inf", "-inf"):
        check_budget(text)
        return text
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        raise ValueError(
            f"budget must be a number such as 0.10 or 650, or bytes such as 2%, got {text!r}"
        ) from None


@contextmanager
def exit_codes() -> Iterator[None]:
    """Errors as one line on stderr: exit code 3 for too little memory, 2 for bad input."""
    try:
        if sys.stdout is None:  # as a shell's >&- leaves it
            raise OSError("standard output is closed")
        yield
        sys.stdout.flush()  # while an error can still be told
    except (WillNeverFit, OutOfPages, MemoryError) as error:
        Console(stderr=True).print(
            f"not enough memory: {error}", style="red", markup=False, soft_wrap=True
        )
        raise typer.Exit(NOT_ENOUGH_MEMORY) from None
    except BrokenPipeError:  # the reader has gone: nobody to tell
        raise typer.Exit(BAD_INPUT) from None
    except (ValueError, OverflowError, KVRuntimeError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
    finally:
        _drop_what_cannot_be_written()


def _drop_what_cannot_be_written() -> None:
    """Else Python tries once more when it ends, and exits with a code of its own."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
