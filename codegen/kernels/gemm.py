"""Fused linears with few rows: what they are, how a kernel for them is configured, how they run.

`y_i = epilogue(norm(x) @ w_i.T)` for several weights that share the input `x: [M, K]`; each `w_i: [N_i, K]` keeps its
own storage. Two families: GEMV reads every weight once and multiplies on the vector units; flat GEMM pads M to 16 and
uses the matrix units (FlashDecoding++, arXiv 2311.01282, sections 4 and 5).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from fxopt.codegen import roofline
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.epilogue import FLOATS, Epilogue, Extra

Family = Literal["gemv", "flat"]
MAX_ROWS = 64
"""Rows up to which a flat kernel is worth trying; above, the problem leaves the bandwidth limit."""


@dataclass(frozen=True)
class Norm:
    """A row statistic before the products with what is made of it: RMSNorm or LayerNorm over K.

    gamma multiplies the normalised row, as `1 + gamma` with `unit_offset` (Gemma); beta is added to it.
    """

    kind: Literal["rms", "layer"]
    eps: float
    gamma: bool = True
    beta: bool = False
    unit_offset: bool = False

    def evaluate(self, x: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None) -> torch.Tensor:
        """The meaning in plain PyTorch, in float32 (float64 for float64 input), returned in x's dtype: [..., K]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if gamma is not None:
            wide = wide * (1.0 + gamma.to(wide.dtype) if self.unit_offset else gamma.to(wide.dtype))
        return (wide if beta is None else wide + beta.to(wide.dtype)).to(x.dtype)

    def encode(self) -> str:
        """A JSON string that says everything; `decode` gives the norm back."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    @functools.cache
    def decode(text: str) -> Norm:
        return Norm(**json.loads(text))


@dataclass(frozen=True)
class FusedLinear:
    """Linears that share an input, with their neighbours. Hashable; `encode` makes a string of it for an operator.

    A prologue is what happens to x, its product ``p0``, before the norm if there is one: pointwise steps on [M, K] with
    extras named ``q0, q1, ...`` and one output. There may be one row statistic: the norm, or a reduction among the
    steps of the prologue.

    dtype is that of x and of every weight; depth is K; widths are N of each weight. Products that one output needs
    together (gate and up) must be equally wide, and every output must need equally many products.
    """

    dtype: str
    depth: int
    widths: tuple[int, ...]
    epilogue: Epilogue
    norm: Norm | None = None
    prologue: Epilogue | None = None

    def __post_init__(self) -> None:
        if getattr(torch, self.dtype, None) not in FLOATS:
            raise Unsupported(f"weights in {self.dtype}; kernels are generated for float16, bfloat16 and float32")
        if self.depth < 1 or not self.widths or min(self.widths) < 1:
            raise Unsupported(f"a linear without rows or columns: K={self.depth}, N={self.widths}")
        if self.epilogue.products != len(self.widths):
            raise Unsupported(f"an epilogue of {self.epilogue.products} products for {len(self.widths)} weights")
        if self.epilogue.statistic is not None:
            raise Unsupported(f"{self.epilogue.statistic.op} after the products; no program holds a whole row of them")
        if self.prologue is not None and self.prologue.statistic is not None:
            check_statistic(self.prologue)
            if self.norm is not None:
                raise Unsupported(f"{self.prologue.statistic.op} before a norm; a kernel computes one row statistic")
        segments = self.epilogue.segments()
        if len({len(segment.products) for segment in segments}) > 1:
            raise Unsupported("outputs that need different numbers of products in one group; merge them separately")
        read: set[str] = set().union(*(self.epilogue.reach(i) for i in range(len(self.epilogue.outputs))))
        if idle := [extra.name for extra in self.epilogue.extras if extra.name not in read]:
            raise Unsupported(f"extras {idle} feed no output of the epilogue")
        for segment in segments:
            if len({self.widths[i] for i in segment.products}) > 1:
                raise Unsupported("products of different widths that meet in one output")

    @property
    def extras(self) -> tuple[Extra, ...]:
        """Tensors besides x and the weights, as `run` takes them: gamma, beta [K], the prologue's, the epilogue's."""
        own = []
        if self.norm is not None and self.norm.gamma:
            own.append(Extra("gamma", "column", self.dtype))
        if self.norm is not None and self.norm.beta:
            own.append(Extra("beta", "column", self.dtype))
        return (*own, *(self.prologue.extras if self.prologue is not None else ()), *self.epilogue.extras)

    @property
    def output_widths(self) -> tuple[int, ...]:
        """N of each output."""
        by_output = {o: self.widths[s.products[0]] for s in self.epilogue.segments() for o in s.outputs}
        return tuple(by_output[i] for i in range(len(by_output)))

    def extra_width(self, extra: Extra) -> int:
        """Columns of what an extra stands beside: K before the products, N of the output that reads it behind them."""
        if extra not in self.epilogue.extras:
            return self.depth
        return next(n for i, n in enumerate(self.output_widths) if extra.name in self.epilogue.reach(i))

    def encode(self) -> str:
        """A JSON string that says everything; `decode` gives the description back."""
        before = None if self.prologue is None else self.prologue.encode()
        data = {**asdict(self), "epilogue": self.epilogue.encode(), "prologue": before}
        return json.dumps(data, separators=(",", ":"))

    @staticmethod
    @functools.cache
    def decode(text: str) -> FusedLinear:
        data = json.loads(text)
        norm = None if data["norm"] is None else Norm(**data["norm"])
        epilogue = Epilogue.decode(data["epilogue"])
        before = None if data["prologue"] is None else Epilogue.decode(data["prologue"])
        return FusedLinear(data["dtype"], data["depth"], tuple(data["widths"]), epilogue, norm, before)

    def split_extras(self, extras: Sequence[Any]) -> tuple[Any, Any, list[Any]]:
        """gamma, beta (None where absent) and the other extras out of what `run` takes."""
        rest = list(extras)
        gamma = rest.pop(0) if self.norm is not None and self.norm.gamma else None
        beta = rest.pop(0) if self.norm is not None and self.norm.beta else None
        return gamma, beta, rest


def check_statistic(prologue: Epilogue) -> None:
    """Raises Unsupported for two row statistics, and for one of another tensor than the row that it goes into."""
    statistic = prologue.statistic
    if statistic is None:
        return
    reduced = prologue.needed(str(statistic.args[0]))
    row = prologue.needed(prologue.outputs[0].value, (statistic.name,))
    if "p0" not in reduced or "p0" not in row:
        raise Unsupported(f"{statistic.op} ({statistic.origin}) is of another tensor than the row that it goes into")


def reference(
    fused: FusedLinear,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    extras: Sequence[torch.Tensor],
    exact: bool = False,
) -> list[torch.Tensor]:
    """The meaning of a group in plain PyTorch, the body it has where no kernel runs.

    x: [..., K], weights: [N_i, K], extras as `fused.extras` lists them. With `exact` and float64 tensors this is the
    float64 reference: no cast rounds.
    """
    gamma, beta, rest = fused.split_extras(extras)
    rows = x.reshape(-1, fused.depth)
    if fused.prologue is not None:
        count = len(fused.prologue.extras)
        (rows,) = fused.prologue.evaluate([rows], _flat(fused.prologue.extras, rest[:count]), exact)
        rest = rest[count:]
    if fused.norm is not None:
        rows = fused.norm.evaluate(rows, gamma, beta)
    products = [torch.nn.functional.linear(rows, w) for w in weights]
    outputs = fused.epilogue.evaluate(products, _flat(fused.epilogue.extras, rest), exact)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs]


def _flat(kinds: Sequence[Extra], extras: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [
        extra.reshape(-1, extra.shape[-1]) if kind.layout == "full" else extra
        for kind, extra in zip(kinds, extras, strict=True)
    ]


@dataclass(frozen=True)
class Config:
    """How one kernel is cut: `block_m` rows (GEMV: rows per program), `block_n` columns of each weight, `block_k` deep.

    stages is Triton's number of pipeline stages: `stages - 1` buffers on the mma.sync path and in GEMV, `stages` on
    the wgmma path. splits cuts K into equal runs whose float32 partial sums a second kernel adds in order. swap
    multiplies `w @ x.T`, so that the weights fill the wide side of the matrix unit.
    """

    family: Family
    block_m: int
    block_n: int
    block_k: int
    stages: int = 3
    splits: int = 1
    warps: int = 4
    swap: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.stages < 1 or self.splits < 1:
            raise ValueError(f"stages and splits start at 1, got {self.stages} and {self.splits}")
        # The interpreter accepts less than the hardware does, so the limits stand here.
        if self.family == "flat" and (min(self.block_m, self.block_n) < 16 or self.block_k < 16):
            raise ValueError(f"a matrix unit needs blocks of 16 at least, got {self}")
        if self.family == "gemv" and (self.splits > 1 or self.swap):
            raise ValueError("GEMV neither splits K nor swaps its operands")


def _power(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def bucket(m: int) -> int:
    """Rows are served by kernels for 1, 2, 4 (GEMV) and 16, 32, 64 (flat) rows; more rows repeat the largest."""
    return next((rows for rows in (1, 2, 4, 16, 32, 64) if m <= rows), 64)


def configure(fused: FusedLinear, m: int, family: Family, device: roofline.Device) -> Config:
    """The configuration for `m` rows where none was measured; splits depend on the widths, K and the device only."""
    held = len(fused.epilogue.segments()[0].products)
    size = getattr(torch, fused.dtype).itemsize
    if family == "gemv":
        rows = min(bucket(m), 4)
        # 64 float32 accumulators per thread over all rows and products leave room for two tiles in flight.
        block_k = min(512 if size == 2 else 256, max(32, _power(fused.depth)))
        block_n = max(1, min(16, 128 * max(2, min(32, 64 // (rows * held))) // block_k))
        return Config("gemv", rows, block_n, block_k, stages=3)
    total = sum(fused.widths[segment.products[0]] for segment in fused.epilogue.segments())
    rows = max(16, bucket(m))
    block_n = roofline.block_n(total, device) if size == 2 else 32
    block_k = min(128 if size == 2 and rows == 16 else 64 if size == 2 else 32, max(16, _power(fused.depth)))
    if held > 1:
        block_n = max(16, block_n // 2)
    splits = roofline.split_count(total, fused.depth, device)
    # Between 17 and 32 rows only swapped operands reach wgmma; its first side is 64 weights wide or a multiple, which
    # is not worth half of the units.
    swap = device.name in ("H100", "H200") and rows == 32 and size == 2
    swap = swap and total / 64 * splits >= roofline.FILLED * device.units
    if swap:
        block_n = max(64, block_n)
    stages = roofline.stages_in_flight(held * block_n * block_k * size, -(total // -block_n) * splits, device)
    config = Config("flat", rows, block_n, block_k, stages, splits, swap=swap)
    while config.stages > 2 and shared_bytes(fused, config) > device.shared_bytes:
        config = replace(config, stages=config.stages - 1)
    while config.block_k > 16 and shared_bytes(fused, config) > device.shared_bytes:
        config = replace(config, block_k=config.block_k // 2)
    return config


def shared_bytes(fused: FusedLinear, config: Config) -> int:
    """An upper bound of the shared memory of the pipelined tiles, in bytes per program."""
    held = len(fused.epilogue.segments()[0].products)
    tile = (config.block_n * held + config.block_m) * config.block_k
    return tile * getattr(torch, fused.dtype).itemsize * config.stages
