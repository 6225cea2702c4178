"""Approximate scores of sparse attention: one for each block of a cache and KV head, from the state beside the cache.

pages     the largest that q . k can be in a page, sum_c max(q_c, 0) max_c + min(q_c, 0) min_c (Quest, arXiv 2406.10774)
features  q . k on the kept channels (Double Sparsity, arXiv 2408.07092), in the cache's dtype or in 8 or 4 bits

Both take the maximum over the query heads that read a KV head, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.launch import launch
from fxopt.codegen.kernels.select_state import SCALE_BLOCK
from fxopt.codegen.source import fill, load_kernel, write_source

WARPS = 4
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

TEMPLATE = '''
             | """Scores of the blocks of a cache, the largest over the query heads of a KV head."""
             |
             | import triton
             | import triton.language as tl
             |
             |
             | @triton.jit(do_not_specialize=["length", "least"])
             | def scores(
             |     query,  # [B, Hq, 1, D]
pages        |     bounds,  # [B, Hkv, P, 2 D]
!pages       |     features,  # [B, Hkv, C, S'], of positions, or of two positions a byte
channels     |     channels,  # [Hkv, C]
coded        |     scales,  # [B, Hkv, C, S' / 128]
             |     out,  # [B, Hkv, blocks]
extent       |     extent,  # []
             |     length,  # positions of the cache
             |     least,  # up to so many filled positions nothing is scored
             |     columns,  # blocks
             |     kv_heads,
             |     query_batch,
             |     query_head,
             |     query_dim,
             | ):
             |     G: tl.constexpr = $G  # query heads per KV head
             |     C: tl.constexpr = $C  # channels that count
             |     BM: tl.constexpr = $BM
             |     BN: tl.constexpr = $BN
             |     BC: tl.constexpr = $BC
             |     pair = tl.program_id(0).to(tl.int64)
             |     head = pair % kv_heads
             |     first = tl.program_id(1) * BN
             |     n = first + tl.arange(0, BN)
extent       |     end = tl.maximum(tl.minimum(tl.load(extent), length), 0).to(tl.int32)
!extent      |     end = length
             |     used = tl.where(end <= least, 0, (end + $PAGE - 1) // $PAGE)
             |     out_at = out + pair * columns + n
             |     if first >= used:
             |         tl.store(out_at, tl.full([BN], float("-inf"), tl.float32), mask=n < columns)
             |         return
             |     c = tl.arange(0, BC)
channels     |     channel = tl.load(channels + head * C + c, mask=c < C, other=0)
!channels    |     channel = c
             |     q_at = query + pair // kv_heads * query_batch + channel * query_dim
tile         |     row = tl.arange(0, BM)
tile         |     q_at = q_at[None, :] + (head * G + row)[:, None] * query_head
tile         |     q = tl.load(q_at, mask=(row < G)[:, None] & (c < C)[None, :], other=0.0)  # [BM, BC]
vector       |     q = tl.load(q_at + head * query_head, mask=c < C, other=0.0).to(tl.float32)  # [BC]
coded        |     scale = tl.load(scales + (pair * C + c) * $SCALES + first // 128, mask=c < C, other=0.0)
coded tile   |     q = (q.to(tl.float32) * scale[None, :]).to(query.dtype.element_ty)
coded vector |     q = q * scale
pages        |     live = (n < used)[:, None] & (c < C)[None, :]
pages        |     high_at = bounds + (pair * columns + n)[:, None] * (2 * C) + c[None, :]
pages        |     high = tl.load(high_at, mask=live, other=0.0)  # [BN, BC]
pages        |     low = tl.load(high_at + C, mask=live, other=0.0)
pages tile   |     s = tl.dot(tl.maximum(q, 0.0).to(q.dtype), tl.trans(high)$precision)  # [BM, BN]
pages tile   |     s = tl.dot(tl.minimum(q, 0.0).to(q.dtype), tl.trans(low), s$precision)
pages vector |     s = tl.sum(tl.maximum(q, 0.0)[None, :] * high.to(tl.float32), 1)
pages vector |     s += tl.sum(tl.minimum(q, 0.0)[None, :] * low.to(tl.float32), 1)
!pages !four |     live = (c < C)[:, None] & (n < used)[None, :]
!pages !four |     f = tl.load(features + (pair * C + c)[:, None] * $STRIDE + n[None, :], mask=live, other=0)
four         |     byte = first // 2 + tl.arange(0, BN // 2)
four         |     live = (c < C)[:, None] & (2 * byte < used)[None, :]
four         |     packed = tl.load(features + (pair * C + c)[:, None] * $STRIDE + byte[None, :], mask=live, other=136)
four         |     packed = packed.to(tl.int32)
four         |     f = tl.join((packed & 15) - 8, (packed >> 4) - 8).reshape([BC, BN])
!pages tile  |     s = tl.dot(q, f.to(q.dtype)$precision)  # [BM, BN]
!pages vector|     s = tl.sum(q[:, None] * f.to(tl.float32), 0)  # [BN]
tile         |     # Maxima of Triton drop a NaN, those of torch keep it.
tile         |     broken = tl.max(((s != s) & (row < G)[:, None]).to(tl.int32), 0) != 0
tile         |     s = tl.max(tl.where((row < G)[:, None], s, float("-inf")), 0)
tile         |     s = tl.where(broken, float("nan"), s)
             |     tl.store(out_at, tl.where(n < used, s, float("-inf")), mask=n < columns)
'''


@dataclass(frozen=True)
class Scores:
    """One variant of approximate scores: everything that changes the generated source."""

    dtype: torch.dtype
    """Of the query, and of bounds and features that are not quantised."""
    width: int
    """Channels that count: D for pages, C for features."""
    group: int
    """Query heads per KV head."""
    page: int = 0
    """Positions of a page; 0: features of positions."""
    has_extent: bool = False
    has_channels: bool = False
    bits: int = 0
    """0: features in `dtype`; 8 or 4: whole numbers with scales."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise Unsupported(f"{self.dtype}; kernels that score take float16, bfloat16 and float32")
        if self.bits not in (0, 8, 4):
            raise Unsupported(f"features of {self.bits} bits; 0 (the cache's dtype), 8 and 4 have kernels")
        if not 1 <= self.width <= 256 or not 1 <= self.group <= 128:
            raise Unsupported(f"{self.width} channels, {self.group} query heads per KV head; at most 256 and 128")


