"""Quantised rows: the format's promises for any values, and the bytes it takes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvruntime.formats import (
    GROUPS,
    KV_DTYPES,
    RowFormat,
    default_start,
    exact_page_size,
    row_format,
    stored_bytes,
)
from kvruntime.pool import Pool
from kvruntime.quantize import dequantize, quantize
from policies import CacheGeometry

rows = st.builds(RowFormat, st.sampled_from([2, 4, 8]), st.sampled_from(GROUPS))
head_dims = st.sampled_from([128, 256])


def there_and_back(values, row, dtype=torch.float32):
    out = torch.full_like(values, torch.nan, dtype=dtype)
    dequantize(quantize(values, row), row, out)
    return out


def reference(row_words, row, head_dim):
    """A row decoded number by number, as the format's text says."""
    words = [int(word) & 0xFFFFFFFF for word in row_words]
    per_word, levels = 32 // row.bits, 2**row.bits
    size = head_dim // row.groups
    values = []
    for place in range(head_dim):
        both = np.array([words[place // size]], dtype=np.uint32).view(np.float16)
        scale, shift = float(both[0]), float(both[1])
        word = words[row.groups + place // per_word]
        values.append((word >> row.bits * (place % per_word)) % levels * scale + shift)
    return values


@given(row=rows, head_dim=head_dims, seed=st.integers(0, 999), spread=st.floats(1e-3, 100))
def test_a_value_is_at_most_half_a_step_off(row, head_dim, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 3, head_dim, generator=generator) * spread
    packed = quantize(values, row)
    assert packed.shape == (2, 3, row.words(head_dim)) and packed.dtype == torch.int32
    grouped = values.unflatten(-1, (row.groups, -1))
    step = (grouped.amax(-1) - grouped.amin(-1)) / (2**row.bits - 1)
    error = (there_and_back(values, row) - values).abs().unflatten(-1, (row.groups, -1)).amax(-1)
    rounding = 2.0**-11 * (grouped.abs().amax(-1) + 2**row.bits * step)  # of scale and shift
    assert (error <= 0.5 * step + rounding).all()
    decoded = torch.tensor(reference(packed[1, 2], row, head_dim))
    assert torch.allclose(there_and_back(values, row)[1, 2], decoded.float(), rtol=1e-5, atol=1e-6)


@given(row=rows, head_dim=head_dims, seed=st.integers(0, 999))
def test_what_was_quantised_once_stays_as_it_is(row, head_dim, seed):
    values = torch.randn(4, head_dim, generator=torch.Generator().manual_seed(seed))
    once = there_and_back(values, row)
    assert torch.equal(there_and_back(once, row), once)


@pytest.mark.parametrize("row", [RowFormat(2), RowFormat(4, 2), RowFormat(8, 4)])
def test_constant_wide_and_missing_values(row):
    same = torch.full((1, 64), 3.25)
    assert torch.equal(there_and_back(same, row), same)
    assert not there_and_back(torch.zeros(1, 64), row).any()
    wide = torch.linspace(-6e4, 6e4, 64).unsqueeze(0)
    assert there_and_back(wide, row).isfinite().all(), "saturates"
    for outlier in (-1e5, 1e5):
        beyond = torch.zeros(1, 64)
        beyond[0, 3] = outlier
        assert there_and_back(beyond, row).isfinite().all()
    assert there_and_back(torch.full((1, 64), 1e5), row).isfinite().all()
    missing = torch.zeros(2, 64)
    missing[0, 5] = torch.nan
    out = there_and_back(missing, row)
    assert out[0].isnan().any() and not out[1].any(), "a lane's NaN is not hidden"


@pytest.mark.parametrize("row", [RowFormat(2), RowFormat(4, 2), RowFormat(8, 4)])
def test_bfloat16_is_rounded_once(row):
    """Rounding scale, shift and product to bfloat16 each would cost int8 half of its precision."""
    packed = quantize(torch.randn(50, 64).bfloat16(), row)
    ours, exact = torch.empty(50, 64, dtype=torch.bfloat16), torch.empty(50, 64)
    dequantize(packed, row, ours)
    dequantize(packed, row, exact)
    assert torch.equal(ours, exact.bfloat16())


def test_strided_parts_and_empty_ones():
    row = RowFormat(4, 2)
    values = torch.randn(2, 7, 3, 64).transpose(1, 2)
    assert torch.equal(quantize(values, row), quantize(values.contiguous(), row))
    into = torch.zeros(2, 3, 9, 64)
    dequantize(quantize(values, row), row, into[:, :, 1:8])
    assert torch.equal(into[:, :, 1:8], there_and_back(values, row))
    assert not into[:, :, 0].any() and not into[:, :, 8].any()
    assert quantize(values[:, :, :0], row).shape == (2, 3, 0, row.words(64))


def test_bytes_of_a_row_and_of_a_pool():
    """4 bits: head_dim / 2 + 4 x groups bytes of a token, a head and a tensor."""
    for head_dim in (64, 128):
        for groups in (1, 2, 4, 8):
            row = RowFormat(4, groups)
            assert row.row_bytes(head_dim) == head_dim // 2 + 4 * groups
            geometry = CacheGeometry(1, 1, head_dim)
            pool = Pool(10, 64, geometry, torch.device("cpu"), row)
            for part in (pool.quantised.keys, pool.quantised.values):
                assert part.untyped_storage().nbytes() == 640 * (head_dim // 2 + 4 * groups)
            assert pool.exact.keys.untyped_storage().data_ptr() == (
                pool.quantised.keys.untyped_storage().data_ptr()
            )
    assert RowFormat(4, 1).row_bytes(128) / 256 == pytest.approx(0.266, abs=1e-3)
    assert RowFormat(4, 4).row_bytes(128) / 256 == pytest.approx(0.3125)
    assert RowFormat(2, 1).row_bytes(128) == 36 and RowFormat(8, 1).row_bytes(128) == 132


@given(
    row=rows,
    head_dim=head_dims,
    dtypes=st.tuples(*[st.sampled_from(["float32", "bfloat16", "float16"])] * 2),
    pages=st.integers(1, 3),
)
def test_exact_tokens_share_the_bytes_of_quantised_pages(row, head_dim, dtypes, pages):
    geometry = CacheGeometry(1, 1, head_dim, *dtypes)
    size = exact_page_size(geometry, row, 64)
    assert 64 % size == 0
    pool = Pool(pages, 64, geometry, torch.device("cpu"), row)
    for part, dtype in ((pool.exact.keys, dtypes[0]), (pool.exact.values, dtypes[1])):
        assert part.shape == (pages, size, head_dim) and part.dtype == getattr(torch, dtype)
        part.copy_(torch.arange(part.numel()).view(part.shape) % 251)  # no place twice
        assert torch.equal(
            part.float(), (torch.arange(part.numel()).view(part.shape) % 251).float()
        )
    assert stored_bytes(geometry, row) * 64 * pages == sum(
        part.untyped_storage().nbytes() for part in (pool.exact.keys, pool.exact.values)
    )


def test_a_page_must_hold_an_exact_token():
    geometry = CacheGeometry(1, 1, 128)
    assert exact_page_size(geometry, RowFormat(4), 4) == 1
    assert exact_page_size(geometry, None, 3) == 3
    with pytest.raises(ValueError, match=r"page_size must be a multiple of 4 for int4 .* got 2"):
        exact_page_size(geometry, RowFormat(4), 2)
    small = CacheGeometry(1, 1, 16, "float16", "float16")
    assert exact_page_size(small, RowFormat(8, 4), 16) == 16, "rows as large as exact tokens"


def test_the_start_scale():
    """650 tokens of int4 are worth 172.7 of bfloat16: 121 tokens are exact, 265 are not."""
    seen = np.array([1, 5, 21, 57, 121, 265, 521, 650, 0])
    lengths = np.repeat(seen[:, None, None], 2, axis=1)
    geometry = CacheGeometry(2, 1, 128)
    assert default_start(lengths, geometry, RowFormat(4, 1)) == 5
    assert default_start(lengths, geometry, RowFormat(4, 4)) == 5
    assert default_start(lengths, geometry, RowFormat(8, 1)) == 6
    assert default_start(lengths, geometry, RowFormat(2, 1)) == 4
    assert default_start(lengths * 0, geometry, RowFormat(2, 1)) == len(lengths)


def test_names_and_bad_ones():
    assert row_format(None, 1) is None
    for name, bits in KV_DTYPES.items():
        assert row_format(name, 2) == RowFormat(bits, 2) and RowFormat(bits, 2).name == name
    for name, groups, words in (
        ("int3", 1, "'int3' is not one of int2, int4, int8"),
        ("bfloat16", 1, "is not one of"),
        ("int4", 3, r"one of \(1, 2, 4, 8\), got 3"),
        ("int4", True, "got True"),
        (None, 4, "kv_groups 4 goes with a kv_dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            row_format(name, groups)
    with pytest.raises(ValueError, match=r"bits must be one of \[2, 4, 8\], got 3"):
        RowFormat(3)
    with pytest.raises(ValueError, match=r"multiple of 64, got 96: take fewer groups"):
        RowFormat(4, 8).words(96)
    with pytest.raises(ValueError, match="multiple of 16, got 8"):
        RowFormat(2, 1).words(8)
