"""Kernels of routed blocks: gather rows and normalise them, scatter rows with their residual, a linear that may not be
needed. What they compute is said by the operators' bodies in :mod:`fxopt.codegen.ops.routing`.

A row is read once and stays in registers: its copy, its statistic and its normalised form come of one load. The linear
has a fixed grid whose programs read the decision first; where it is no, nothing else is read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.gemm import Norm
from fxopt.codegen.kernels.launch import launch
from fxopt.codegen.source import fill, load_kernel, write_source

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MAX_WIDTH = 16384
"""Channels of a row that one program holds."""

GATHER_NORM = '''
           | """Chosen rows of a stream, as they are and normalised."""
           |
           | import triton
           | import triton.language as tl
           |
           |
           | @triton.jit(do_not_specialize=["count"])
           | def gather_norm(
           |     x,  # [B, S, W]
           |     index,  # [B, C]
gamma      |     gamma,  # [W]
beta       |     beta,  # [W]
           |     rows,  # [B, C, W]
           |     normed,  # [B, C, W]
           |     count,  # C
           |     x_batch,
           |     x_token,
           | ):
           |     W: tl.constexpr = $W
           |     row = tl.program_id(0).to(tl.int64)
           |     w = tl.arange(0, $BW)
           |     live = w < W
           |     place = tl.load(index + row)
           |     value = tl.load(x + row // count * x_batch + place * x_token + w, mask=live, other=0.0)
           |     tl.store(rows + row * W + w, value, mask=live)
           |     wide = value.to(tl.float32)
layer      |     wide = tl.where(live, wide - tl.sum(wide, 0) / W, 0.0)
           |     wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / W + $EPS)
gamma      |     factor = tl.load(gamma + w, mask=live, other=0.0).to(tl.float32)
gamma      |     wide = wide * $FACTOR
beta       |     wide += tl.load(beta + w, mask=live, other=0.0).to(tl.float32)
           |     tl.store(normed + row * W + w, wide.to(normed.dtype.element_ty), mask=live)
'''

SCATTER_RESIDUAL = '''
           | """Rows of a stream become rows + weight * (after - rows); the others are left as they are."""
           |
           | import triton
           | import triton.language as tl
           |
           |
           | @triton.jit(do_not_specialize=["count", "length"])
           | def scatter_residual(
           |     out,  # [B, S, W], a copy of the stream
           |     index,  # [B, C], no place twice
           |     rows,  # [B, C, W]
           |     after,  # [B, C, W]
           |     weight,  # [B, C]
valid      |     valid,  # [B, C], 0: the row as it is
           |     count,  # C
           |     length,  # S
           | ):
           |     W: tl.constexpr = $W
           |     row = tl.program_id(0).to(tl.int64)
           |     w = tl.arange(0, $BW)
           |     live = w < W
           |     place = tl.load(index + row)
           |     share = tl.load(weight + row).to(tl.float32)
           |     before = tl.load(rows + row * W + w, mask=live, other=0.0).to(tl.float32)
           |     new = tl.load(after + row * W + w, mask=live, other=0.0).to(tl.float32)
           |     mixed = before + share * (new - before)
valid      |     mixed = tl.where(tl.load(valid + row) != 0, mixed, before)
           |     at = out + (row // count * length + place) * W + w
           |     tl.store(at, mixed.to(out.dtype.element_ty), mask=live)
'''

LINEAR_IF = '''
           | """x @ weight.T + bias where a number on the device says so, else zeros."""
           |
           | import triton
           | import triton.language as tl
           |
           |
           | @triton.jit(do_not_specialize=["M"])
           | def linear_if(
           |     active,  # []
           |     x,  # [M, K]
           |     weight,  # [N, K]
bias       |     bias,  # [N]
           |     out,  # [M, N]
           |     M,
           |     x_row,
           |     weight_row,
           | ):
           |     N: tl.constexpr = $N
           |     K: tl.constexpr = $K
           |     BM: tl.constexpr = $BM
           |     BN: tl.constexpr = $BN
           |     BK: tl.constexpr = $BK
           |     n = tl.program_id(0) * BN + tl.arange(0, BN)
           |     m = tl.program_id(1) * BM + tl.arange(0, BM)
           |     out_at = out + m.to(tl.int64)[:, None] * N + n[None, :]
           |     inside = (m < M)[:, None] & (n < N)[None, :]
           |     if tl.load(active) == 0:
           |         tl.store(out_at, tl.zeros([BM, BN], out.dtype.element_ty), mask=inside)
           |         return
           |     k = tl.arange(0, BK)
           |     x_at = x + m.to(tl.int64)[:, None] * x_row + k[None, :]
           |     weight_at = weight + n.to(tl.int64)[:, None] * weight_row + k[None, :]
           |     total = tl.zeros([BM, BN], tl.float32)
           |     for start in tl.range(0, K, BK, num_stages=$STAGES):
           |         left = (start + k < K)[None, :]
           |         a = tl.load(x_at + start, mask=(m < M)[:, None] & left, other=0.0)
           |         b = tl.load(weight_at + start, mask=(n < N)[:, None] & left, other=0.0)
           |         total = tl.dot(a, tl.trans(b), total$PRECISION)
bias       |     total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
           |     tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)
'''


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _check(width: int, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise Unsupported(f"{tensor.dtype}; kernels of routed blocks take float16, bfloat16 and float32")
    if width > MAX_WIDTH:
        raise Unsupported(f"{width} channels; kernels of routed blocks hold rows of up to {MAX_WIDTH}")


def row_warps(width: int) -> int:
    """Warps of a program that holds a row: 16 to 32 channels for each thread."""
    return max(1, min(16, _power_of_two(width) // 512))


@functools.cache
def gather_kernel(norm: Norm, width: int) -> Any:
    """The kernel for rows of `width` channels; the source file is written on the first call."""
    holds = {"gamma": norm.gamma, "beta": norm.beta, "layer": norm.kind == "layer"}
    values = {
        "W": width, "BW": _power_of_two(width), "EPS": repr(norm.eps),
        "FACTOR": "(1.0 + factor)" if norm.unit_offset else "factor",
    }  # fmt: skip
    path = write_source("gather_norm", fill(GATHER_NORM, holds, values), {"norm": str(norm), "width": str(width)})
    return load_kernel(path, "gather_norm")


@functools.cache
def scatter_kernel(width: int, valid: bool) -> Any:
    """The kernel for rows of `width` channels, with or without a tensor that says which rows count."""
    text = fill(SCATTER_RESIDUAL, {"valid": valid}, {"W": width, "BW": _power_of_two(width)})
    return load_kernel(write_source("scatter_residual", text, {"width": str(width)}), "scatter_residual")


@dataclass(frozen=True)
class LinearIf:
    """One variant of the linear: shapes, and how it is cut."""

    dtype: torch.dtype
    width: int
    """N."""
    depth: int
    """K."""
    bias: bool
    block_m: int

    @property
    def tiles(self) -> tuple[int, int, int, int]:
        """Columns and depth of a tile, stages, warps."""
        if self.dtype == torch.float32:
            return 32, 32, 3, 4
        return (64, 64, 3, 4) if self.block_m < 128 else (128, 64, 3, 8)


def rows_per_program(rows: int) -> int:
    """Rows of one program: 16 to 128, a power of two. Rows beyond the last are not read."""
    return max(16, min(128, _power_of_two(rows)))


@functools.cache
def linear_kernel(desc: LinearIf) -> Any:
    """The kernel of a variant; the source file is written on the first call."""
    block_n, block_k, stages, _ = desc.tiles
    values = {
        "N": desc.width, "K": desc.depth, "BM": desc.block_m, "BN": block_n, "BK": block_k, "STAGES": stages,
        "PRECISION": ', input_precision="ieee"' if desc.dtype == torch.float32 else "",
    }  # fmt: skip
    header = {field: str(getattr(desc, field)) for field in desc.__annotations__}
    return load_kernel(write_source("linear_if", fill(LINEAR_IF, {"bias": desc.bias}, values), header), "linear_if")


def gather_norm(
    x: Tensor, index: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, *, norm: str
) -> tuple[Tensor, Tensor]:
    """Rows of ``x: [B, S, W]`` at ``index: [B, C]``, and the rows normalised; both [B, C, W]. No host sync."""
    described, width = Norm.decode(norm), x.shape[2]
    _check(width, x, *(t for t in (gamma, beta) if t is not None))
    x = x if x.stride(2) == 1 else x.contiguous()
    rows = torch.empty((*index.shape, width), dtype=x.dtype, device=x.device)
    normed = torch.empty_like(rows)
    given = {
        "x": x, "index": index.contiguous(), "rows": rows, "normed": normed, "count": index.shape[1],
        "gamma": None if gamma is None else gamma.contiguous(), "beta": None if beta is None else beta.contiguous(),
        "x_batch": x.stride(0), "x_token": x.stride(1),
    }  # fmt: skip
    launch(gather_kernel(described, width), (index.numel(),), given, x, num_warps=row_warps(width))
    return rows, normed


def scatter_residual(
    x: Tensor, index: Tensor, rows: Tensor, after: Tensor, weight: Tensor, valid: Tensor | None = None
) -> Tensor:
    """x with ``rows + weight * (after - rows)`` at ``index: [B, C]``, rounded once; the other rows bit for bit."""
    length, width = x.shape[1], x.shape[2]
    _check(width, x, rows, after, weight)
    out = x.clone(memory_format=torch.contiguous_format)
    given = {
        "out": out, "index": index.contiguous(), "rows": rows.contiguous(), "after": after.contiguous(),
        "weight": weight.contiguous(), "count": index.shape[1], "length": length,
        "valid": None if valid is None else valid.contiguous().view(torch.uint8),
    }  # fmt: skip
    kernel = scatter_kernel(width, valid is not None)
    launch(kernel, (index.numel(),), given, x, num_warps=row_warps(width))
    return out


def linear_if(active: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` where the 0-d bool `active` holds, else zeros; decided on the device."""
    _check(0, x, weight)
    width, depth = weight.shape
    flat = x.reshape(-1, depth)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows = flat.shape[0]
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        desc = LinearIf(x.dtype, width, depth, bias is not None, rows_per_program(rows))
        given = {
            "active": active.view(torch.uint8), "x": flat, "weight": weight, "out": out, "M": rows,
            "bias": None if bias is None else bias.contiguous(), "x_row": flat.stride(0),
            "weight_row": weight.stride(0),
        }  # fmt: skip
        grid = (-(-width // desc.tiles[0]), -(-rows // desc.block_m))
        launch(linear_kernel(desc), grid, given, x, num_warps=desc.tiles[3])
    return out.view(*x.shape[:-1], width)
