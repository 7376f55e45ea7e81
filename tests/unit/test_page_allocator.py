"""The edges of the allocator that a random walk does not name, and proof that check() sees
damage.
"""

import numpy as np
import pytest

from allocator import OutOfPages, PageAllocator, PageStateError


@pytest.mark.parametrize("num_pages", [0, -1])
def test_a_pool_needs_pages(num_pages):
    with pytest.raises(ValueError, match=f"num_pages must be positive, got {num_pages}"):
        PageAllocator(num_pages)


def test_pages_come_lowest_first_and_the_last_freed_comes_back_first():
    allocator = PageAllocator(3)
    assert sorted(allocator.allocate(2).tolist()) == [0, 1]
    allocator.release([1])
    assert allocator.allocate(1).tolist() == [1]


def test_out_of_pages_says_how_many_and_what_to_do():
    allocator = PageAllocator(2)
    allocator.allocate(1)
    with pytest.raises(
        OutOfPages,
        match=r"^3 pages requested, 1 free of 2: close .* or make the pool larger$",
    ):
        allocator.allocate(3)


@pytest.mark.parametrize("count", [1.5, float("nan"), "1", None])
def test_counts_are_integers(count):
    allocator = PageAllocator(2)
    with pytest.raises(TypeError):
        allocator.allocate(count)
    allocator.check()
    assert allocator.num_free == 2
    with pytest.raises(TypeError):
        PageAllocator(count)


def test_ids_must_be_integers():
    allocator = PageAllocator(2)
    allocator.allocate(2)
    with pytest.raises(PageStateError, match="integers, got float64"):
        allocator.release([0.0])
    assert allocator.num_live == 2


def test_the_books_are_as_long_as_the_pool_and_ids_are_int32():
    allocator = PageAllocator(5)
    assert allocator.references([0, 4]).dtype == allocator.allocate(1).dtype == np.int32
    assert allocator._stack.dtype == np.intp and allocator._stack.size == 10  # an index
    for book in (allocator._references, allocator._owners, allocator._found):
        assert book.dtype == np.int32 and book.size == 5
    assert allocator._marks.dtype == np.int32 and allocator._marks.size == 10


def test_empty_calls_are_allowed():
    allocator = PageAllocator(2)
    assert allocator.allocate(0).size == 0
    assert allocator.release([]) == 0
    assert allocator.references([]).size == 0
    allocator.retain(np.empty((0, 3)))


def test_pages_of_an_exchange_serve_the_same_exchange():
    allocator = PageAllocator(4)
    pages = allocator.allocate(4)
    assert sorted(allocator.exchange(pages[:3], 3).tolist()) == sorted(pages[:3].tolist())
    assert allocator.num_free == 0 and allocator.high_water == 4
    allocator.check()


def test_a_shared_page_that_is_dropped_is_not_free_for_an_exchange():
    allocator = PageAllocator(3)
    pages = allocator.allocate(3)
    allocator.retain(pages[:1])
    with pytest.raises(OutOfPages) as caught:
        allocator.exchange(pages[:2], 2)
    assert (caught.value.requested, caught.value.free) == (2, 1)
    assert allocator.references(pages).tolist() == [2, 1, 1]
    assert allocator.exchange(pages[:2], 1).tolist() == [pages[1]]
    assert allocator.references(pages).tolist() == [1, 1, 1] and not allocator.is_sharing
    allocator.check()


def test_an_exchange_that_is_refused_changes_nothing():
    allocator = PageAllocator(3)
    pages = allocator.allocate(2)
    for dropped, count, error in (
        ([pages[0], pages[0]], 1, PageStateError),
        ([2], 1, PageStateError),
        ([pages[0], 7], 2, PageStateError),
        (pages, 4, OutOfPages),
        (pages, -1, ValueError),
        (pages, 0.5, TypeError),
    ):
        with pytest.raises(error):
            allocator.exchange(dropped, count)
        assert allocator.references(range(3)).tolist() == [1, 1, 0], (dropped, count)
        assert (allocator.num_free, allocator.high_water) == (1, 2)
        allocator.check()


def test_rebuild_believes_the_owners():
    allocator = PageAllocator(5)
    allocator.allocate(5)
    allocator.rebuild([np.array([1, 4], dtype=np.int32), np.array([4], dtype=np.int32)])
    assert allocator.references(range(5)).tolist() == [0, 1, 0, 0, 2]
    assert allocator.is_sharing and allocator.num_free == 3 and allocator.high_water == 5
    assert sorted(allocator.allocate(3).tolist()) == [0, 2, 3]
    allocator.check()
    allocator.rebuild([])
    assert allocator.num_free == 5 and not allocator.is_sharing
    assert allocator.allocate(1).tolist() == [0], "the lowest first, as in a new one"
    allocator.check()


def test_more_ids_than_pages():
    allocator = PageAllocator(2)
    allocator.allocate(2)
    with pytest.raises(PageStateError, match="page 1 is named 2 times and has 1 owners"):
        allocator.release([0, 1, 1])
    with pytest.raises(PageStateError, match="page 1 is named 2 times and has 1 owners"):
        allocator.release([1, 1])
    allocator.check()
    assert allocator.references([0, 1]).tolist() == [1, 1]


def test_a_page_is_named_as_often_as_it_has_owners():
    allocator = PageAllocator(3)
    allocator.allocate(2)
    allocator.retain([1, 0, 1, 1])
    assert allocator.references(range(3)).tolist() == [2, 4, 0]
    with pytest.raises(PageStateError, match="page 0 is named 3 times and has 2 owners"):
        allocator.release([1, 0, 0, 0])
    assert sorted(allocator.exchange([1, 1, 1, 1, 0], 2).tolist()) == [1, 2]
    assert allocator.references(range(3)).tolist() == [1, 1, 1] and not allocator.is_sharing
    allocator.check()


def test_an_allocated_array_is_the_callers_own():
    allocator = PageAllocator(2)
    pages = allocator.allocate(2)
    pages[:] = 7
    allocator.release([0, 1])
    allocator.check()


def damage_stack(allocator):
    allocator._stack[1] = allocator._stack[0]


def damage_references(allocator):
    allocator._references[allocator._stack[0]] = 1


def damage_live(allocator):
    allocator._references[allocator.allocate(1)] = 0


def damage_sign(allocator):
    allocator._references[allocator._stack[0]] = -3


def damage_count(allocator):
    allocator.num_free -= 1


def damage_extra(allocator):
    allocator.retain(allocator.allocate(1))
    allocator._extra_references = 0


def damage_high_water(allocator):
    allocator.high_water = 9


def damage_high_water_low(allocator):
    allocator.allocate(2)
    allocator.high_water = 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_stack, r"^a free page is not where it says$"),
        (damage_references, r"^pages lost or invented$"),
        (damage_live, r"^pages lost or invented$"),
        (damage_sign, r"^a free page is not where it says$"),
        (damage_count, r"^pages lost or invented$"),
        (damage_extra, r"^extra references miscounted$"),
        (damage_high_water, r"^high-water mark out of range$"),
        (damage_high_water_low, r"^high-water mark out of range$"),
    ],
)
def test_check_notices(damage, message):
    allocator = PageAllocator(5)
    allocator.check()
    damage(allocator)
    with pytest.raises(AssertionError, match=message):
        allocator.check()


def test_check_notices_a_negative_count_of_a_live_page():
    allocator = PageAllocator(3)
    pages = allocator.allocate(2)
    allocator._references[pages[0]] = -1
    with pytest.raises(AssertionError, match=r"^pages lost or invented$"):
        allocator.check()