def tiles(desc: Scores) -> tuple[int, int, int]:
    """Query rows, blocks and channels of one program; one row is a vector."""
    channels = 1 << (desc.width - 1).bit_length()
    rows = 1 if desc.group == 1 else max(16, 1 << (desc.group - 1).bit_length())
    channels = channels if rows == 1 else max(16, channels)
    if desc.bits:
        return rows, SCALE_BLOCK, channels
    wide = channels * desc.dtype.itemsize * (2 if desc.page else 1)
    return rows, max(16, min(128, 32768 // wide)), channels


@functools.cache
def source(desc: Scores, stride: int, scales: int) -> str:
    """The Triton module of a variant; ``stride``: columns of the features, ``scales``: of their scales."""
    rows, blocks, channels = tiles(desc)
    values = {
        "G": desc.group, "C": desc.width, "BM": rows, "BN": blocks, "BC": channels, "PAGE": desc.page or 1,
        "STRIDE": stride, "SCALES": scales,
        "precision": ', input_precision="ieee"' if desc.dtype == torch.float32 else "",
    }  # fmt: skip
    holds = {
        "pages": desc.page > 0, "channels": desc.has_channels, "coded": desc.bits > 0, "four": desc.bits == 4,
        "extent": desc.has_extent, "vector": rows == 1, "tile": rows > 1,
    }  # fmt: skip
    return fill(TEMPLATE, holds, values)


@functools.cache
def kernel(desc: Scores, stride: int = 0, scales: int = 0) -> Any:
    """The kernel of a variant; the source file is written on the first call."""
    header: Mapping[str, str] = {field: str(getattr(desc, field)) for field in desc.__annotations__}
    name = "page_scores" if desc.page else "feature_scores"
    return load_kernel(write_source(name, source(desc, stride, scales), header), "scores")


def page_scores(
    query: Tensor, bounds: Tensor, extent: Tensor | None = None, *, page: int, least: int = 0
) -> Tensor:
    """[B, Hkv, P], float32: of ``query: [B, Hq, 1, D]`` and ``bounds: [B, Hkv, P, 2 D]``, contiguous; no host sync."""
    batch, kv_heads, pages, _ = bounds.shape
    desc = Scores(query.dtype, query.shape[3], query.shape[1] // kv_heads, page, extent is not None)
    given = {"bounds": bounds, "length": pages * page}
    return _score(desc, kernel(desc), query, (batch, kv_heads, pages), extent, least, given)


def feature_scores(
    query: Tensor,
    features: Tensor,
    extent: Tensor | None = None,
    channels: Tensor | None = None,
    scales: Tensor | None = None,
    *,
    least: int = 0,
    bits: int = 0,
) -> Tensor:
    """[B, Hkv, S'], float32: of ``query: [B, Hq, 1, D]`` and features as ``select_state`` keeps them; no host sync."""
    batch, kv_heads, width, columns = features.shape
    positions = columns * 2 if bits == 4 else columns
    group = query.shape[1] // kv_heads
    desc = Scores(query.dtype, width, group, 0, extent is not None, channels is not None, bits)
    function = kernel(desc, columns, 0 if scales is None else scales.shape[3])
    given = {
        "features": features, "scales": scales, "length": positions,
        "channels": None if channels is None else channels.contiguous(),
    }  # fmt: skip
    return _score(desc, function, query, (batch, kv_heads, positions), extent, least, given)


def _score(
    desc: Scores, function: Any, query: Tensor, shape: tuple[int, int, int], extent: Tensor | None, least: int,
    given: dict[str, Any],
) -> Tensor:  # fmt: skip
    out = torch.empty(shape, dtype=torch.float32, device=query.device)
    batch, kv_heads, blocks = shape
    given |= {
        "query": query, "out": out, "extent": extent, "least": least, "columns": blocks, "kv_heads": kv_heads,
        "query_batch": query.stride(0), "query_head": query.stride(1), "query_dim": query.stride(3),
    }  # fmt: skip
    launch(function, (batch * kv_heads, -(-blocks // tiles(desc)[1])), given, query, num_warps=WARPS)
    return out
