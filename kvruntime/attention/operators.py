"""xformers' operators as this runtime needs them: for pages of any multiple of 16 tokens, for
records, with log weights. Tied to its version (0.0.35).

The bias objects are built from tensors that are on the device already, past their own constructors,
which take a Python list of rows. Under TRITON_INTERPRET=1, set before the first import of triton,
the same kernel runs on a CPU, slowly, in float16: that is how it is tested.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import triton
from torch import Tensor

with warnings.catch_warnings():  # deprecations between xformers and triton
    warnings.simplefilter("ignore")
    from xformers.ops import fmha
    from xformers.ops.fmha import triton_splitk
    from xformers.ops.fmha._triton import splitk_kernels
    from xformers.ops.fmha.attn_bias import (
        PagedBlockDiagonalPaddedKeysMask,
        _PaddedSeqLenInfo,
        _SeqLenInfo,
    )

warnings.filterwarnings("ignore", message="tl.make_block_ptr is deprecated")
IS_INTERPRETED = type(splitk_kernels._splitK_reduce).__name__ == "InterpretedFunction"
_FLASH_WIDTH = 256  # head dimension of flash attention on a GPU, at most
BLOCKS = (64, 32, 16)  # keys the kernel takes at a time
_MOST_PROGRAMS = 1024  # of the kernel at once, by splitting keys; several for each processor


def spread(bias: Tensor, rows: int, n: int) -> Tensor:
    """A bias [rows or 1, heads, 1, tokens] as the operators want it, [rows, heads, n, tokens] on a
    multiple of 8 tokens; a view with distance 0 over the queries.
    """
    tokens = bias.shape[3]
    padded = bias.new_zeros(rows, bias.shape[1], 1, -(-tokens // 8) * 8)
    padded[..., :tokens] = bias
    return padded[..., :tokens].expand(-1, -1, n, -1)


def operator_for_gathered(
    device: torch.device, dtype: torch.dtype, head_dim: int, bias: Tensor | None
) -> Any:
    """What xformers would choose for tokens with such a bias, or none. None where it has nothing
    but the paged kernel's operator, as on a GPU that its C++ library was not built for: torch's
    own attention is faster there. In the interpreter that operator.
    """
    if device.type != "cuda":
        return paged_operator(BLOCKS[0], 1)
    tokens = torch.empty(1, 16, 1, head_dim, dtype=dtype, device=device)
    inputs = fmha.Inputs(tokens, tokens, tokens, bias, scale=1.0)
    for operator in fmha.dispatch._dispatch_fw_priority_list(inputs, False):
        if not operator.not_supported_reasons(inputs):
            return operator
    return None


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Attention [rows, n, heads, head_dim] and the logarithms of its normalisers, float32 [rows,
    heads, n], for q, k and v of that shape: by torch's flash attention, which needs no compiler;
    heads that are too wide for it by the paged kernel's operator.
    """
    if q.shape[3] > _FLASH_WIDTH:
        found: tuple[Tensor, Tensor] = fmha.memory_efficient_attention_partial(
            q, k, v, scale=softmax_scale, op=paged_operator(BLOCKS[0], 1)
        )
        return found
    parts = [part.transpose(1, 2) for part in (q, k, v)]
    if q.device.type == "cuda":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            *parts, scale=softmax_scale
        )
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, scale=softmax_scale
        )
    return out.transpose(1, 2), lse


class Tile(NamedTuple):
    """queries: that a program of the kernel takes at a time. warps: that it runs in."""

    queries: int
    warps: int


TILES = tuple(
    Tile(*tile) for tile in ((16, 2), (16, 4), (32, 4), (64, 4), (64, 8), (128, 4), (128, 8))
)  # that ``benchmarks gpu`` tries


def tile_for(queries: int) -> Tile:
    """The tile for so many queries of a lane: the smallest that takes all of them, at most 128.

    Every program reads all keys of its lane, and turns records back, for itself: few programs read
    little. xformers does so only where K and V are stored 128 numbers wide on sm_89 and later;
    records and other head dimensions would run 16 queries in 2 warps.
    """
    most = next((size for size in (16, 32, 64) if queries <= size), 128)
    return Tile(most, 2 if queries == 1 else 4)


