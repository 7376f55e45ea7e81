"""How a page's bytes are read: tokens as the model makes them, or records."""

from __future__ import annotations

from dataclasses import dataclass

from policies import DTYPE_BYTES, CacheGeometry

KV_DTYPES = {"int2": 2, "int4": 4, "int8": 8}  # bits
GROUPS = (1, 2, 4, 8)
CODED = {"coded2": 2, "coded3": 3, "coded4": 4}  # bits of a number, on average
CODED_BITS = (8, 6, 5, 4, 3, 2)  # of all there are; the finer ones stand between
PLANE_BYTES = 2  # a number of a plane is a float16
MOST_QUANTISED_TOKENS = 1024  # in a page
PAGED_TOKENS = 16  # of which the paged kernel reads multiples


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """A quantised token: how many bits a value has, and how many groups share a step size and a
    shift.
    """

    bits: int
    groups: int = 1

    def __post_init__(self) -> None:
        if self.bits not in KV_DTYPES.values():
            raise ValueError(f"bits must be one of {sorted(KV_DTYPES.values())}, got {self.bits}")
        if isinstance(self.groups, bool) or self.groups not in GROUPS:
            raise ValueError(f"kv_groups must be one of {GROUPS}, got {self.groups!r}")

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def finer(self) -> tuple[RecordFormat, ...]:
        """Formats between exact tokens and this one, the finest first."""
        return (RecordFormat(8, self.groups),) if self.bits < 8 else ()

    def words(self, head_dim: int) -> int:
        """int32 numbers in a record. Raises ValueError unless every group fills whole ones."""
        per_group, rest = divmod(head_dim * self.bits, 32 * self.groups)
        if rest or not per_group:
            raise ValueError(
                f"{self.name} with {self.groups} groups needs a head dimension that is a multiple "
                f"of {32 // self.bits * self.groups}, got {head_dim}: take fewer groups"
            )
        return self.groups * (1 + per_group)

    def num_bytes(self, head_dim: int) -> int:
        """Bytes of a record of one token's K or V."""
        return 4 * self.words(head_dim)


@dataclass(frozen=True, slots=True)
class CodedFormat:
    """A transform-coded token (storage.coding): how many bits a number has on average."""

    bits: int

    @property
    def name(self) -> str:
        return f"coded{self.bits}"

    @property
    def groups(self) -> None:
        """It has none."""
        return None

    @property
    def finer(self) -> tuple[CodedFormat, ...]:
        """Formats between exact tokens and this one, the finest first."""
        return tuple(CodedFormat(bits) for bits in CODED_BITS if bits > self.bits)

    def words(self, head_dim: int) -> int:
        """int32 numbers in a record. Raises ValueError for a head dimension it cannot have."""
        if head_dim % 32:
            raise ValueError(
                f"{self.name} needs a head dimension that is a multiple of 32, got {head_dim}"
            )
        return head_dim * self.bits // 32

    def num_bytes(self, head_dim: int) -> int:
        """Bytes of a record of one token's K or V."""
        return 4 * self.words(head_dim)


Records = RecordFormat | CodedFormat


def records_named(kv_dtype: str, groups: int) -> Records:
    """The format of that name. Raises ValueError for a name that there is not, and for groups of
    a format that has none.
    """
    names = (*KV_DTYPES, *CODED)
    if not isinstance(kv_dtype, str) or kv_dtype not in names:
        raise ValueError(f"kv_dtype {kv_dtype!r} is not one of {', '.join(names)}")
    if kv_dtype in KV_DTYPES:
        return RecordFormat(KV_DTYPES[kv_dtype], groups)
    if groups != 1:
        raise ValueError(f"kv_groups {groups} goes with {', '.join(KV_DTYPES)}, not {kv_dtype}")
    return CodedFormat(CODED[kv_dtype])


