"""Who owns which page of the pool. Ids only: numpy, never torch."""

from allocator.block_table import BlockTable
from allocator.errors import KVRuntimeError, OutOfPages, PageStateError
from allocator.page_allocator import PageAllocator, PageIds

__all__ = [
    "BlockTable",
    "KVRuntimeError",
    "OutOfPages",
    "PageAllocator",
    "PageIds",
    "PageStateError",
]
