"""Decode attention on a CPU in generated C++: one pass over the filled cache, at the speed of the memory.

``scaled_dot_product_attention`` multiplies small blocks of the cache by its general matrix kernels and masks the scores
in another pass; with few query rows that costs more than reading. :func:`run` computes what
:func:`fxopt.codegen.ops.attention.attention` computes (that function is the meaning) for the inputs that
:func:`chosen` takes, and returns None for all others. The C++ compiler is the one that Inductor needs on a CPU anyway.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.codegen import compat
from fxopt.codegen.kernels.cpu_attention_source import BODY, HEADER
from fxopt.codegen.kernels.cpu_vectors import MOST_LANES, vectors

SPLIT = 512
"""Cache positions of one task, whatever the length, so that no sum depends on it."""
MOST_ROWS = {torch.float32: 16, torch.bfloat16: 4}
"""Query rows behind one KV head (group size times new tokens) up to which this is faster than the library's matrix
products; those have instructions of their own for bfloat16. Measured: docs/decisions.md."""
STORED = {torch.float32: "float", torch.bfloat16: "uint16_t"}
"""Dtypes of query, key and value, and the C++ type of an element."""

_ABSENT, _SEEN, _BIAS = 0, 1, 2
_TENSORS = ("query", "key", "value", "seen", "bias", "sinks", "ends", "out", "scratch")
_INTEGERS = 22
Sizes = tuple[int, ...]


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
    return header + vectors(stored) + BODY


def chosen(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, soft_cap: float) -> CpuAttention | None:
    """The variant for these tensors (real or fake), or None where the PyTorch body is the better or the only way."""
    dtypes = (query.dtype, key.dtype, value.dtype)
    steps = (query.stride(), key.stride(), value.stride())
    return _variant(dtypes, (query.shape, key.shape, value.shape), steps, is_causal, soft_cap > 0)


def _variant(
    dtypes: tuple[torch.dtype, ...], shapes: tuple[Sizes, ...], steps: tuple[Sizes, ...], is_causal: bool, capped: bool
) -> CpuAttention | None:
    (_, heads, tokens, width), (_, kv_heads, _, _), (*_, value_width) = shapes
    if is_causal or len(set(dtypes)) != 1 or dtypes[0] not in STORED:
        return None
    if width % MOST_LANES or value_width % MOST_LANES or width > 256 or value_width > 256 or heads % kv_heads:
        return None
    rows = heads // kv_heads * tokens
    if rows > MOST_ROWS[dtypes[0]] or any(step[3] != 1 for step in steps):
        return None
    return CpuAttention(dtypes[0], width, value_width, tile_of(rows), capped)


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
    if mask is not None and mask.dtype not in (torch.bool, torch.float32):
        mask = mask.float()
    call = _call(
        (query.dtype, key.dtype, value.dtype),
        (query.shape, key.shape, value.shape),
        (query.stride(), key.stride(), value.stride()),
        None if mask is None else (mask.dtype, mask.shape, mask.stride()),
        None if sinks is None else sinks.shape,
        is_causal,
        soft_cap > 0,
    )
    if call is None:
        return None
    ends = None
    if extent is not None and extent.ndim:
        ends = extent.to(torch.int64).contiguous()
        extent = ends.amax()
    length = call.length if extent is None else max(1, min(int(extent), call.length))
    # The kernel writes all that it reads. Where something is absent it gets this in its place and does not look.
    scratch = torch.empty(call.split_floats * (-(-length // SPLIT)))
    out = query.new_empty(call.out_shape)
    call.kernel(
        query, key, value, mask if call.mask_kind == _SEEN else scratch, mask if call.mask_kind == _BIAS else scratch,
        scratch if sinks is None else sinks.float().contiguous(), scratch if ends is None else ends, out, scratch,
        *call.sizes, length, *call.steps, int(ends is not None), torch.get_num_threads(), scale, soft_cap or 1.0,
    )  # fmt: skip
    return out.transpose(1, 2)


class _Call(NamedTuple):
    """What dtypes, shapes and strides decide. Found once and looked up after that: a decode step is short."""

    kernel: Callable[..., Any]
    length: int
    split_floats: int
    """Scratch of one split of the cache."""
    out_shape: tuple[int, int, int, int]
    mask_kind: int
    sizes: Sizes
    steps: Sizes


@functools.lru_cache(maxsize=512)
def _call(
    dtypes: tuple[torch.dtype, ...],
    shapes: tuple[Sizes, ...],
    steps: tuple[Sizes, ...],
    mask: tuple[torch.dtype, Sizes, Sizes] | None,
    sinks: Sizes | None,
    is_causal: bool,
    capped: bool,
) -> _Call | None:
    query, key, value = shapes
    batch, heads, tokens, _ = query
    kv_heads, length, width = key[1], key[2], value[3]
    variant = _variant(dtypes, shapes, steps, is_causal, capped)
    # The kernel trusts its arguments; what does not fit together is the body's to refuse.
    if variant is None or not length or key[0] != batch or value[:3] != key[:3] or sinks not in (None, (heads,)):
        return None
    kind, mask_steps = _ABSENT, (0, 0, 0, 0)
    if mask is not None:
        dtype, sizes, own_steps = mask
        whole = (batch, heads, tokens, length)[4 - len(sizes) :]
        if len(sizes) > 4 or any(own not in (1, size) for own, size in zip(sizes, whole, strict=True)):
            return None
        kind = _SEEN if dtype == torch.bool else _BIAS
        broadcast = [0 if size == 1 else step for size, step in zip(sizes, own_steps, strict=True)]
        mask_steps = (*[0] * (4 - len(sizes)), *broadcast)  # type: ignore[assignment]
    kernel = compiled(variant)
    if kernel is None:
        return None
    group = heads // kv_heads
    return _Call(
        kernel, length, batch * kv_heads * group * tokens * (width + 2), (batch, tokens, heads, width), kind,
        (batch, kv_heads, group, tokens),
        (*steps[0][:3], *steps[1][:3], *steps[2][:3], *mask_steps, kind, int(sinks is not None)),
    )  # fmt: skip


def tile_of(rows: int) -> int:
    """Query rows that share a pass, of so many: 1, 2 or 4."""
    return 4 if rows > 2 else rows


@functools.cache
def compiled(variant: CpuAttention) -> Callable[..., Any] | None:
    """The kernel of a variant, or None as of :func:`built`."""
    stored = STORED[variant.dtype]
    types = {"seen": "bool", "bias": "float", "sinks": "float", "ends": "int64_t", "scratch": "float"}
    pointers = [f"{'' if n in ('out', 'scratch') else 'const '}{types.get(n, stored)}*" for n in _TENSORS]
    return built(variant.name, [*pointers, *["int64_t"] * _INTEGERS, "float", "float"], source(variant))


def built(name: str, types: Sequence[str], text: str) -> Callable[..., Any] | None:
    """The C++ function ``kernel`` of `text`; None, with one warning, where there is no compiler that can build it."""
    try:
        return compat.cpp_function(types, text)
    except compat.KernelNotCompiled as problem:
        warnings.warn(
            f"fxopt: {name} could not be compiled ({str(problem).splitlines()[0][:200]}); it runs in PyTorch instead, "
            "with the same results. Inductor's own settings choose the C++ compiler (CXX).",
            stacklevel=3,
        )
        return None
