"""The kernels become machine code for GPUs that are not here; versions that do not fit say so."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvruntime.attention.cubin import VARIANTS, compile_in_a_process


@pytest.fixture(autouse=True)
def needs_xformers():
    pytest.importorskip("xformers", reason="NOT RUN: xformers is not installed")


@pytest.fixture(scope="module")
def compiled():
    """For both capabilities at once: half a minute each."""
    with ThreadPoolExecutor() as threads:
        both = threads.map(lambda capability: compile_in_a_process([capability]), (80, 90))
        return dict(zip((80, 90), both, strict=True))


@pytest.mark.parametrize("capability", [80, 90])
def test_every_variant_compiles(compiled, capability):
    kernels, error = compiled[capability]
    assert not error
    seen = {(k["dtype"], k["head_dim"], k["page_size"], k["groups"]) for k in kernels}
    assert seen == {(d, h, p, row.groups if row else None) for d, h, p, row in VARIANTS}
    assert all(kernel["capability"] == capability for kernel in kernels)
    assert all(kernel["cubin_bytes"] > 10_000 for kernel in kernels)
    assert all(kernel["shared_bytes"] <= 163 * 1024 for kernel in kernels), "what sm_80 has"
    names = [kernel["kernel"] for kernel in kernels]
    assert names.count("_fwd_kernel_splitK") == 2 * 2 * len(VARIANTS)  # pages and fresh tokens
    assert names.count("_splitK_reduce") >= len(VARIANTS)


def test_a_kernel_that_does_not_compile_is_an_error():
    kernels, error = compile_in_a_process([10], first_only=True)
    assert error and not kernels


def test_a_triton_without_block_pointers_is_named():
    """As triton 3.9 is: the names that the kernel uses are gone."""
    code = (
        "import triton.language as tl\n"
        "del tl.make_block_ptr\n"
        "import sys, runpy\n"
        "sys.argv = ['cubin', '90', '--first']\n"
        "runpy.run_module('kvruntime.attention.cubin', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "make_block_ptr" in done.stderr
