"""Decode attention on chosen positions, and bounds of pages, in generated C++ for CPUs.

:func:`attend` computes what :func:`fxopt.codegen.ops.sparse_gather.attend_to` computes, :func:`page_bounds` the scores
of :func:`fxopt.codegen.ops.sparse_select.page_scores`; both return None where the PyTorch form has to do it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fxopt.codegen import compat
from fxopt.codegen.kernels.cpu_attention import SPLIT, STORED, CpuAttention
from fxopt.codegen.kernels.cpu_attention_source import HELPERS, LANES, LOADS, TYPES
from fxopt.codegen.kernels.cpu_gather_source import BODY, BOUNDS, HEADER, LOAD_HALVES

AHEAD = 8
"""Pages of bounds that are fetched ahead; measured: docs/decisions.md."""

_ATTEND = ("query", "key", "value", "index", "counts", "seen", "bias", "sinks", "out", "scratch")
_TYPES = {"index": "int64_t", "counts": "int64_t", "seen": "bool", "bias": "float", "sinks": "float",
          "scratch": "float", "scores": "float"}  # fmt: skip
_WRITTEN = ("out", "scratch", "scores")


def attend(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, valid: Tensor | None, mask: Tensor | None, filled: int,
    sinks: Tensor | None, scale: float, soft_cap: float, block: int,
) -> Tensor | None:  # fmt: skip
    """[B, Hq, 1, DV] in the memory of [B, 1, Hq, DV]; arguments as of ``attend_to``."""
    batch, heads, tokens, width = query.shape
    kv_heads, value_width = key.shape[1], value.shape[3]
    if query.dtype not in STORED or not query.dtype == key.dtype == value.dtype or tokens != 1:
        return None
    if width % LANES or value_width % LANES or max(width, value_width) > 256 or heads % kv_heads:
        return None
    if not query.stride(3) == key.stride(3) == value.stride(3) == index.stride(2) == 1:
        return None
    if mask is not None and (mask.ndim > 4 or mask.shape[-1] != key.shape[2]):
        return None
    group = heads // kv_heads
    variant = CpuAttention(query.dtype, width, value_width, 4 if group > 2 else group, soft_cap > 0)
    kernel = _attend(variant)
    if kernel is None:
        return None
    listed = index.shape[2]
    index = index.expand(batch, kv_heads, listed)
    counts = index.new_full((1, 1), listed) if valid is None else valid if valid.ndim == 2 else valid[:, None]
    counts = counts.expand(batch, kv_heads)
    splits = -(-listed * block // SPLIT)
    scratch = torch.empty(batch * kv_heads * splits * group * (value_width + 2))
    out = query.new_empty(batch, 1, heads, value_width)
    seen = bias = scratch  # stands for an absent tensor; never read
    strides, kind = (0, 0, 0), 0
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        if mask.dtype == torch.bool:
            seen, kind = mask, 1
        else:
            mask, kind = mask.float(), 2
            bias = mask
        strides = tuple(0 if mask.shape[d] == 1 else mask.stride(d) for d in (0, 1, 3))  # type: ignore[assignment]
    qs, ks, vs = query.stride(), key.stride(), value.stride()
    kernel(
        query, key, value, index, counts, seen, bias, scratch if sinks is None else sinks.float().contiguous(), out,
        scratch, batch, kv_heads, group, listed, block, filled, index.stride(0), index.stride(1), counts.stride(0),
        counts.stride(1), qs[0], qs[1], ks[0], ks[1], ks[2], vs[0], vs[1], vs[2], *strides, kind,
        int(sinks is not None), torch.get_num_threads(), scale, soft_cap or 1.0,
    )  # fmt: skip
    return out.transpose(1, 2)


def page_bounds(query: Tensor, bounds: Tensor, used: int) -> Tensor | None:
    """[B, Hkv, P] float32, -inf from `used` on; ``query: [B, Hq, 1, D]``, ``bounds: [B, Hkv, P, 2 D]``, contiguous."""
    batch, heads, _, width = query.shape
    kv_heads, pages = bounds.shape[1:3]
    if query.dtype not in STORED or bounds.dtype not in STORED or width % LANES or width > 256:
        return None
    if query.stride(3) != 1 or not bounds.is_contiguous():
        return None
    group = heads // kv_heads
    kernel = _bounds(CpuAttention(query.dtype, width, width, 4 if group > 2 else group, False), bounds.dtype)
    if kernel is None:
        return None
    scores = torch.empty(batch, kv_heads, pages)
    kernel(
        query, bounds, scores, batch, kv_heads, group, pages, used, query.stride(0), query.stride(1),
        torch.get_num_threads(),
    )  # fmt: skip
    return scores


@functools.cache
def _attend(variant: CpuAttention) -> Callable[..., Any] | None:
    return _compiled(variant, "gather", BODY, _ATTEND, 24, 2)


@functools.cache
def _bounds(variant: CpuAttention, kept: torch.dtype) -> Callable[..., Any] | None:
    body = f"constexpr int AHEAD = {AHEAD};\nusing Kept = {STORED[kept]};\n{BOUNDS}"
    if STORED[kept] != STORED[variant.dtype]:
        body = LOAD_HALVES + body
    return _compiled(variant, "bounds", body, ("query", "bounds", "scores"), 8, 0, {"bounds": STORED[kept]})


def source(variant: CpuAttention, kind: str, body: str) -> str:
    """The C++ text of a variant."""
    stored = STORED[variant.dtype]
    header = HEADER.format(
        name=variant.name.replace("attention", kind), head_dim=variant.head_dim, value_dim=variant.value_dim,
        tile=variant.tile, block=variant.block, split=SPLIT, capped=str(variant.capped).lower(), stored=stored,
    )  # fmt: skip
    return header + TYPES + LOADS[stored] + HELPERS + body


def _compiled(
    variant: CpuAttention, kind: str, body: str, tensors: tuple[str, ...], integers: int, floats: int,
    own: Mapping[str, str] = MappingProxyType({}),
) -> Callable[..., Any] | None:  # fmt: skip
    types_of = {**_TYPES, **own}
    stored = STORED[variant.dtype]
    pointers = [f"{'' if n in _WRITTEN else 'const '}{types_of.get(n, stored)}*" for n in tensors]
    types = [*pointers, *["int64_t"] * integers, *["float"] * floats]
    try:
        return compat.cpp_function(types, source(variant, kind, body))
    except compat.KernelNotCompiled as problem:
        warnings.warn(
            f"fxopt: the {kind} kernel of {variant.name} could not be compiled ({str(problem).splitlines()[0][:200]}); "
            "it runs in PyTorch instead, with the same results. Inductor's own settings choose the C++ compiler (CXX).",
            stacklevel=2,
        )
        return None
