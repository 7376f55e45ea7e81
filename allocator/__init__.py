"""Who owns which page of the pool. Ids only: numpy, never torch."""

from allocator.block_table import BlockTable, Change
from allocator.errors import KVRuntimeError, OutOfPages, PageStateError
from allocator.page_allocator import PageAllocator, PageIds

__all__ = [
    "BlockTable",
    "Change",
    "KVRuntimeError",
    "OutOfPages",
    "PageAllocator",
    "PageIds",
    "PageStateError",
]