@dataclass(frozen=True, slots=True)
class PageFormat:
    """What the pages of a cache hold at some time: tokens as they are (records None), or records;
    page_size of them in a page.
    """

    records: Records | None
    page_size: int


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Tokens in the bytes of a page: K in one half, V in the other, at equal distances.

    page_size: tokens in a page. half_bytes: bytes of a page's K, and of its V.
    records: None for tokens of ``dtype``. head_dim: numbers of a token's K or V. planes: numbers
        that a token has beside them.

    Always: page_size * stride_bytes == half_bytes, and stride_bytes holds a token.
    """

    page_size: int
    half_bytes: int
    head_dim: int
    dtype: str
    records: Records | None = None
    planes: int = 0

    def __post_init__(self) -> None:
        if self.half_bytes % (self.page_size * self.unit_bytes):
            raise ValueError(
                f"half a page, {self.half_bytes} bytes, is no whole number of bytes for each of "
                f"{self.page_size} tokens"
            )
        if self.stride_bytes < self.token_bytes:
            raise ValueError(
                f"{self.page_size} tokens of {self.token_bytes} bytes do not fit half a page, "
                f"{self.half_bytes} bytes: take a smaller page_size or larger pages"
            )

    @property
    def unit_bytes(self) -> int:
        """Bytes of one of the numbers that a token is stored as."""
        return 4 if self.records else DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K, or V."""
        if self.records is None:
            return self.head_dim * DTYPE_BYTES[self.dtype]
        return self.records.num_bytes(self.head_dim)

    @property
    def width(self) -> int:
        """Numbers of one token's K or V as it is stored: of ``dtype``, or int32."""
        return self.head_dim if self.records is None else self.records.words(self.head_dim)

    @property
    def stride_bytes(self) -> int:
        """Bytes from one token's K to the next."""
        return self.half_bytes // self.page_size


def stored_bytes(geometry: CacheGeometry, records: Records | None) -> int:
    """Bytes of a token of one lane in a page, K and V, once it is quantised (if it ever is)."""
    return 2 * records.num_bytes(geometry.head_dim) if records else geometry.token_bytes


def exact_unit_bytes(geometry: CacheGeometry) -> int:
    """Bytes of one of an exact token's numbers, the wider of K's and V's."""
    return max(DTYPE_BYTES[geometry.key_dtype], DTYPE_BYTES[geometry.value_dtype])


def exact_page_size(geometry: CacheGeometry, records: Records | None, page_size: int) -> int:
    """Exact tokens that fit the bytes of ``page_size`` records, at equal distances.

    As many as there is room for; a multiple of 16, which the paged kernel can read, where 16 fit.
    Raises ValueError for a page that is too small for one exact token.
    """
    if records is None:
        return page_size
    unit = exact_unit_bytes(geometry)
    half, token = page_size * records.num_bytes(geometry.head_dim), unit * geometry.head_dim
    count = _evenly(half, token, unit)
    if not count:
        raise ValueError(
            f"page_size {page_size} is too small: its {half} bytes of {records.name} records hold "
            f"no {geometry.key_dtype} token of {token}, and tokens are exact at first"
        )
    return count


def fitting_page_size(
    half_bytes: int, token_bytes: int, unit_bytes: int, multiple: int = PAGED_TOKENS
) -> int:
    """Tokens of a pool's page: as many as fill it, as in pages that were made for them; where no
    number does, as many as there is room for, as in ``exact_page_size``.

    multiple: what the number is a multiple of, where that many fit. Raises ValueError if not one
    fits half a page.
    """
    if half_bytes % token_bytes == 0:
        return half_bytes // token_bytes
    count = _evenly(half_bytes, token_bytes, unit_bytes, multiple)
    if not count:
        raise ValueError(
            f"a token's K takes {token_bytes} bytes, half a page of this pool {half_bytes}: make "
            f"the pool's pages a multiple of {2 * token_bytes} bytes"
        )
    return count


def _evenly(
    half_bytes: int, token_bytes: int, unit_bytes: int, multiple: int = PAGED_TOKENS
) -> int:
    """Most tokens at equal distances of whole units; where ``multiple`` fit, of that. 0: none."""
    count = half_bytes // token_bytes
    while count and (half_bytes % (count * unit_bytes) or (count > multiple and count % multiple)):
        count -= 1
    return count
