"""How a token is stored: exactly, or as a quantised row; and what that takes in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies import DTYPE_BYTES, CacheGeometry, Lengths

KV_DTYPES = {"int2": 2, "int4": 4, "int8": 8}  # bits
GROUPS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How many bits a value has, and how many groups share a scale and a shift."""

    bits: int
    groups: int = 1

    def __post_init__(self) -> None:
        if self.bits not in KV_DTYPES.values():
            raise ValueError(f"bits must be one of {sorted(KV_DTYPES.values())}, got {self.bits}")
        if isinstance(self.groups, bool) or self.groups not in GROUPS:
            raise ValueError(f"kv_groups must be one of {GROUPS}, got {self.groups!r}")

    @classmethod
    def named(cls, kv_dtype: str, groups: int) -> RowFormat:
        """The format of ``kv_dtype``: int2, int4 or int8. Raises ValueError for another name."""
        if kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype {kv_dtype!r} is not one of {', '.join(KV_DTYPES)}")
        return cls(KV_DTYPES[kv_dtype], groups)

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def words(self, head_dim: int) -> int:
        """int32 numbers in a row. Raises ValueError unless every group fills whole ones."""
        per_group, rest = divmod(head_dim * self.bits, 32 * self.groups)
        if rest or not per_group:
            raise ValueError(
                f"{self.name} with {self.groups} groups needs a head dimension that is a multiple "
                f"of {32 // self.bits * self.groups}, got {head_dim}: take fewer groups"
            )
        return self.groups * (1 + per_group)

    def row_bytes(self, head_dim: int) -> int:
        return 4 * self.words(head_dim)


def row_format(kv_dtype: str | None, kv_groups: int) -> RowFormat | None:
    """The row format of a user's kv_dtype and kv_groups; None for exact pages."""
    if kv_dtype is None:
        if kv_groups != 1:
            raise ValueError(f"kv_groups {kv_groups} goes with a kv_dtype")
        return None
    return RowFormat.named(kv_dtype, kv_groups)


def stored_bytes(geometry: CacheGeometry, row: RowFormat | None) -> int:
    """Bytes of a token of one lane in a page, K and V, once it is quantised (if it ever is)."""
    return 2 * row.row_bytes(geometry.head_dim) if row else geometry.token_bytes


def exact_page_size(geometry: CacheGeometry, row: RowFormat | None, page_size: int) -> int:
    """Exact tokens that take the bytes of ``page_size`` quantised ones.

    A power-of-two fraction, so that the paged kernel can read both; at least one. Raises
    ValueError for a page that is too small for one exact token.
    """
    if row is None:
        return page_size
    widest = max(DTYPE_BYTES[geometry.key_dtype], DTYPE_BYTES[geometry.value_dtype])
    exact_bytes, row_bytes, count = widest * geometry.head_dim, row.row_bytes(geometry.head_dim), 1
    while count * row_bytes < exact_bytes:
        count *= 2
    if page_size % count:
        raise ValueError(
            f"page_size must be a multiple of {count} for {row.name} pages that hold "
            f"{geometry.key_dtype} tokens at first, got {page_size}"
        )
    return page_size // count


def default_start(lengths: Lengths, geometry: CacheGeometry, row: RowFormat) -> int:
    """The first scale whose tokens, kept exactly, would take more bytes than the quantised cache
    ever does: until then nothing is gained by quantising.
    """
    kept = lengths.sum(axis=(1, 2))
    beyond = kept * geometry.token_bytes > kept.max() * stored_bytes(geometry, row)
    return int(np.argmax(beyond)) if beyond.any() else len(lengths)
