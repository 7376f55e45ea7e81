"""Plans of quantised pages: scratch byte by byte, start scales, page sizes, bad input."""

import numpy as np
import pytest

from kvruntime.formats import RowFormat
from kvruntime.plan import plan, plan_generation
from policies import CacheGeometry, Full, ScaleSchedule
from policies.scalekv import ScaleKV
from policies.sliding_window import SlidingWindow

SCHEDULE = ScaleSchedule.of([4, 4, 4])  # 16 tokens each
ID = 8  # bytes of a page id, a length or a slot
COEFFICIENTS = 28  # scratch for scale and shift of a group


def one_lane(dtype, row, start, schedule=SCHEDULE, policy=None, budget=1, page_size=16, dim=32):
    geometry = CacheGeometry(1, 1, dim, dtype, dtype)
    policy = Full() if policy is None else policy
    return plan_generation(
        geometry, schedule, policy, budget, 1, page_size, row=row, start_scale=start
    )


def test_scratch_of_reading():
    """The last scale reads 32 int4 tokens of 32 numbers: in bfloat16 this outweighs writing 16."""
    made = one_lane("bfloat16", RowFormat(4), 0)
    # the row of 20 bytes, its 16 bytes of codes once shifted and once masked, float32 values
    token = 20 + 2 * 16 + COEFFICIENTS + 4 * 32
    assert made.workspace_row_tokens == 48
    assert made.workspace_bytes == 48 * 32 * 4 + 32 * token + (2 + 1) * ID


@pytest.mark.parametrize(
    ("row", "size", "codes"), [(RowFormat(4), 20, 16), (RowFormat(8, 2), 40, 32)]
)
def test_scratch_of_writing(row, size, codes):
    """float16 values are read without a float32 copy, so writing 16 tokens weighs more."""
    made = one_lane("float16", row, 0)
    # the finished row, and three numbers of it in torch's indexing; a slice that passes: the row,
    # two copies of the codes, the token, and float32 and a byte of each number
    token = size + 3 * ID + size + 2 * codes + row.groups * COEFFICIENTS + 2 * 32 + 5 * 32
    assert made.workspace_bytes == 48 * 32 * 4 + 16 * token + (1 + 1 + 16) * ID


def test_scratch_of_slices():
    """1600 tokens are written and 3200 read: 1024 at a time."""
    schedule = ScaleSchedule.of([40, 40, 40])
    gather = 4800 * 32
    wrote = 1600 * (20 + 3 * ID) + 1024 * (20 + 32 + COEFFICIENTS + 2 * 32 + 5 * 32)
    made = one_lane("float16", RowFormat(4), 0, schedule)
    assert made.workspace_bytes == gather * 4 + wrote + (100 + 1 + 1600) * ID
    # 30 new tokens at the last but one: reading all others outweighs that
    schedule = ScaleSchedule.of([40, (5, 6), 1])
    made = one_lane("bfloat16", RowFormat(4), 0, schedule, page_size=64)
    read = 1024 * (20 + 32 + COEFFICIENTS + 4 * 32)
    first = 1600 * (20 + 3 * ID) + 1024 * (20 + 32 + COEFFICIENTS + 2 * 32 + 5 * 32)
    assert read < first
    assert made.workspace_bytes == 1631 * 32 * 4 + first + (0 + 1 + 1600) * ID


