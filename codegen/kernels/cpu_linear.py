"""A linear of few rows on a CPU in generated C++: its weights are read once, at the speed of the memory.

The library prepares the weights of a product for its inner loop anew in each call, which for few rows costs more than
the product. :func:`run` computes ``torch.nn.functional.linear`` where :func:`refused` has nothing against it, and
returns None elsewhere. The C++ compiler is the one that Inductor needs on a CPU anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.codegen.kernels import cpu_linear_turned_source as turned
from fxopt.codegen.kernels import row_stride
from fxopt.codegen.kernels.cpu_attention import STORED, built
from fxopt.codegen.kernels.cpu_linear_source import BODY, HEADER
from fxopt.codegen.kernels.cpu_vectors import lanes, vectors

MOST_ROWS = {torch.float32: 24, torch.bfloat16: 4}
"""Rows of x up to which this is faster than the library. Measured: docs/decisions.md."""
MOST_ROWS_TURNED = 8
"""The same for a weight that is stored [K, N]."""
LEAST_BYTES = 128 << 10
"""Weights that are smaller cost less than the way to a kernel that PyTorch does not know."""
AHEAD = 32 << 10
"""Bytes of the weight between what is computed and what is fetched."""
CHAIN = 64
"""Products that a lane adds one after another before the lanes are summed: as many in registers of any width."""
FIRST_CACHE = 32 << 10
"""Bytes of a core's first cache that x may take."""
TILES = (1, 2, 3, 4, 6, 8)
COLUMNS = 96
"""Rows of the weight of one task, at most; every tile divides it."""
Sizes = tuple[int, ...]
Described = tuple[torch.dtype, Sizes, Sizes]


