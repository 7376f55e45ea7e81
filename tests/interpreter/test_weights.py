"""Log weights in the paged kernel: lines of xformers' own source that are moved at run time."""

import inspect
import math

import pytest
import torch

from kvruntime.storage.layout import RecordFormat
from tests.interpreter.cached import EXACT, Cached, make


@pytest.fixture(scope="module")
def operators(xformers):
    from kvruntime.attention import operators

    return operators


@pytest.fixture
def published(operators):
    """The text of xformers' kernel as it is installed."""
    return inspect.getsource(operators.splitk_kernels._fwd_kernel_splitK.fn)


def test_the_moved_lines_are_where_they_were(operators, published):
    """Another xformers must be looked at: the block stands at the end of the branch without pages,
    and the loop adds the bias in either.
    """
    before, _, rest = published.partition(operators._BIAS)
    block, end, loop = rest.partition(operators._AFTER_BIAS)
    assert before.count("\n    if PAGE_SIZE > 0:\n") == 1 and end
    branch = before.partition("\n    if PAGE_SIZE > 0:\n")[2].partition("\n    else:\n")[2]
    for line in (branch + block).split("\n"):
        assert not line.strip() or line.startswith("        "), "the branch ends with the block"
    assert block.count("additive_bias_block_ptr = tl.make_block_ptr(") == 1
    assert published.count("additive_bias_block_ptr = tl.make_block_ptr(") == 1
    assert loop.count(operators._BIAS) == 1
    assert loop.count("tl.advance(additive_bias_block_ptr, (0, BLOCK_N))") == 1


def test_a_kernel_without_them_is_refused(operators, monkeypatch):
    for name in ("_BIAS", "_AFTER_BIAS"):
        with monkeypatch.context() as patch:
            patch.setattr(operators, name, "        if OTHER:\n")
            with pytest.raises(RuntimeError, match="no bias for pages"):
                operators.paged_operator.__wrapped__(64, 1, True)


def test_xformers_own_kernel_stays(operators):
    before = operators.splitk_kernels._fwd_kernel_splitK
    operators.paged_operator.__wrapped__(64, 1, True)
    assert operators.splitk_kernels._fwd_kernel_splitK is before


@pytest.mark.parametrize("records", [None, RecordFormat(4, 2)])
def test_the_weights_count(xformers, records, monkeypatch):
    """Negative controls: without them, or with another lane's, the error is not small."""
    cached = Cached(16, 32, records, [90, 3, 40, 60], weighted=True)
    right = cached.worst_error(xformers, 5)
    assert right < cached.bound
    page_bias = xformers._page_bias
    with monkeypatch.context() as patch:
        patch.setattr(xformers, "_page_bias", lambda held: page_bias(held) * 0)
        assert cached.worst_error(xformers, 5) > 10 * EXACT
    with monkeypatch.context() as patch:
        patch.setattr(xformers, "_page_bias", lambda held: page_bias(held).roll(1, 0))
        assert cached.worst_error(xformers, 5) > 10 * EXACT


def test_a_token_of_weight_seven_is_seven_equal_ones(xformers):
    """What folding rests on."""
    one = Cached(16, 32, None, [1, 1], weighted=True)
    many = Cached(16, 32, None, [7, 7])
    one.pages.planes.fill_(math.log(7))
    token, (q, k, v) = torch.randn(32).half(), torch.randn(3, 1, 4, 2, 32).half()
    for cached in (one, many):
        for part in (cached.pages.keys, cached.pages.values):
            part.copy_(token.expand_as(part))
    backend = make(xformers, 10**6)
    outs = [backend.attend_pages(q, k, v, held.lanes(), 0.2) for held in (one, many)]
    assert (outs[0] - outs[1]).abs().max() < EXACT
