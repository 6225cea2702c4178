"""What sparse attention chooses, in generated C++ for CPUs: bounds of pages, scores of tokens, and the best of them.

:func:`page_bounds`, :func:`feature_scores` and :func:`best` compute what ``page_scores``, ``feature_scores`` and
``choose`` of :mod:`fxopt.codegen.ops.sparse_select` compute, and return None where the PyTorch form has to do it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.codegen.kernels.cpu_attention import STORED, built, tile_of
from fxopt.codegen.kernels.cpu_select_source import BOUNDS, CODES, FEATURES, HEADER, TOP
from fxopt.codegen.kernels.cpu_vectors import MOST_LANES, vectors

AHEAD = 8
"""Pages of bounds that are fetched ahead; measured: docs/decisions.md."""
QUANTUM = 128
"""Positions that share one scale."""
_KEPT = {8: (torch.int8, "int8_t"), 4: (torch.uint8, "uint8_t")}


def page_bounds(query: Tensor, bounds: Tensor, used: int) -> Tensor | None:
    """[B, Hkv, P] float32, -inf from `used` on; ``query: [B, Hq, 1, D]``, ``bounds: [B, Hkv, P, 2 D]``, contiguous."""
    batch, heads, _, width = query.shape
    kv_heads, pages = bounds.shape[1:3]
    if query.dtype not in STORED or bounds.dtype not in STORED or width % MOST_LANES or width > 256:
        return None
    if query.stride(3) != 1 or not bounds.is_contiguous():
        return None
    group = heads // kv_heads
    kernel = _bounds(query.dtype, bounds.dtype, width, tile_of(group))
    if kernel is None:
        return None
    scores = torch.empty(batch, kv_heads, pages)
    kernel(
        query, bounds, scores, batch, kv_heads, group, pages, used, query.stride(0), query.stride(1),
        torch.get_num_threads(),
    )  # fmt: skip
    return scores


def feature_scores(
    query: Tensor, features: Tensor, channels: Tensor | None, scales: Tensor | None, used: int, bits: int
) -> Tensor | None:
    """[B, Hkv, S'] float32, -inf from `used` on; ``query: [B, Hq, 1, D]``, ``features: [B, Hkv, C, S' or S' / 2]``."""
    batch, heads, _, width = query.shape
    kv_heads, kept, length = features.shape[1:]
    dtype, kept_type = _KEPT.get(bits, (query.dtype, STORED.get(query.dtype)))
    if query.dtype not in STORED or features.dtype != dtype or width % MOST_LANES or width > 256 or kept > width:
        return None
    if query.stride(3) != 1 or features.stride(3) != 1 or (scales is not None and scales.stride(3) != 1):
        return None
    length = length * 2 if bits == 4 else length
    group = heads // kv_heads
    kernel = _features(query.dtype, kept_type, width, tile_of(group), bits)
    if kernel is None:
        return None
    scores = torch.empty(batch, kv_heads, length)
    kernel(
        query, features, query.new_empty(1, dtype=torch.int64) if channels is None else channels.contiguous(),
        scores if scales is None else scales, scores, batch, kv_heads, group, kept, length, used, query.stride(0),
        query.stride(1), *features.stride()[:3], *(0, 0, 0) if scales is None else scales.stride()[:3],
        int(channels is not None), torch.get_num_threads(),
    )  # fmt: skip
    return scores


def best(scores: Tensor, bias: Tensor, used: int, count: int, counts: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """``[B, Hkv, count]`` int64, ascending, padded with -1, and how many are chosen, ``[B, Hkv]``.

    ``scores: [B, Hkv, N or more]``, ``bias: [B or 1, N]``, of which the first `used` are looked at. ``counts``: fewer
    than `count` for each KV head.
    """
    if not scores.dtype == bias.dtype == torch.float32 or not scores.is_contiguous() or bias.stride(1) != 1:
        return None
    kernel = _best()
    if kernel is None:
        return None
    batch, kv_heads, length = scores.shape
    index = torch.empty(batch, kv_heads, count, dtype=torch.int64)
    valid = torch.empty(batch, kv_heads, dtype=torch.int64)
    scratch = torch.empty(batch * kv_heads * 2 * used, dtype=torch.int32)
    kernel(
        scores, bias, torch.tensor(counts or [count] * kv_heads), index, valid, scratch, batch, kv_heads, length, used,
        count, 0 if bias.shape[0] == 1 else bias.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return index, valid


@functools.cache
def _bounds(dtype: torch.dtype, kept: torch.dtype, width: int, tile: int) -> Callable[..., Any] | None:
    stored, of_bounds = STORED[dtype], STORED[kept]
    name = f"cpu_bounds_{_short(dtype)}_{_short(kept)}_d{width}_t{tile}"
    text = _start(name, "bounds of pages", stored, of_bounds, width, tile)
    types = [f"const {stored}*", f"const {of_bounds}*", "float*", *["int64_t"] * 8]
    return built(name, types, text + BOUNDS.format(ahead=AHEAD))


@functools.cache
def _features(dtype: torch.dtype, kept: str, width: int, tile: int, bits: int) -> Callable[..., Any] | None:
    stored = STORED[dtype]
    name = f"cpu_features_{_short(dtype)}_{bits}_d{width}_t{tile}"
    text = _start(name, "scores of tokens", stored, kept, width, tile) + CODES[bits]
    types = [f"const {stored}*", f"const {kept}*", "const int64_t*", "const float*", "float*", *["int64_t"] * 16]
    return built(name, types, text + FEATURES.format(quantum=QUANTUM, scaled=str(bits > 0).lower()))


@functools.cache
def _best() -> Callable[..., Any] | None:
    text = _start("cpu_top", "the best", "float", "float", MOST_LANES, 1) + TOP
    types = ["const float*", "const float*", "const int64_t*", "int64_t*", "int64_t*", "int32_t*", *["int64_t"] * 7]
    return built("cpu_top", types, text)


def _start(name: str, what: str, stored: str, kept: str, width: int, tile: int) -> str:
    header = HEADER.format(name=name, what=what, head_dim=width, tile=tile, stored=stored, kept=kept)
    return header + vectors("uint16_t")  # bfloat16 bounds may lie beside a float32 cache


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
