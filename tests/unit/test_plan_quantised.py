"""Plans of quantised pages: start scales, page sizes, published sizes, bad input."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvruntime import Allocation, CacheOptions, plan
from kvruntime.planning import make_plan
from kvruntime.storage.layout import (
    PageLayout,
    RecordFormat,
    exact_page_size,
    fitting_page_size,
    records_named,
    stored_bytes,
)
from policies import DTYPE_BYTES, CacheGeometry, Full, ScaleSchedule, SlidingWindow
from tests.unit.test_plan import made_of

MIB = 2**20
SCHEDULE = ScaleSchedule.of([4, 4, 4])  # 16 tokens each


def one_lane(dtype, start=None, schedule=SCHEDULE, policy=None, budget=1, dim=32, **options):
    geometry = CacheGeometry(1, 1, dim, dtype, dtype)
    options = {"page_size": 16, "kv_dtype": "int4"} | options
    return made_of(geometry, schedule, policy or Full(), budget, kv_start=start, **options)


@pytest.mark.parametrize(("groups", "mib"), [(1, 1511), (4, 1777)])
def test_int4_pages_of_infinity_8b(groups, mib):
    made = plan("infinity-8b", 8, budget=650, kv_dtype="int4", kv_groups=groups)
    assert round(made.token_bytes / MIB) == mib
    assert made.page_format == {"kv_dtype": "int4", "kv_groups": groups, "kv_start": 5}
    assert (made.page_size, made.exact_page_size) == (64, 16)
    record = RecordFormat(4, groups).num_bytes(128)
    assert record == 64 + 4 * groups
    assert made.bytes_per_page == 2 * 64 * record
    exact = plan("infinity-8b", 8, budget=650)
    assert round(exact.token_bytes / MIB) == 5688
    assert exact.page_format == {"kv_dtype": None, "kv_groups": None, "kv_start": None}
    assert (exact.records, exact.start_scale) == (None, len(exact.schedule))


def test_the_start_scale_is_where_exact_tokens_would_take_more():
    """int4 in 16 numbers of float16: 12 bytes for 32; a page of 16 records holds 6 exact ones."""
    made = one_lane("float16", dim=16)
    assert made.exact_page_size == 6
    # 16 tokens take 3 exact pages; the quantised cache never takes more than 2
    assert made.start_scale == 0
    made = one_lane("float16", schedule=ScaleSchedule.of([1, 2, 4, 4, 4]), dim=16)
    # 1, 5, 21 and 37 tokens in exact pages: 1, 1, 4, 7; of int8, 8 to a page: 3 and 5; of int4: 3
    assert made.start_scale == 2 and made.page_tokens[:, 0].tolist() == [6, 6, 8, 16, 16]
    assert made.row_pages[:, 0].tolist() == [1, 1, 3, 3, 0]
    assert one_lane("float16", 4, ScaleSchedule.of([1, 2, 4, 4, 4]), dim=16).peak_pages == 7
    # a window of 5 never takes more than its one exact page
    made = one_lane("float16", policy=SlidingWindow(), budget=5, dim=16)
    assert made.start_scale == 3 and not made.quantised.any()


def test_a_policy_may_decide_what_is_quantised():
    schedule = ScaleSchedule.of([4, 4, 4])
    wanted = np.array([[False, True], [False, True], [True, True]])

    class Early(Full):
        def allocate(self, problem):
            return Allocation(Full.allocate(self, problem).tokens, wanted)

    geometry = CacheGeometry(2, 1, 32, "float16", "float16")
    made = made_of(geometry, schedule, Early(), 1, kv_dtype="int4", page_size=16)
    assert (made.quantised == wanted).all() and made.start_scale == 0
    assert made.page_tokens.tolist() == [[5, 16], [5, 16], [16, 16]]
    # layers one after another: 4 exact pages and 1 of records, 7 and 2, then all of it goes
    assert made.row_pages.tolist() == [[4, 5], [8, 9], [2, 0]]
    assert [made.format_after(scale, 1).records for scale in (-1, 0)] == [None, RecordFormat(4)]
    asked = made_of(geometry, schedule, Early(), 1, kv_dtype="int4", page_size=16, kv_start=1)
    assert asked.quantised.tolist() == [[False, False], [True, True], [True, True]]
    assert not made_of(geometry, schedule, Early(), 1).quantised.any()


def test_the_longest_table():
    """Exact pages hold 5 tokens of float16 where quantised ones hold 16."""
    made = one_lane("float16", 1)
    assert made.exact_page_size == 5
    assert made.page_tokens[:, 0].tolist() == [5, 16, 16]
    exact, records = made.formats[0], made.formats[-1]
    assert made.longest_table(exact) == 4  # 16 tokens, read at scale 1
    assert made.longest_table(records) == 2  # 32 tokens, read at scale 2
    assert one_lane("float16", 0).longest_table(exact) == 1


def test_other_rows():
    made = plan("infinity-2b", 1, kv_dtype="int4")
    more = plan("infinity-2b", 3, kv_dtype="int4")
    assert made.for_rows(6).total_bytes == more.total_bytes > made.total_bytes
    assert made.for_rows(6).rows == more.rows == 6
    with pytest.raises(ValueError, match=r"rows must be a positive integer up to 2\^30, got 0"):
        made.for_rows(0)


def test_formats_of_catalogue_models():
    made = plan("infinity-2b", kv_dtype="int8", kv_groups=4, kv_start=3)
    assert (made.records, made.start_scale) == (RecordFormat(8, 4), 3)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("kv_dtype", "bits"), [("int2", 2), ("int4", 4), ("int8", 8)])
def test_records_by_hand(kv_dtype, bits, groups):
    """Four bytes of step size and shift for each group, then the codes."""
    records = records_named(kv_dtype, groups)
    assert records.num_bytes(128) == 4 * groups + 128 * bits // 8 == 4 * records.words(128)
    assert records.name == kv_dtype
    geometry = CacheGeometry(1, 1, 128)
    assert stored_bytes(geometry, records) == 2 * records.num_bytes(128)
    assert stored_bytes(geometry, None) == geometry.token_bytes == 512


geometries = st.builds(
    CacheGeometry,
    st.just(1),
    st.just(1),
    st.sampled_from([8, 32, 64, 96, 128]),
    st.sampled_from(list(DTYPE_BYTES)),
    st.sampled_from(list(DTYPE_BYTES)),
)


@given(
    geometry=geometries,
    bits=st.sampled_from([2, 4, 8]),
    groups=st.sampled_from([1, 2, 4]),
    page_size=st.integers(1, 256),
)
def test_exact_tokens_in_a_page_by_brute_force(geometry, bits, groups, page_size):
    records = RecordFormat(bits, groups)
    try:
        half = page_size * records.num_bytes(geometry.head_dim)
    except ValueError:
        assume(False)
    unit = max(DTYPE_BYTES[geometry.key_dtype], DTYPE_BYTES[geometry.value_dtype])
    fitting = [
        count
        for count in range(1, half + 1)
        if count * unit * geometry.head_dim <= half
        and half % (count * unit) == 0
        and (count < 16 or count % 16 == 0)
    ]
    if not fitting:
        with pytest.raises(ValueError, match=f"page_size {page_size} is too small"):
            exact_page_size(geometry, records, page_size)
        return
    count = exact_page_size(geometry, records, page_size)
    assert count == max(fitting)
    assert exact_page_size(geometry, None, page_size) == page_size
    dtype = max((geometry.key_dtype, geometry.value_dtype), key=DTYPE_BYTES.get)
    layout = PageLayout(count, half, geometry.head_dim, dtype)
    assert layout.stride_bytes * count == half and layout.width == geometry.head_dim


@given(half=st.integers(1, 2**14).map(lambda n: 4 * n), token=st.integers(1, 2**12))
def test_tokens_that_fit_the_pages_of_a_pool(half, token):
    """All that fill a page; else as many as there is room for, evenly, in sixteens if that many."""
    if half % token == 0:
        assert fitting_page_size(half, token, 4) == half // token
        return
    fitting = [
        count
        for count in range(1, half // token + 1)
        if half % (4 * count) == 0 and (count <= 16 or count % 16 == 0)
    ]
    if not fitting:
        with pytest.raises(ValueError, match=f"pages a multiple of {2 * token} bytes"):
            fitting_page_size(half, token, 4)
    else:
        assert fitting_page_size(half, token, 4) == max(fitting)


def test_plans_for_the_pages_of_a_pool():
    """Page bytes are given: as many records and exact tokens as fit."""
    geometry = CacheGeometry(1, 1, 32, "float16", "float16")
    options = CacheOptions("full", kv_dtype="int4", kv_start=1)
    made = make_plan(geometry, SCHEDULE, Full(), options, 1, page_bytes=2048)
    assert (made.page_size, made.exact_page_size) == (32, 16)  # of 20 and 64 bytes in 1024
    assert made.bytes_per_page == 2048 and made.row_pages[:, 0].tolist() == [1, 1, 0]
    assert made.layout(made.formats[-1]).stride_bytes == 32
    assert made.layout(made.formats[0]).stride_bytes == 64


@pytest.mark.parametrize("half", [10, 62])
def test_layouts_that_cannot_be(half):
    with pytest.raises(ValueError, match=r"do not fit half a page|no whole number of bytes"):
        PageLayout(4, half, 8, "float16")


def test_bad_formats():
    for start in (True, 1.0, "1"):
        with pytest.raises(ValueError, match=r"^kv_start must be a scale, got"):
            one_lane("float16", start)
    for start in (-1, 3):
        message = rf"^kv_start must be a scale in 0\.\.2, got {start}$"
        with pytest.raises(ValueError, match=message):
            one_lane("float16", start)
    assert one_lane("float16", 2).start_scale == 2
    with pytest.raises(ValueError, match=r"^kv_start 1 goes with a kv_dtype$"):
        one_lane("float16", 1, kv_dtype=None)
    assert one_lane("float16", 1, page_size=1024).page_size == 1024
    with pytest.raises(ValueError, match=r"^quantised pages hold at most 1024 tokens, got 2048$"):
        one_lane("float16", 1, page_size=2048)
    for bits in (0, 3, 16):
        with pytest.raises(ValueError, match=rf"bits must be one of \[2, 4, 8\], got {bits}"):
            RecordFormat(bits)
