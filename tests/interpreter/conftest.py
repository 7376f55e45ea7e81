"""xformers' own kernel on a CPU: Triton must be told to interpret before it is first imported."""

import os
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.interpreter)
            # the interpreter's numpy divides by the zero weights of empty lanes, like the kernel
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"))


@pytest.fixture(scope="session")
def xformers():
    """The back end's module; without xformers nothing here can run, and says so."""
    try:
        from kvruntime.attention import xformers
    except ImportError as error:
        pytest.skip(f"NOT RUN: {error}")
    assert xformers.IS_INTERPRETED, "triton was imported before TRITON_INTERPRET was set"
    return xformers
