"""Decode attention on a CPU in generated C++: one pass over the filled cache, at the speed of the memory.

``scaled_dot_product_attention`` multiplies small blocks of the cache by its general matrix kernels and masks the scores
in another pass; with few query rows that costs more than reading. :func:`run` computes what
:func:`fxopt.codegen.ops.attention.attention` computes (that function is the meaning) for the inputs that
:func:`chosen` takes, and returns None for all others. The C++ compiler is the one that Inductor needs on a CPU anyway.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.codegen import compat
from fxopt.codegen.kernels.cpu_attention_source import BODY, HEADER, LANES, LOADS, TYPES

SPLIT = 512
"""Cache positions of one task, whatever the length, so that no sum depends on it."""
MOST_ROWS = {torch.float32: 16, torch.bfloat16: 4}
"""Query rows behind one KV head (group size times new tokens) up to which this is faster than the library's matrix
products; those have instructions of their own for bfloat16. Measured: docs/decisions.md."""

STORED = {torch.float32: "float", torch.bfloat16: "uint16_t"}
"""Dtypes of query, key and value, and the C++ type of an element."""

_INTEGERS = 21
_TENSORS = ("query", "key", "value", "seen", "bias", "sinks", "out", "scratch")


@dataclass(frozen=True)
class CpuAttention:
    """A variant: what the C++ compiler should know. Lengths, batch, group size, mask and strides are arguments."""

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    tile: int
    """Query rows computed together: 1, 2 or 4."""
    capped: bool

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        cap = "_capped" if self.capped else ""
        return f"cpu_attention_{dtype}_d{self.head_dim}_{self.value_dim}_t{self.tile}{cap}"

    @property
    def block(self) -> int:
        """Keys of a block: a power of two, so that keys and values of a block take at most 128 KB."""
        block = 256
        while block > 32 and block * self.head_dim > 16384:
            block //= 2
        return block


def source(variant: CpuAttention) -> str:
    """The C++ text of a variant."""
    stored = STORED[variant.dtype]
    header = HEADER.format(
        name=variant.name, head_dim=variant.head_dim, value_dim=variant.value_dim, tile=variant.tile,
        block=variant.block, split=SPLIT, capped=str(variant.capped).lower(), stored=stored,
    )  # fmt: skip
    return header + TYPES + LOADS[stored] + BODY


def chosen(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, soft_cap: float) -> CpuAttention | None:
    """The variant for these tensors (real or fake), or None where the PyTorch body is the better or the only way."""
    heads, tokens, width = query.shape[1:]
    kv_heads, value_width = key.shape[1], value.shape[3]
    if is_causal or query.dtype not in STORED or not (query.dtype == key.dtype == value.dtype):
        return None
    if width % LANES or value_width % LANES or width > 256 or value_width > 256 or heads % kv_heads:
        return None
    rows = heads // kv_heads * tokens
    if rows > MOST_ROWS[query.dtype] or not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        return None
    return CpuAttention(query.dtype, width, value_width, 4 if rows > 2 else rows, soft_cap > 0)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extent: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    is_causal: bool,
    soft_cap: float,
) -> Tensor | None:
    """Attention [B, Hq, T, DV] in the memory of [B, T, Hq, DV], or None; arguments as of the operator."""
    variant = chosen(query, key, value, is_causal=is_causal, soft_cap=soft_cap)
    # The kernel trusts its arguments; what does not fit together is the body's to refuse.
    if variant is None or not _fit(query, key, value, mask, sinks):
        return None
    kernel = compiled(variant)
    if kernel is None:
        return None
    batch, heads, tokens, _ = query.shape
    kv_heads, length, width = key.shape[1], key.shape[2], value.shape[3]
    if extent is not None:
        length = max(1, min(int(extent), length))
    rows = heads // kv_heads * tokens
    splits = -(-length // SPLIT)
    # One allocation; the kernel writes all that it reads.
    scratch = torch.empty(batch * kv_heads * splits * rows * (width + 2))
    out = query.new_empty(batch, tokens, heads, width)
    seen = bias = scratch  # stands for an absent tensor; never read
    strides: tuple[int, ...] = (0, 0, 0, 0)
    kind = 0
    if mask is not None:
        if mask.dtype == torch.bool:
            seen, kind = mask, 1
        else:
            mask, kind = mask.float(), 2
            bias = mask
        steps = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
        strides = (0,) * (4 - len(steps)) + tuple(steps)
    qs, ks, vs = query.stride(), key.stride(), value.stride()
    kernel(
        query, key, value, seen, bias, scratch if sinks is None else sinks.float().contiguous(), out, scratch,
        batch, kv_heads, heads // kv_heads, tokens, length, qs[0], qs[1], qs[2], ks[0], ks[1], ks[2],
        vs[0], vs[1], vs[2], *strides, kind, int(sinks is not None), torch.get_num_threads(), scale, soft_cap or 1.0,
    )  # fmt: skip
    return out.transpose(1, 2)


def _fit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None) -> bool:
    batch, heads, tokens, _ = query.shape
    length = key.shape[2]
    if not length or key.shape[0] != batch or value.shape[:3] != key.shape[:3]:
        return False
    if sinks is not None and sinks.shape != (heads,):
        return False
    if mask is None:
        return True
    sizes = (batch, heads, tokens, length)[4 - mask.ndim :]
    return mask.ndim <= 4 and all(own in (1, size) for own, size in zip(mask.shape, sizes, strict=True))


@functools.cache
def compiled(variant: CpuAttention) -> Callable[..., Any] | None:
    """The kernel of a variant; None, with one warning, where there is no compiler that can build it."""
    stored = STORED[variant.dtype]
    types = {"seen": "bool", "bias": "float", "sinks": "float", "scratch": "float"}
    pointers = [f"{'' if n in ('out', 'scratch') else 'const '}{types.get(n, stored)}*" for n in _TENSORS]
    try:
        return compat.cpp_function([*pointers, *["int64_t"] * _INTEGERS, "float", "float"], source(variant))
    except compat.KernelNotCompiled as problem:
        warnings.warn(
            f"fxopt: {variant.name} could not be compiled ({str(problem).splitlines()[0][:200]}); attention runs in "
            "PyTorch instead, with the same results. Inductor's own settings choose the C++ compiler (CXX).",
            stacklevel=2,
        )
        return None
