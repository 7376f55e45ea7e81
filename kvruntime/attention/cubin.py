"""Compile the kernels of the xformers back end for a GPU that need not be there.

``python -m kvruntime.attention.cubin 80 90`` prints a JSON line for each kernel, and exits 1 at the
first that does not compile. A process of its own, because Triton is given a driver that only knows
the GPU's capability, and launches become compilations. ptxas comes with triton.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from typing import Any

from kvruntime.attention.base import Lanes, last_line
from kvruntime.storage.layout import PageLayout, RecordFormat

VARIANTS: list[tuple[str, int, int, RecordFormat | None]] = [  # dtype, head_dim, page_size, records
    *(("bfloat16", 128, page_size, None) for page_size in (16, 32, 64, 128)),
    *(("bfloat16", 128, 64, RecordFormat(4, groups)) for groups in (1, 2, 4, 8)),
    ("float16", 128, 64, None),
    ("float16", 128, 128, RecordFormat(4, 1)),
    ("bfloat16", 64, 64, None),
    ("float16", 64, 16, None),
    ("bfloat16", 64, 32, RecordFormat(4, 4)),
    ("float16", 32, 16, RecordFormat(4, 2)),
]


def compile_in_a_process(
    capabilities: list[int], first_only: bool = False
) -> tuple[list[dict[str, Any]], str]:
    """What each kernel became, and the error if one did not compile, else an empty text.

    capabilities: 80 for sm_80. first_only: one variant, a few seconds; all take half a minute.
    """
    names = [str(capability) for capability in capabilities] + ["--first"] * first_only
    with tempfile.TemporaryDirectory() as folder:  # nothing may come from Triton's cache
        environment = {**os.environ, "TRITON_CACHE_DIR": folder, "TRITON_INTERPRET": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "kvruntime.attention.cubin", *names],
            capture_output=True,
            text=True,
            env=environment,
        )
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return kernels, "" if done.returncode == 0 else last_line(done.stderr)


class _Driver:
    """All that Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(capability: int, variants: list[tuple[str, int, int, RecordFormat | None]]) -> None:
    """Send every variant through the back end's own code, and print what was compiled."""
    import torch
    import triton
    from xformers.ops import fmha

    from kvruntime.attention import xformers
    from kvruntime.storage.pool import Pool
    from policies import TORCH_DTYPES

    triton.runtime.driver.set_active(_Driver(capability))
    torch.cuda.get_device_capability = lambda *args: divmod(capability, 10)
    torch.cuda.device = contextlib.nullcontext  # type: ignore[assignment, misc]
    fmha._ensure_op_supports_or_raise = lambda *args: None  # it would ask for a GPU
    launch = triton.JITFunction.run
    compiled: list[Any] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    triton.JITFunction.run = compile_only
    for dtype, head_dim, page_size, records in variants:
        token = records.num_bytes(head_dim) if records else 2 * head_dim
        layout = PageLayout(page_size, page_size * token, head_dim, dtype, records, planes=1)
        pool = Pool(num_pages=64, page_bytes=2 * layout.half_bytes, plane_bytes=2 * page_size)
        pages = pool.view(layout)
        backend = xformers.XFormers(torch.device("cpu"), TORCH_DTYPES[dtype], head_dim, 10**6)
        assert backend.reads_pages(pages, 1, True)
        # with and without splits, with and without log weights
        for rows, n, weighted in ((1, 40, False), (80, 256, False), (1, 40, True)):
            q = torch.zeros(rows, n, 1, head_dim, dtype=TORCH_DTYPES[dtype])
            tables = torch.zeros(rows, 64, dtype=torch.int64)
            lengths = torch.zeros(rows, dtype=torch.int64)
            held = Lanes(pages, tables, lengths, 64, weighted)
            backend.attend_pages(q, q, q, held, 1.0)
            for kernel in compiled:
                result = {
                    "capability": capability,
                    "dtype": dtype,
                    "head_dim": head_dim,
                    "page_size": page_size,
                    "groups": records.groups if records else None,
                    "rows": rows,
                    "queries": n,
                    "weighted": weighted,
                    "kernel": kernel.metadata.name,
                    "cubin_bytes": len(kernel.asm["cubin"]),
                    "shared_bytes": kernel.metadata.shared,
                }
                sys.stdout.write(json.dumps(result) + "\n")
            compiled.clear()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    chosen = VARIANTS[:1] if "--first" in sys.argv else VARIANTS
    for name in sys.argv[1:]:
        if name != "--first":
            _compile(int(name), chosen)
