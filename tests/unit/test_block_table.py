"""Bad arguments, edges of a change, and damage that a random walk does not reach."""

import numpy as np
import pytest

from allocator import BlockTable, OutOfPages, PageAllocator


def change(table, lengths, page_size=1, rows=None, **how):
    """Propose and commit for all rows or some."""
    rows = rows or slice(0, table.lengths.shape[0])
    return table.commit(table.propose(rows, np.array(lengths), page_size, **how))


@pytest.mark.parametrize(
    ("rows", "heads", "name"), [(0, 1, "rows"), (1, 0, "heads"), (-1, 1, "rows")]
)
def test_sizes_must_be_positive(rows, heads, name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got"):
        BlockTable(PageAllocator(1), rows, heads)


def test_pages_given_back_by_a_change_serve_the_same_change():
    allocator = PageAllocator(4)
    table = BlockTable(allocator, 1, 2)
    change(table, [4, 0])
    change(table, [1, 3])
    assert allocator.num_free == 0 and allocator.high_water == 4
    table.check()


def test_a_shared_page_given_back_is_not_free():
    allocator = PageAllocator(4)
    table = BlockTable(allocator, 1, 2)
    change(table, [4, 0])
    twin = table.share()
    before = table.pages.copy()
    with pytest.raises(OutOfPages) as caught:
        change(table, [1, 3])
    assert (caught.value.requested, caught.value.free) == (4, 0), "one is replaced"
    assert np.array_equal(table.pages, before) and table.lengths.tolist() == [[4, 0]]
    twin.release()
    change(table, [1, 3])


def test_only_shared_pages_that_are_written_are_replaced():
    table = BlockTable(PageAllocator(9), 1, 1)
    change(table, [3])
    twin = table.share()
    written = np.array([[False, True, False, True]])
    old, new = change(twin, [4], written=written)
    assert old.tolist() == [table.pages[0, 0, 1]] and new.tolist() == [twin.pages[0, 0, 1]]
    assert twin.pages[0, 0, [0, 2]].tolist() == table.pages[0, 0, [0, 2]].tolist()
    assert len(set(twin.pages[0, 0]) & set(table.pages[0, 0])) == 2
    old, new = change(twin, [4], written=written)
    assert old.size == new.size == 0, "its own by now"


def test_a_change_of_format_takes_every_page_afresh():
    allocator = PageAllocator(9)
    table = BlockTable(allocator, 1, 1)
    change(table, [4])
    twin = table.share()
    old, new = change(twin, [4], page_size=2, afresh=True)
    assert old.size == new.size == 0, "nothing is copied"
    assert not set(twin.pages[0, 0]) & set(table.pages[0, 0])
    assert allocator.num_live == 6


def test_a_proposal_is_carried_out_later_or_never():
    allocator = PageAllocator(9)
    table = BlockTable(allocator, 2, 1)
    change(table, [2])
    before = table.pages.copy()
    grown = table.propose(slice(1, 2), np.array([5]), 1)
    assert grown.num_taken == 3 and grown.dropped.size == 0
    table.propose(slice(0, 2), np.array([0]), 1)
    assert np.array_equal(table.pages, before) and allocator.num_live == 4
    table.commit(grown)
    assert table.lengths.tolist() == [[2], [5]] and allocator.num_live == 7
    assert table.pages[0, 0, :2].tolist() == before[0, 0].tolist()


def test_a_table_that_was_read_stays_as_it_was_read():
    """The state is replaced, never written: what another step holds of it does not change."""
    table = BlockTable(PageAllocator(9), 2, 1)
    change(table, [2])
    held = table.state
    copies = [part.copy() for part in held]
    change(table, [4], rows=slice(0, 1))
    table.keep_rows(np.array([1]))
    table.release()
    assert all(map(np.array_equal, held, copies))


def test_rows_that_are_kept_are_renumbered():
    allocator = PageAllocator(9)
    table = BlockTable(allocator, 3, 1)
    change(table, [2])
    pages = table.pages.copy()
    table.keep_rows(np.array([2, 0]))
    assert np.array_equal(table.pages, pages[[2, 0]])
    assert allocator.num_live == 4 and allocator.references(pages[1]).sum() == 0
    table.check()


def test_a_new_table_is_empty_and_keeps_its_number_formats():
    table = BlockTable(PageAllocator(9), 3, 2)
    assert table.pages.shape == (3, 2, 0) and table.pages.dtype == np.int32
    assert table.lengths.dtype == table.num_pages.dtype == np.int64
    for step in (lambda: change(table, [5, 0], 4), table.release):
        step()
        assert table.pages.dtype == np.int32
        assert table.lengths.dtype == table.num_pages.dtype == np.int64


def test_the_row_of_ids_shrinks_with_the_lanes():
    table = BlockTable(PageAllocator(9), 1, 2)
    change(table, [4, 2])
    change(table, [1, 2])
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
        (lambda table: table.num_pages.__setitem__((0, 0), 99), r"^a lane lost a page$"),
    ],
)
def test_check_notices(damage, message):
    table = BlockTable(PageAllocator(9), 1, 2)
    change(table, [4, 2], 2)
    table.check()
    damage(table)
    with pytest.raises(AssertionError, match=message):
        table.check()