def test_scratch_of_the_hand_over():
    """A window of 20: at the start scale all 20 are written; elsewhere only the 16 new ones."""
    window = SlidingWindow()
    token = 20 + 3 * ID + 20 + 32 + COEFFICIENTS + 2 * 32 + 5 * 32
    gather = 36 * 32 * 4
    made = one_lane("float16", RowFormat(4), 1, policy=window, budget=20)
    assert made.workspace_bytes == gather + 20 * token + (4 + 1 + 20) * ID
    # from scale 0 on 16 are written there, and 16 at scale 1
    made = one_lane("float16", RowFormat(4), 0, policy=window, budget=20)
    assert made.workspace_bytes == gather + 16 * token + (1 + 1 + 16) * ID
    # at the last scale everything goes: 32 tokens are exact until then, and move as they are
    made = one_lane("float16", RowFormat(4), 2)
    assert made.workspace_bytes == 48 * 32 * 4 + (4 + 1 + 16) * ID
    # a page is read as a whole, for one token of it
    schedule = ScaleSchedule.of([4, 4, (1, 1), 1])
    made = one_lane("float16", RowFormat(4), 2, schedule, window, 1)
    assert made.workspace_bytes == 17 * 32 * 4 + 16 * (20 + 32 + COEFFICIENTS) + (1 + 1) * ID


def test_scratch_of_a_lane_that_shrinks_where_the_policy_chooses():
    """Survivors are read from the workspace then, no slots of old places are uploaded."""

    class Shrinking(ScaleKV):
        def lengths(self, schedule, geometry, budget):
            return np.array([16, 6, 0]).reshape(3, 1, 1)

    schedule = ScaleSchedule.of([4, (1, 1), 1])
    geometry = CacheGeometry(1, 1, 4, "float32", "float32")
    made = plan_generation(geometry, schedule, Shrinking(grid=1), 5, 1, 16)
    score = 17 * (4 + 4) + 2 * 16  # weights and scores; the query, twice
    choose = 17 * 4 + 6 * (4 + 3 * ID)
    assert made.workspace_bytes == 17 * 4 * 8 + max(score, choose) + (1 + 1 + 6) * ID


def test_the_longest_table():
    """Exact pages hold 4 tokens of float16 where quantised ones hold 16."""
    made = one_lane("float16", RowFormat(4), 1)
    assert made.exact_page_size == 4
    assert made.page_tokens.tolist() == [4, 16, 16]
    assert made.longest_table(is_quantised=False) == 4  # 16 tokens, read at scale 1
    assert made.longest_table(is_quantised=True) == 2  # 32 tokens, read at scale 2
    assert one_lane("float16", None, None).longest_table(is_quantised=True) == 1
    assert one_lane("float16", RowFormat(4), 0).longest_table(is_quantised=False) == 1


def test_other_rows():
    made = plan("infinity-2b", 1, kv_dtype="int4")
    more = plan("infinity-2b", 3, kv_dtype="int4")
    assert made.for_rows(6).total_bytes == more.total_bytes > made.total_bytes
    assert made.for_rows(6).rows == more.rows == 6
    with pytest.raises(ValueError, match=r"rows must be a positive integer up to 2\^30, got 0"):
        made.for_rows(0)


def test_formats_of_catalogue_models():
    made = plan("infinity-2b", kv_dtype="int8", kv_groups=4, kv_start=3)
    assert (made.row, made.start_scale) == (RowFormat(8, 4), 3)
    exact = plan("infinity-2b")
    assert (exact.row, exact.start_scale) == (None, len(exact.schedule))


def test_bad_formats():
    row = RowFormat(4)
    for start in (True, 1.0, "1"):
        with pytest.raises(ValueError, match=r"^kv_start must be a scale, got"):
            one_lane("float16", row, start)
    for start in (-1, 3):
        message = rf"^kv_start must be a scale in 0\.\.2, got {start}$"
        with pytest.raises(ValueError, match=message):
            one_lane("float16", row, start)
    assert one_lane("float16", row, 2).start_scale == 2
    with pytest.raises(ValueError, match=r"^kv_start 1 goes with a kv_dtype$"):
        one_lane("float16", None, 1)
    assert one_lane("float16", row, 1, page_size=1024).page_size == 1024
    with pytest.raises(ValueError, match=r"^quantised pages hold at most 1024 tokens, got 2048$"):
        one_lane("float16", row, 1, page_size=2048)