@dataclass(frozen=True)
class Variant:
    """What the C++ compiler should know. Rows, widths and strides are arguments."""

    dtype: torch.dtype
    rows: int
    """Rows of x that share a pass over a tile."""
    tile: int
    """Rows of the weight that are computed together."""

    @property
    def block(self) -> int:
        """Channels of a block: the rows of x that share a pass stay in the first cache."""
        segment = CHAIN * lanes()
        return max(segment, FIRST_CACHE // (4 * self.rows) // segment * segment)

    @property
    def name(self) -> str:
        return f"cpu_linear_{str(self.dtype).removeprefix('torch.')}_m{self.rows}_t{self.tile}"


def variant_of(dtype: torch.dtype, rows: int) -> Variant:
    """The variant for so many rows of x: as few passes as there are registers for, of equal size."""
    registers = 16 if lanes() == 8 else 32  # AVX2; AVX-512 and NEON
    most = 8 if registers == 32 else 4
    share = -(-rows // -(-rows // most))
    # One register for each sum, one for each row of the tile and one for a row of x.
    fitting = min((registers - 1) // (share + 1), 8 if share == 1 and dtype == torch.float32 else 4)
    return Variant(dtype, share, max(tile for tile in TILES if tile <= fitting))


def source(variant: Variant) -> str:
    """The C++ text of a variant."""
    stored = STORED[variant.dtype]
    header = HEADER.format(
        name=variant.name, rows=variant.rows, tile=variant.tile, columns=COLUMNS, segment=CHAIN * lanes(),
        block=variant.block, most=max(MOST_ROWS.values()), stored=stored,
    )  # fmt: skip
    return header + vectors(stored) + BODY


class Refusal(NamedTuple):
    """Why the library keeps a linear: ``kind`` is "dtype", "layout", "rows" or "size", ``reason`` in words."""

    kind: str
    reason: str


def refused(x: Tensor, weight: Tensor, bias: Tensor | None) -> Refusal | None:
    """Why the library keeps these tensors, real or fake; symbolic sizes count as what they were seen with."""
    return _refused(_expected(x), _expected(weight), None if bias is None else _expected(bias))


def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``[..., N]``, contiguous, or None; ``x: [..., K]``, ``weight: [N, K]``, by rows or by columns, ``bias: [N]``."""
    call = _call(_described(x), _described(weight), None if bias is None else _described(bias))
    if call is None:
        return None
    out = x.new_empty(call.out_shape)
    call.kernel(
        x.float().contiguous() if call.widened else x, weight, weight if bias is None else bias, out, *call.sizes,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


class _Call(NamedTuple):
    """What dtypes, shapes and strides decide. Found once and looked up after that: a decode step is short."""

    kernel: Callable[..., Any]
    out_shape: Sizes
    widened: bool
    """x becomes float32 first."""
    sizes: Sizes


def _described(tensor: Tensor) -> Described:
    return tensor.dtype, tensor.shape, tensor.stride()


def _expected(tensor: Tensor) -> Described:
    shape, steps = (
        tuple(s if isinstance(s, int) else s.node.hint or 1 for s in sizes)  # a hint installs no guard
        for sizes in (tensor.shape, tensor.stride())
    )
    return tensor.dtype, shape, steps


def _refused(x: Described, weight: Described, bias: Described | None) -> Refusal | None:
    (dtype, shape, steps), (kept, sizes, weight_steps) = x, weight
    if dtype not in STORED or kept != dtype:
        reason = f"{dtype} by {kept}: generated C++ reads float32 and bfloat16"
        return Refusal("dtype", reason.replace("torch.", ""))
    if len(sizes) != 2 or not shape or shape[-1] != sizes[1] or bias not in (None, (dtype, sizes[:1], (1,))):
        return Refusal("layout", f"x {list(shape)} by {list(sizes)}")
    width, depth = sizes
    rows = torch.Size(shape[:-1]).numel()
    most = MOST_ROWS_TURNED if _is_turned(weight) else MOST_ROWS[dtype]
    if rows > most:
        return Refusal("rows", f"{rows} rows: the library is as fast from {most + 1} on")
    if width * depth * dtype.itemsize < LEAST_BYTES:
        size = width * depth * dtype.itemsize >> 10
        return Refusal("size", f"[{width}, {depth}]: {size} kB of weights are too few")
    apart = steps[-1] != 1 or row_stride(shape, steps) is None
    by_rows = weight_steps[1] == 1 and weight_steps[0] >= depth
    if not rows or apart or not (by_rows or _is_turned(weight)):
        return Refusal("layout", f"strides {list(steps)} of x, {list(weight_steps)} of the weight")
    return None


def _is_turned(weight: Described) -> bool:
    """A weight [N, K] that is stored [K, N]."""
    _, sizes, steps = weight
    return len(sizes) == 2 and min(sizes) > 1 and steps[0] == 1 and steps[1] >= sizes[0]


@functools.lru_cache(maxsize=1024)
def _call(x: Described, weight: Described, bias: Described | None) -> _Call | None:
    if _refused(x, weight, bias) is not None:
        return None
    (dtype, shape, steps), (_, (width, depth), weight_steps) = x, weight
    rows, widened = torch.Size(shape[:-1]).numel(), dtype != torch.float32
    if _is_turned(weight):
        kernel, weight_step, ahead = compiled_turned(dtype), weight_steps[1], 0
    else:
        variant, weight_step = variant_of(dtype, rows), weight_steps[0]
        kernel = compiled(variant)
        # Whole tiles further on, in the same block of channels.
        tile_bytes = variant.tile * min(depth, variant.block) * dtype.itemsize
        ahead = -(-AHEAD // tile_bytes) * variant.tile * weight_step
    if kernel is None:
        return None
    stride = depth if widened else row_stride(shape, steps)
    assert stride is not None
    sizes = (rows, width, depth, stride, weight_step, ahead, int(bias is not None))
    return _Call(kernel, (*shape[:-1], width), widened, sizes)


def source_turned(dtype: torch.dtype) -> str:
    """The C++ text for weights of a dtype that are stored [K, N]: as many of them at once as fit into registers."""
    # bfloat16 is read from twice as many channels, which are as many bytes.
    steps, wide = (4, 2) if lanes() == 8 else (8, 2) if dtype == torch.bfloat16 else (4, 4)
    stored = STORED[dtype]
    header = turned.HEADER.format(name=_name_turned(dtype), steps=steps, wide=wide, stored=stored)
    return header + vectors(stored) + turned.BODY


def _name_turned(dtype: torch.dtype) -> str:
    return f"cpu_linear_turned_{str(dtype).removeprefix('torch.')}"


@functools.cache
def compiled(variant: Variant) -> Callable[..., Any] | None:
    """The kernel of a variant, or None as of :func:`fxopt.codegen.kernels.cpu_attention.built`."""
    return built(variant.name, _types(variant.dtype), source(variant))


@functools.cache
def compiled_turned(dtype: torch.dtype) -> Callable[..., Any] | None:
    """As :func:`compiled`, for weights that are stored [K, N]."""
    return built(_name_turned(dtype), _types(dtype), source_turned(dtype))


def _types(dtype: torch.dtype) -> list[str]:
    stored = STORED[dtype]
    return ["const float*", f"const {stored}*", f"const {stored}*", f"{stored}*", *["int64_t"] * 8]
