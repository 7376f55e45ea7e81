"""Bad arguments and damage that a random walk does not reach."""

import numpy as np
import pytest

from allocator import BlockTable, OutOfPages, PageAllocator


@pytest.mark.parametrize(
    ("rows", "heads", "page_size", "name"),
    [(0, 1, 1, "rows"), (1, 0, 1, "heads"), (1, 1, 0, "page_size"), (-1, 1, 1, "rows")],
)
def test_sizes_must_be_positive(rows, heads, page_size, name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got"):
        BlockTable(PageAllocator(1), rows, heads, page_size)


@pytest.mark.parametrize("lengths", [[1], [1, 2, 3], [[1, 2]], [1.0, 2.0]])
def test_lengths_are_one_integer_per_head(lengths):
    table = BlockTable(PageAllocator(9), 1, 2, 4)
    with pytest.raises(ValueError, match="lengths must be 2 integers"):
        table.resize(lengths)
    assert table.owned().size == 0


def test_lengths_are_not_negative():
    table = BlockTable(PageAllocator(9), 1, 2, 4)
    with pytest.raises(ValueError, match=r"must not be negative, got \[3, -1\]"):
        table.resize([3, -1])
    assert table.owned().size == 0


def test_pages_given_back_by_a_resize_serve_the_same_resize():
    allocator = PageAllocator(4)
    table = BlockTable(allocator, 1, 2, 1)
    table.resize([4, 0])
    table.resize([1, 3])
    assert allocator.num_free == 0 and allocator.high_water == 4
    table.check()


def test_a_shared_page_given_back_is_not_free():
    allocator = PageAllocator(4)
    table = BlockTable(allocator, 1, 2, 1)
    table.resize([4, 0])
    twin = table.share()
    with pytest.raises(OutOfPages) as caught:
        table.resize([1, 3])
    assert (caught.value.requested, caught.value.free) == (3, 0)
    twin.release()
    table.resize([1, 3])


def test_the_table_does_not_keep_the_callers_array():
    table = BlockTable(PageAllocator(9), 1, 2, 4)
    lengths = np.array([4, 4])
    table.resize(lengths)
    lengths[:] = 99
    assert table.lengths.tolist() == [4, 4]


def test_a_new_table_is_empty_and_keeps_its_number_formats():
    table = BlockTable(PageAllocator(9), 3, 2, 4)
    assert table.pages.shape == (3, 2, 0) and table.pages.dtype == np.int32
    assert table.lengths.dtype == np.int64
    table.resize(np.array([5, 0], dtype=np.int32))
    assert table.pages.dtype == np.int32 and table.lengths.dtype == np.int64


def test_the_row_of_ids_shrinks_with_the_lanes():
    table = BlockTable(PageAllocator(9), 1, 2, 1)
    table.resize([4, 2])
    table.resize([1, 2])
    assert table.pages.shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda table: table.pages.__setitem__((0, 0, 0), table.pages[0, 1, 0]),
            r"^two lanes own one page$",
        ),
        (lambda table: table.pages.__setitem__((0, 1, 1), 3), r"^an id past the end$"),
        (lambda table: table.pages.__setitem__((0, 0, 0), 8), r"^a lane owns a free page$"),
        (lambda table: table.lengths.__setitem__(0, 99), r"^a lane lost a page$"),
    ],
)
def test_check_notices(damage, message):
    table = BlockTable(PageAllocator(9), 1, 2, 2)
    table.resize([4, 2])
    table.check()
    damage(table)
    with pytest.raises(AssertionError, match=message):
        table.check()
