"""The kernels become machine code for GPUs that are not here; versions that do not fit say so."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvruntime.attention.cubin import VARIANTS, compile_in_a_process

CAPABILITIES = (80, 90)


@pytest.fixture(scope="session")
def compiled():
    """For both capabilities at once, half a minute each; once for whoever asks."""
    pytest.importorskip("xformers", reason="NOT RUN: xformers is not installed")
    with ThreadPoolExecutor() as threads:
        both = threads.map(lambda capability: compile_in_a_process([capability]), CAPABILITIES)
        return dict(zip(CAPABILITIES, both, strict=True))


def test_the_first_variant_compiles():
    """For every capability in one process; the others with ``make test-full``."""
    pytest.importorskip("xformers", reason="NOT RUN: xformers is not installed")
    kernels, error = compile_in_a_process(list(CAPABILITIES), first_only=True)
    assert not error
    assert {kernel["capability"] for kernel in kernels} == set(CAPABILITIES)
    assert all(kernel["cubin_bytes"] > 10_000 for kernel in kernels)


@pytest.mark.full
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_variant_compiles(compiled, capability):
    kernels, error = compiled[capability]
    assert not error
    seen = {(k["dtype"], k["head_dim"], k["page_size"], k["groups"]) for k in kernels}
    assert seen == {
        (dtype, head_dim, page_size, records.groups if records else None)
        for dtype, head_dim, page_size, records in VARIANTS
    }
    assert all(kernel["capability"] == capability for kernel in kernels)
    assert all(kernel["cubin_bytes"] > 10_000 for kernel in kernels)
    assert all(kernel["shared_bytes"] <= 163 * 1024 for kernel in kernels), "what sm_80 has"
    names = [kernel["kernel"] for kernel in kernels]
    assert names.count("_fwd_kernel_splitK") == 3 * len(VARIANTS)
    assert names.count("_splitK_reduce") >= len(VARIANTS)


@pytest.mark.full
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_variant_compiles_with_log_weights(compiled, capability):
    """Another kernel than without: the moved lines are in it."""
    kernels, _ = compiled[capability]

    def sizes(weighted):
        return [
            kernel["cubin_bytes"]
            for kernel in kernels
            if kernel["weighted"] == weighted
            and kernel["rows"] == 1
            and kernel["kernel"] == "_fwd_kernel_splitK"
        ]

    assert len(sizes(True)) == len(sizes(False)) == len(VARIANTS)
    assert all(ours != plain for ours, plain in zip(sizes(True), sizes(False), strict=True))


def compile_with(change, folder):
    """The compiling process, after a change to what it imports; nothing comes from a cache."""
    pytest.importorskip("xformers", reason="NOT RUN: xformers is not installed")
    code = (
        f"{change}\n"
        "import sys, runpy\n"
        "sys.argv = ['cubin', '90', '--first']\n"
        "runpy.run_module('kvruntime.attention.cubin', run_name='__main__')\n"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.full
def test_a_kernel_that_does_not_compile_is_an_error():
    pytest.importorskip("xformers", reason="NOT RUN: xformers is not installed")
    kernels, error = compile_in_a_process([10], first_only=True)
    assert error and not kernels


@pytest.mark.full
def test_a_triton_without_block_pointers_is_named(tmp_path):
    """As triton 3.9 is: the names that the kernel uses are gone."""
    done = compile_with("import triton.language as tl\ndel tl.make_block_ptr", tmp_path)
    assert done.returncode == 1
    assert "make_block_ptr" in done.stderr
