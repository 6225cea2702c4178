"""Decode attention on chosen positions in generated C++ for CPUs.

:func:`attend` computes what :func:`fxopt.codegen.ops.sparse_gather.attend_to` computes, and returns None where the
PyTorch form has to do it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxopt.codegen.kernels.cpu_attention import SPLIT, STORED, CpuAttention, built, tile_of
from fxopt.codegen.kernels.cpu_gather_source import BODY, HEADER
from fxopt.codegen.kernels.cpu_vectors import MOST_LANES, vectors

_TENSORS = ("query", "key", "value", "index", "counts", "seen", "bias", "sinks", "out", "scratch")
_TYPES = {"index": "int64_t", "counts": "int64_t", "seen": "bool", "bias": "float", "sinks": "float",
          "scratch": "float"}  # fmt: skip
_WRITTEN = ("out", "scratch")


def attend(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, valid: Tensor | None, mask: Tensor | None, filled: int,
    sinks: Tensor | None, scale: float, soft_cap: float, block: int,
) -> Tensor | None:  # fmt: skip
    """[B, Hq, 1, DV] in the memory of [B, 1, Hq, DV]; arguments as of ``attend_to``."""
    batch, heads, tokens, width = query.shape
    kv_heads, value_width = key.shape[1], value.shape[3]
    if query.dtype not in STORED or not query.dtype == key.dtype == value.dtype or tokens != 1:
        return None
    if width % MOST_LANES or value_width % MOST_LANES or max(width, value_width) > 256 or heads % kv_heads:
        return None
    if not query.stride(3) == key.stride(3) == value.stride(3) == index.stride(2) == 1:
        return None
    if mask is not None and (mask.ndim > 4 or mask.shape[-1] != key.shape[2]):
        return None
    group = heads // kv_heads
    variant = CpuAttention(query.dtype, width, value_width, tile_of(group), soft_cap > 0)
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


@functools.cache
def _attend(variant: CpuAttention) -> Callable[..., Any] | None:
    stored = STORED[variant.dtype]
    pointers = [f"{'' if n in _WRITTEN else 'const '}{_TYPES.get(n, stored)}*" for n in _TENSORS]
    name = variant.name.replace("attention", "gather")
    return built(name, [*pointers, *["int64_t"] * 24, "float", "float"], _source(variant))


def _source(variant: CpuAttention) -> str:
    """The C++ text of a variant."""
    stored = STORED[variant.dtype]
    header = HEADER.format(
        name=variant.name.replace("attention", "gather"), head_dim=variant.head_dim, value_dim=variant.value_dim,
        tile=variant.tile, block=variant.block, split=SPLIT, capped=str(variant.capped).lower(), stored=stored,
    )  # fmt: skip
    return header + vectors(stored) + BODY
