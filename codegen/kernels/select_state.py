"""What sparse attention keeps beside a cache, kept up to date on the device: page bounds, and features of the keys.

The state says itself how many positions it covers. Where that is one short of the cache, one key was added and the last
block alone is derived again from its keys; otherwise all of them are. Either way a block's state is a function of the
keys in it, so that steps and one shot give the same bits. `filled` is written by a launch of its own, after every
program of the first has read it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.launch import launch
from fxopt.codegen.source import fill, load_kernel, write_source

SCALE_BLOCK = 128
"""Positions that share a scale where features are quantised."""
LEVELS = {8: 127, 4: 7}

HEAD = '''
          | """State beside a KV cache: derived from the keys, all of it or the last block."""
          |
          | import triton
          | import triton.language as tl
          |
          |
          | @triton.jit
          | def positions_in_use(extent, length):
extent    |     return tl.maximum(tl.minimum(tl.load(extent), length), 0).to(tl.int32)
!extent   |     return length
          |
          |
          | @triton.jit(do_not_specialize=["length", "least"])
          | def commit(filled, extent, length, least):
          |     end = positions_in_use(extent, length)
          |     if end > least:
          |         tl.store(filled, end.to(tl.int64))
          |
          |
'''

PAGES = '''
          | @triton.jit(do_not_specialize=["length", "least"])
          | def update(
          |     bounds,  # [B, Hkv, P, 2 D]: maximum, minimum
          |     filled,  # []
          |     key,  # [B, Hkv, S, D]
          |     extent,  # []
          |     length,  # S
          |     least,
          |     columns,  # P
          |     kv_heads,
          |     key_batch,
          |     key_head,
          |     key_position,
          |     key_dim,
          | ):
          |     D: tl.constexpr = $D
          |     PAGE: tl.constexpr = $PAGE
          |     SPAN: tl.constexpr = $SPAN  # pages of one program
          |     TILE: tl.constexpr = $TILE  # pages at a time
          |     pair = tl.program_id(0).to(tl.int64)
          |     end = positions_in_use(extent, length)
          |     if end <= least:
          |         return
          |     first = tl.program_id(1) * SPAN
          |     last = tl.minimum(first + SPAN, (end + PAGE - 1) // PAGE)
          |     if tl.load(filled) == end - 1:
          |         first = tl.maximum(first, (end - 1) // PAGE)
          |     d = tl.arange(0, $BD)
          |     key += pair // kv_heads * key_batch + pair % kv_heads * key_head
          |     for start in tl.range(first, last, TILE):
          |         page = start + tl.arange(0, TILE)
          |         position = page[:, None] * PAGE + tl.arange(0, PAGE)[None, :]  # [TILE, PAGE]
          |         live = ((position < end) & (page < last)[:, None])[:, :, None] & (d < D)[None, None, :]
          |         at = key + position.to(tl.int64)[:, :, None] * key_position + d[None, None, :] * key_dim
          |         value = tl.load(at, mask=live, other=0.0).to(tl.float32)  # [TILE, PAGE, BD]
          |         high = tl.max(tl.where(live, value, float("-inf")), 1)
          |         low = tl.min(tl.where(live, value, float("inf")), 1)
          |         # Maxima of Triton drop a NaN, those of torch keep it.
          |         broken = tl.max((value != value).to(tl.int32), 1) != 0
          |         high = tl.where(broken, float("nan"), high)
          |         low = tl.where(broken, float("nan"), low)
          |         to = bounds + (pair * columns + page)[:, None] * (2 * D) + d[None, :]
          |         kept = (page < last)[:, None] & (d < D)[None, :]
          |         tl.store(to, high.to(bounds.dtype.element_ty), mask=kept)
          |         tl.store(to + D, low.to(bounds.dtype.element_ty), mask=kept)
'''

FEATURES = '''
coded     | @triton.jit
coded     | def code(value, scale):
coded     |     """The nearest whole number, halves to even: float32 has no room for more at this size."""
coded     |     scale = tl.maximum(scale, 1.1754943508222875e-38)  # all zeros
coded     |     return (value / scale[:, None] + 12582912.0) - 12582912.0
coded     |
coded     |
          | @triton.jit(do_not_specialize=["length", "least"])
          | def update(
          |     features,  # [B, Hkv, C, S']
          |     filled,  # []
          |     key,  # [B, Hkv, S, D]
          |     extent,  # []
channels  |     channels,  # [Hkv, C]
coded     |     scales,  # [B, Hkv, C, S' / 128]
          |     length,  # S
          |     least,
          |     columns,  # of features
          |     kv_heads,
          |     key_batch,
          |     key_head,
          |     key_position,
          |     key_dim,
          | ):
          |     C: tl.constexpr = $C
          |     SPAN: tl.constexpr = $SPAN  # positions of one program
          |     TILE: tl.constexpr = $TILE  # positions at a time
          |     pair = tl.program_id(0).to(tl.int64)
          |     end = positions_in_use(extent, length)
          |     if end <= least:
          |         return
          |     first = tl.program_id(1) * SPAN
          |     last = tl.minimum(first + SPAN, end)
          |     if tl.load(filled) == end - 1:
!coded    |         first = tl.maximum(first, end - 1)
coded     |         first = tl.maximum(first, (end - 1) // TILE * TILE)
          |     c = tl.arange(0, $BC)
          |     row = pair * C + c
channels  |     channel = tl.load(channels + pair % kv_heads * C + c, mask=c < C, other=0)
!channels |     channel = c
          |     key += pair // kv_heads * key_batch + pair % kv_heads * key_head
          |     at = key + channel[:, None] * key_dim  # [BC, 1]
          |     for start in tl.range(first, last, TILE):
!four     |         n = start + tl.arange(0, TILE)
!four     |         live = (c < C)[:, None] & (n < last)[None, :]
!four     |         value = tl.load(at + n.to(tl.int64)[None, :] * key_position, mask=live, other=0.0)  # [BC, TILE]
!coded    |         tl.store(features + row[:, None] * columns + n[None, :], value, mask=live)
eight     |         value = value.to(tl.float32)
eight     |         scale = tl.max(tl.abs(value), 1) / $LEVELS
eight     |         tl.store(features + row[:, None] * columns + n[None, :], code(value, scale).to(tl.int8), mask=live)
four      |         # Two neighbours a byte, the even position in the low half.
four      |         byte = start // 2 + tl.arange(0, TILE // 2)
four      |         n = 2 * byte
four      |         live = (c < C)[:, None] & (n < last)[None, :]
four      |         even = tl.load(at + n.to(tl.int64)[None, :] * key_position, mask=live, other=0.0).to(tl.float32)
four      |         both = live & (n + 1 < last)[None, :]
four      |         odd_at = at + (n + 1).to(tl.int64)[None, :] * key_position
four      |         odd = tl.load(odd_at, mask=both, other=0.0).to(tl.float32)
four      |         scale = tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1)) / $LEVELS
four      |         packed = (code(even, scale) + 8.0 + 16.0 * (code(odd, scale) + 8.0)).to(tl.int32)
four      |         tl.store(features + row[:, None] * columns + byte[None, :], packed.to(tl.uint8), mask=live)
coded     |         tl.store(scales + row * $SCALES + start // TILE, scale, mask=c < C)
'''


@dataclass(frozen=True)
class Kept:
    """One variant of state: everything that changes the generated source."""

    width: int
    """Channels that are kept: D for page bounds, C for features."""
    page: int = 0
    """Positions of a page; 0: features of every key."""
    has_extent: bool = False
    has_channels: bool = False
    """Features are those of listed channels, else of the first `width`."""
    bits: int = 0
    """0: features in the cache's dtype; 8 or 4: whole numbers with a float32 scale for each 128 positions."""

    def __post_init__(self) -> None:
        if self.bits not in (0, 8, 4):
            raise Unsupported(f"features of {self.bits} bits; 0 (the cache's dtype), 8 and 4 have kernels")
        if not 1 <= self.width <= 256:
            raise Unsupported(f"{self.width} channels; the kernels that keep state take 1 to 256")
        if self.page and self.page & (self.page - 1):
            raise Unsupported(f"pages of {self.page} positions; a power of two has kernels")


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def spans(kept: Kept) -> tuple[int, int]:
    """Blocks (pages or positions) of one program, and how many it takes at a time."""
    if kept.page:
        return 64, max(1, 8192 // (kept.page * _power_of_two(kept.width)))
    return 1024, SCALE_BLOCK if kept.bits or kept.width <= 64 else 32


@functools.cache
def source(kept: Kept, columns: int = 0) -> str:
    """The Triton module of a variant; `columns`: positions that scales are kept for, with quantised features only."""
    span, tile = spans(kept)
    values = {
        "D": kept.width, "C": kept.width, "BD": _power_of_two(kept.width), "BC": _power_of_two(kept.width),
        "PAGE": kept.page, "SPAN": span, "TILE": tile, "LEVELS": f"{LEVELS.get(kept.bits, 1)}.0",
        "SCALES": columns // SCALE_BLOCK,
    }  # fmt: skip
    holds = {
        "extent": kept.has_extent, "channels": kept.has_channels, "coded": kept.bits > 0, "eight": kept.bits == 8,
        "four": kept.bits == 4,
    }  # fmt: skip
    return fill(HEAD, holds, values) + "\n\n" + fill(PAGES if kept.page else FEATURES, holds, values)


@functools.cache
def kernels(kept: Kept, columns: int = 0) -> Mapping[str, Any]:
    """The kernels of a variant by name; the source file is written on the first call."""
    name = "update_page_bounds" if kept.page else "update_features"
    header = {field: str(getattr(kept, field)) for field in kept.__annotations__}
    path = write_source(name, source(kept, columns), header)
    return {symbol: load_kernel(path, symbol) for symbol in ("update", "commit")}


def update_page_bounds(
    bounds: Tensor, filled: Tensor, key: Tensor, extent: Tensor | None = None, *, page: int, least: int = 0
) -> None:
    """Bring ``bounds: [B, Hkv, P, 2 D]`` (contiguous) and `filled` up to ``key: [B, Hkv, S, D]``; no host sync."""
    kept = Kept(key.shape[3], page, extent is not None)
    pages = min(bounds.shape[2], -(-key.shape[2] // page))
    _update(kept, {"bounds": bounds, "columns": bounds.shape[2]}, pages, filled, key, extent, least)


def update_features(
    features: Tensor,
    filled: Tensor,
    key: Tensor,
    extent: Tensor | None = None,
    channels: Tensor | None = None,
    scales: Tensor | None = None,
    *,
    least: int = 0,
    bits: int = 0,
) -> None:
    """Bring ``features: [B, Hkv, C, S']`` and `filled` up to ``key: [B, Hkv, S, D]``; no host synchronisation.

    ``channels: [Hkv, C]`` int64, or None for the first C. With `bits` 8 (int8) or 4 (uint8, two positions a byte)
    ``scales: [B, Hkv, C, S' / 128]`` float32 are kept too. All contiguous but the key.
    """
    kept = Kept(features.shape[2], 0, extent is not None, channels is not None, bits)
    given = {
        "features": features, "columns": features.shape[3], "scales": scales,
        "channels": None if channels is None else channels.contiguous(),
    }  # fmt: skip
    _update(kept, given, key.shape[2], filled, key, extent, least)


def _update(
    kept: Kept, given: dict[str, Any], blocks: int, filled: Tensor, key: Tensor, extent: Tensor | None, least: int
) -> None:
    batch, kv_heads, length, _ = key.shape
    scales = given.get("scales")
    functions = kernels(kept, 0 if scales is None else scales.shape[3] * SCALE_BLOCK)
    given |= {"filled": filled, "key": key, "extent": extent, "length": length, "least": least, "kv_heads": kv_heads}
    given |= dict(zip(("key_batch", "key_head", "key_position", "key_dim"), key.stride(), strict=True))
    launch(functions["update"], (batch * kv_heads, -(-blocks // spans(kept)[0])), given, key, num_warps=4)
    launch(functions["commit"], (1,), given, key, num_warps=1)