@functools.cache
def paged_operator(
    block: int, groups: int, takes_bias: bool = False, tile: Tile | None = None
) -> Any:
    """xformers' operator for pages that are a multiple of ``block`` tokens, and so many groups;
    with a kernel that adds a bias to the logits of pages if asked. tile: None: ``tile_for``.
    """
    with _biased_kernel() if takes_bias else contextlib.nullcontext():
        kernel = splitk_kernels._get_splitk_kernel(groups)  # it would be made again at every call

    class PagedOperator(triton_splitk.FwOp):  # type: ignore[misc]
        NAME = f"triton_splitK, blocks of {block}"
        SUPPORTED_DEVICES: ClassVar = {"cuda", "cpu"} if IS_INTERPRETED else {"cuda"}
        BLOCK_N = block
        NUM_GROUPS = groups

        @classmethod
        def get_kernel(cls) -> Any:
            return kernel

        @classmethod
        def get_extra_args(cls, **sizes: Any) -> dict[str, Any]:
            """Of the kernel's launch. On AMD, which we know nothing of, what xformers takes."""
            if torch.version.hip:
                arguments: dict[str, Any] = super().get_extra_args(**sizes)
                return arguments
            chosen = tile or tile_for(sizes["M"])
            return {
                "BLOCK_M": chosen.queries,
                "BLOCK_N": cls.BLOCK_N,
                "num_warps": chosen.warps,
                "num_stages": cls.NUM_STAGES,
            }

        @classmethod
        def get_split_k(
            cls, B: int, G: int, H: int, Mk: int, Mq: int, page_size: int, is_paged: bool = False
        ) -> int:
            """xformers' number of splits, but not more than fill a GPU: each one keeps a float32
            result of all queries.
            """
            splits: int = super().get_split_k(B, G, H, Mk, Mq, page_size, is_paged)
            programs = -(-Mq * (1 if is_paged else B * G * H) // int(cls.BLOCK_M))
            return max(1, min(splits, _MOST_PROGRAMS // max(1, programs)))

        @classmethod
        def not_supported_reasons(cls, inputs: Any) -> list[str]:
            """Without the complaint that xformers' C++ library is missing, which this operator does
            not use: a torch of another CUDA version cannot load it.
            """
            reasons = super().not_supported_reasons(inputs)
            return [reason for reason in reasons if "build with CUDA" not in reason]

    return PagedOperator


@contextlib.contextmanager
def _biased_kernel() -> Iterator[None]:
    """Meanwhile xformers' module has a kernel that knows where a bias lies for pages too.

    The published one works that out in its branch for keys without pages, though it adds the bias
    in either: the lines are moved behind the branch. Raises RuntimeError where they are not found,
    which another version of xformers must answer for.
    """
    published = splitk_kernels._fwd_kernel_splitK
    before, found, rest = triton.JITFunction(published.fn).src.partition(_BIAS)
    block, end, after = rest.partition(_AFTER_BIAS)
    if not found or not end:
        raise RuntimeError("xformers' paged kernel is not the one of 0.0.35: no bias for pages")
    moved = "\n".join(line.removeprefix("    ") for line in (found + block).split("\n"))
    source, name = before + moved + end + after, "<xformers' kernel with a bias for pages>"
    lines = source.splitlines(keepends=True)
    linecache.cache[name] = (len(source), None, lines, name)  # Triton reads its functions' text
    namespace = dict(vars(splitk_kernels))
    exec(compile(source, name, "exec"), namespace)
    splitk_kernels._fwd_kernel_splitK = triton.jit(namespace[published.fn.__name__])
    try:
        yield
    finally:
        splitk_kernels._fwd_kernel_splitK = published


_BIAS, _AFTER_BIAS = "        if HAS_ADDITIVE_BIAS:\n", "\n    if SPLIT_K_EARLY_EXIT"


def with_bias(operator: Any, bias: Tensor) -> Any:
    """The operator for one call, whose kernel adds bias [lanes, places] to the logits of each
    lane, the same for all queries. operator: a paged one that takes a bias; xformers itself passes
    it none.
    """
    kernel = operator.get_kernel()

    class Launcher:
        def __getitem__(self, grid: Any) -> Any:
            launch = kernel[grid]

            def call(**arguments: Any) -> Any:
                arguments |= {
                    "additive_bias": bias,
                    "HAS_ADDITIVE_BIAS": True,
                    "stride_bias_b": bias.stride(0),
                    "stride_bias_g": 0,
                    "stride_bias_h": 0,
                    "stride_bias_qm": 0,
                    "stride_bias_km": bias.stride(1),
                }
                return launch(**arguments)

            return call

    class BiasedOperator(operator):  # type: ignore[misc]
        @classmethod
        def get_kernel(cls) -> Any:
            return Launcher()

    return BiasedOperator


def block_of(page_size: int) -> int:
    return next(block for block in BLOCKS if page_size % block == 0)


def paged_bias(n: int, tables: Tensor, lengths: Tensor, longest: int, page_size: int) -> Any:
    """n queries for each lane of ``tables``. Nothing is read back from the device, and nothing
    depends on the number of lanes but sizes.
    """
    lanes, width = tables.shape
    starts = torch.arange(0, lanes * n + 1, n, dtype=torch.int32, device=tables.device)
    queries = _SeqLenInfo(
        seqstart=starts, max_seqlen=n, min_seqlen=n, seqstart_py=range(0, lanes * n + 1, n)
    )
    places = width * page_size
    keys = _PaddedSeqLenInfo(
        seqstart=starts,  # of the padded lanes; the paged kernel goes by the tables
        max_seqlen=longest,
        min_seqlen=0,
        seqstart_py=range(0, lanes * places + 1, places),
        seqlen=lengths,
        seqlen_py=range(lanes),
        padding=places,
    )
    return PagedBlockDiagonalPaddedKeysMask(queries, keys, tables, page_size)


__all__ = [
    "BLOCKS",
    "IS_INTERPRETED",
    "TILES",
    "Tile",
    "attend_with_lse",
    "block_of",
    "fmha",
    "operator_for_gathered",
    "paged_bias",
    "paged_operator",
    "spread",
    "tile_for",
    "with_bias",
]
