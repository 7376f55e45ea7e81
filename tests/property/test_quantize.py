"""Quantised records: the format's promises for any values, and the bytes it takes."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvruntime.storage.records
from kvruntime import CacheOptions, Pool
from kvruntime.planning import make_plan
from kvruntime.storage.layout import (
    GROUPS,
    KV_DTYPES,
    PageLayout,
    RecordFormat,
    exact_page_size,
    fitting_page_size,
    records_named,
    stored_bytes,
)
from kvruntime.storage.records import (
    dequantize,
    dequantize_scratch,
    quantize,
    quantize_scratch,
)
from policies import Allocation, CacheGeometry, Full, ScaleSchedule
from policies.scratch import lend

formats = st.builds(RecordFormat, st.sampled_from([2, 4, 8]), st.sampled_from(GROUPS))
head_dims = st.sampled_from([128, 256])
some_formats = [RecordFormat(2), RecordFormat(4, 2), RecordFormat(8, 4)]


def there_and_back(values, records, dtype=torch.float32):
    """Values [tokens, head_dim] as their records hold them."""
    out = torch.full_like(values, torch.nan, dtype=dtype)
    dequantize(quantize(values, records)[None], records, out[None])
    return out


def reference(words, records, head_dim):
    """A record decoded number by number, as the format's text says."""
    words = [int(word) & 0xFFFFFFFF for word in words]
    per_word, levels = 32 // records.bits, 2**records.bits
    size = head_dim // records.groups
    values = []
    for place in range(head_dim):
        both = np.array([words[place // size]], dtype=np.uint32).view(np.float16)
        step, shift = float(both[0]), float(both[1])
        word = words[records.groups + place // per_word]
        values.append((word >> records.bits * (place % per_word)) % levels * step + shift)
    return values


@given(records=formats, head_dim=head_dims, seed=st.integers(0, 999), spread=st.floats(1e-3, 100))
def test_a_value_is_at_most_half_a_step_off(records, head_dim, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, head_dim, generator=generator) * spread
    packed = quantize(values, records)
    assert packed.shape == (6, records.words(head_dim)) and packed.dtype == torch.int32
    grouped = values.unflatten(-1, (records.groups, -1))
    step = (grouped.amax(-1) - grouped.amin(-1)) / (2**records.bits - 1)
    there = there_and_back(values, records)
    error = (there - values).abs().unflatten(-1, (records.groups, -1)).amax(-1)
    rounding = 2.0**-11 * (grouped.abs().amax(-1) + 2**records.bits * step)  # of step and shift
    assert (error <= 0.5 * step + rounding).all()
    decoded = torch.tensor(reference(packed[5], records, head_dim))
    assert torch.allclose(there[5], decoded.float(), rtol=1e-5, atol=1e-6)


@given(records=formats, head_dim=head_dims, seed=st.integers(0, 999))
def test_what_was_quantised_once_stays_as_it_is(records, head_dim, seed):
    values = torch.randn(4, head_dim, generator=torch.Generator().manual_seed(seed))
    once = there_and_back(values, records)
    assert torch.equal(there_and_back(once, records), once)


@given(
    records=formats,
    tokens=st.integers(0, 7),
    slice_tokens=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_slices_and_what_the_scratch_held_do_not_matter(records, tokens, slice_tokens, dtype):
    """Records of any part of a pool, worked out in a workspace full of NaN, slice by slice."""
    generator = torch.Generator().manual_seed(tokens)
    values = torch.randn(tokens, 128, generator=generator).to(getattr(torch, dtype))
    wanted = quantize(values, records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvruntime.storage.records, "SLICE_TOKENS", slice_tokens)
        scratch = lend(quantize_scratch(tokens, 128, records), values.device)
        for part in scratch.values():
            part.view(torch.uint8).fill_(0xFF)
        assert all(part.shape[0] <= slice_tokens for part in scratch.values())
        out = torch.full_like(wanted, -1)
        assert quantize(values, records, out, scratch) is out
    assert torch.equal(out, wanted)
    lanes = torch.stack([wanted, wanted.flip(0)])
    scratch = lend(dequantize_scratch(2, tokens, 128, dtype, records), values.device)
    for part in scratch.values():
        part.view(torch.uint8).fill_(0xFF)
    into = torch.full((2, tokens + 2, 128), torch.nan, dtype=values.dtype)
    dequantize(lanes, records, into[:, 1 : tokens + 1], scratch)
    once = there_and_back(values, records, values.dtype)
    assert torch.equal(into[:, 1 : tokens + 1], torch.stack([once, once.flip(0)]))
    assert into[:, 0].isnan().all() and into[:, tokens + 1].isnan().all(), "wrote past its places"


@pytest.mark.parametrize("records", some_formats)
def test_constant_wide_and_missing_values(records):
    same = torch.full((1, 64), 3.25)
    assert torch.equal(there_and_back(same, records), same)
    assert not there_and_back(torch.zeros(1, 64), records).any()
    wide = torch.linspace(-6e4, 6e4, 64).unsqueeze(0)
    assert there_and_back(wide, records).isfinite().all(), "saturates"
    for outlier in (-1e5, 1e5):
        beyond = torch.zeros(1, 64)
        beyond[0, 3] = outlier
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert there_and_back(beyond, records, dtype).isfinite().all()
    assert there_and_back(torch.full((1, 64), 1e5), records).isfinite().all()
    missing = torch.zeros(2, 64)
    missing[0, 5] = torch.nan
    out = there_and_back(missing, records)
    assert out[0].isnan().any() and not out[1].any(), "a lane's NaN is not hidden"


@pytest.mark.parametrize("records", some_formats)
def test_bfloat16_is_rounded_once(records):
    """Rounding step, shift and product to bfloat16 each would cost int8 half of its precision."""
    values = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = there_and_back(values, records, torch.bfloat16)
    assert torch.equal(ours, there_and_back(values, records).bfloat16())


def test_strided_parts():
    records = RecordFormat(4, 2)
    values = torch.randn(64, 9, generator=torch.Generator().manual_seed(0)).t()
    assert torch.equal(quantize(values, records), quantize(values.contiguous(), records))
    pages = torch.full((3, 3, 20), -1, dtype=torch.int32)  # longer strides than a record
    pages[:, :, : records.words(64)] = quantize(values, records).view(3, 3, -1)
    into = torch.empty(3, 3, 64)
    dequantize(pages[:, :, : records.words(64)], records, into)
    assert torch.equal(into.flatten(0, 1), there_and_back(values.contiguous(), records))


def test_bytes_of_a_record_and_of_a_page():
    """4 bits: head_dim / 2 + 4 x groups bytes of a token, a head and a tensor."""
    for head_dim in (64, 128):
        for groups in (1, 2, 4, 8):
            records = RecordFormat(4, groups)
            assert records.num_bytes(head_dim) == head_dim // 2 + 4 * groups
            geometry = CacheGeometry(1, 1, head_dim)
            assert stored_bytes(geometry, records) == 2 * records.num_bytes(head_dim)
            half = 64 * records.num_bytes(head_dim)
            layout = PageLayout(64, half, head_dim, "bfloat16", records)
            assert layout.token_bytes == layout.stride_bytes == records.num_bytes(head_dim)
    assert RecordFormat(4, 1).num_bytes(128) / 256 == pytest.approx(0.266, abs=1e-3)
    assert RecordFormat(4, 4).num_bytes(128) / 256 == pytest.approx(0.3125)
    assert RecordFormat(2, 1).num_bytes(128) == 36 and RecordFormat(8, 1).num_bytes(128) == 132


@given(
    records=formats,
    head_dim=head_dims,
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    pages=st.integers(1, 3),
)
def test_exact_tokens_share_the_bytes_of_quantised_pages(records, head_dim, dtype, pages):
    geometry = CacheGeometry(1, 1, head_dim, dtype, dtype)
    size = exact_page_size(geometry, records, 64)
    page_bytes = 64 * stored_bytes(geometry, records)
    pool = Pool(num_pages=pages, page_bytes=page_bytes)
    exact = pool.view(PageLayout(size, page_bytes // 2, head_dim, dtype))
    packed = pool.view(PageLayout(64, page_bytes // 2, head_dim, dtype, records))
    assert pool.num_bytes == 64 * pages * stored_bytes(geometry, records)
    for part, half in ((exact.keys, pool.keys), (exact.values, pool.values)):
        assert part.shape == (pages, size, head_dim) and part.dtype == getattr(torch, dtype)
        number = torch.arange(part.numel()).view(part.shape) % 251
        part.copy_(number)  # no place twice
        assert torch.equal(part.float(), number.float())
        assert part.untyped_storage().data_ptr() == half.untyped_storage().data_ptr()
    assert packed.keys.shape == (pages, 64, records.words(head_dim))
    assert packed.keys.dtype == torch.int32 and packed.page_size == 64
    assert packed.keys.data_ptr() == exact.keys.data_ptr() != exact.values.data_ptr()


def test_a_page_must_hold_an_exact_token():
    geometry = CacheGeometry(1, 1, 128)
    assert exact_page_size(geometry, RecordFormat(4), 4) == 1
    assert exact_page_size(geometry, None, 3) == 3
    with pytest.raises(ValueError, match=r"page_size 2 is too small: its 136 bytes of int4"):
        exact_page_size(geometry, RecordFormat(4), 2)
    small = CacheGeometry(1, 1, 16, "float16", "float16")
    assert exact_page_size(small, RecordFormat(8, 4), 16) == 16, "records as large as exact tokens"
    with pytest.raises(ValueError, match="no whole number of bytes"):
        PageLayout(3, 64, 16, "float16")
    with pytest.raises(ValueError, match="2 tokens of 32 bytes do not fit half a page, 48"):
        PageLayout(2, 48, 16, "float16")
    with pytest.raises(ValueError, match="pages a multiple of 64 bytes"):
        fitting_page_size(16, 32, 4)


def test_the_start_scale():
    """650 tokens of int4 in 11 pages of 64: 121 exact tokens take 8 of 16, 265 take 17."""
    seen = [1, 5, 21, 57, 121, 265, 521, 650, 0]
    schedule = ScaleSchedule.of([(1, 1), *((1, n) for n in (4, 16, 36, 64, 144, 256, 400, 9))])

    @dataclass(frozen=True)
    class Keeping(Full):
        factor: int = 1

        def allocate(self, problem):
            tokens = np.array(seen)[:, None, None] * self.factor
            return Allocation(np.broadcast_to(tokens, (9, 2, 1)).copy())

    def start(bits, groups, factor=1):
        options = CacheOptions(page_size=64, kv_dtype=f"int{bits}", kv_groups=groups)
        geometry = CacheGeometry(2, 1, 128)
        return make_plan(geometry, schedule, Keeping(factor=factor), options, 1).start_scale

    assert start(4, 1) == 5
    assert start(4, 4) == 5
    assert start(8, 1) == 6
    assert start(2, 1) == 4
    assert start(2, 1, factor=0) == 9, "never"


def test_half_empty_pages_count_for_the_start_scale():
    """Three layers of 20 tokens: six exact pages of 16, and four of 64 are held at the end."""
    schedule = ScaleSchedule.of([(1, 20), (1, 80), 1])

    class Uneven(Full):
        def allocate(self, problem):
            tokens = np.array([[20, 20, 20], [100, 40, 40], [0, 0, 0]])
            return Allocation(tokens[:, :, None])

    options = CacheOptions(page_size=64, kv_dtype="int4")
    made = make_plan(CacheGeometry(3, 1, 128), schedule, Uneven(), options, 1)
    assert (made.exact_page_size, made.start_scale) == (16, 0)


def test_names_and_bad_ones():
    for name, bits in KV_DTYPES.items():
        assert records_named(name, 2) == RecordFormat(bits, 2)
        assert RecordFormat(bits, 2).name == name
        assert CacheOptions(kv_dtype=name, kv_groups=2).records == RecordFormat(bits, 2)
    assert CacheOptions().records is None
    for name, groups, words in (
        ("int3", 1, "'int3' is not one of int2, int4, int8"),
        ("bfloat16", 1, "is not one of"),
        ("int4", 3, r"one of \(1, 2, 4, 8\), got 3"),
        ("int4", True, "got True"),
        (None, 4, "kv_groups 4 goes with a kv_dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            CacheOptions(kv_dtype=name, kv_groups=groups)
    with pytest.raises(ValueError, match=r"bits must be one of \[2, 4, 8\], got 3"):
        RecordFormat(3)
    with pytest.raises(ValueError, match=r"multiple of 64, got 96: take fewer groups"):
        RecordFormat(4, 8).words(96)
    with pytest.raises(ValueError, match="multiple of 16, got 8"):
        RecordFormat(2, 1).words(8)
