"""A neighbour that keeps two threads busy: ``python -m benchmarks.load`` until its input ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

THREADS, SIDE = 2, 768


@contextmanager
def beside_load() -> Iterator[subprocess.Popen[bytes]]:
    """Meanwhile another process multiplies matrices in two threads."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[1],
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"busy\n":
            raise RuntimeError(f"the load did not start: exit code {process.wait()}")
        yield process
    finally:
        process.terminate()
        process.communicate()


def _work() -> None:
    """Ends with the process that started it, also where that one is killed: its pipe closes."""
    import torch

    torch.set_num_threads(THREADS)
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    matrix = torch.randn(SIDE, SIDE)
    out = matrix @ matrix
    sys.stdout.write("busy\n")
    sys.stdout.flush()
    while not ended.is_set():
        torch.mm(matrix, matrix, out=out)


if __name__ == "__main__":
    _work()
