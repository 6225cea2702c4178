"""``torch.ops.fxopt.fused_linear``: linears with few rows that share an input, with the norm before and what follows.

    fused_linear(x, weights, extras, *, group, tables, max_m, origin) -> outputs

    x [..., K], weights: [N_i, K] each, extras as ``FusedLinear.extras`` lists them, outputs: [..., N_o] each

    outputs = epilogue(norm(x) @ w_0.T, norm(x) @ w_1.T, ...)

``group`` is an encoded :class:`fxopt.codegen.kernels.gemm.FusedLinear` and says everything about norm and epilogue.
On CUDA and ROCm :class:`fxopt.codegen.dataflow.Dataflow` takes a kernel or the library by the number of rows of the
call, a shape that the host knows; elsewhere the PyTorch body runs. Weights are read where they lie.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fxopt.codegen import roofline
from fxopt.codegen.dataflow import Dataflow
from fxopt.codegen.kernels.epilogue import Epilogue, Extra, Output, Step, dtype_name
from fxopt.codegen.kernels.gemm import MAX_ROWS, FusedLinear, Norm, reference
from fxopt.codegen.ops import LIBRARY

SCHEMA = (
    "fused_linear(Tensor x, Tensor[] weights, Tensor[] extras, *, str group, str tables='', "
    f"int max_m={MAX_ROWS}, str origin='') -> Tensor[]"
)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}
"""Largest difference from float64 for outputs of about unit variance: the rounding of each product, of the normalised
row and of the output."""


def fused_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    extras: Sequence[Tensor],
    *,
    group: str,
    tables: str = "",
    max_m: int = MAX_ROWS,
    origin: str = "",
) -> list[Tensor]:
    """The operator's body in plain PyTorch: :func:`fxopt.codegen.kernels.gemm.reference`, results contiguous.

    ``tables``, ``max_m`` and ``origin`` choose and label kernels and mean nothing here.
    """
    return [_laid_out(y) for y in reference(FusedLinear.decode(group), x, weights, extras)]


def launch(
    x: Tensor,
    weights: Sequence[Tensor],
    extras: Sequence[Tensor],
    *,
    group: str,
    tables: str = "",
    max_m: int = MAX_ROWS,
    origin: str = "",
) -> list[Tensor]:
    """The operator on CUDA and ROCm: the kernel that the dataflow takes for these rows, or the library."""
    fused = FusedLinear.decode(group)
    flow = dataflow(fused.dtype, x.device, tables, max_m)
    return [_laid_out(y) for y in flow.run(fused, x, weights, extras, origin)]


def dataflow(dtype: str, device: torch.device, tables: str, max_m: int) -> Dataflow:
    """The decisions for one dtype and device; a table is looked for once per process."""
    return _dataflow(dtype, device, tables, max_m, roofline.planned_device())


@functools.lru_cache(maxsize=64)
def _dataflow(
    dtype: str, device: torch.device, tables: str, max_m: int, planned: roofline.Device | None
) -> Dataflow:
    return Dataflow(dtype, device, tables or None, max_m, planned)


def _laid_out(y: Tensor) -> Tensor:
    # Through one dimension, so that dimensions of size 1 have the strides that the fake promises.
    return y.contiguous().view(-1).view(y.shape)


def _fake(
    x: Tensor,
    weights: Sequence[Tensor],
    extras: Sequence[Tensor],
    *,
    group: str,
    tables: str = "",
    max_m: int = MAX_ROWS,
    origin: str = "",
) -> list[Tensor]:
    fused = FusedLinear.decode(group)
    torch._check(x.shape[-1] == fused.depth, lambda: f"x is {tuple(x.shape)} and the group has K = {fused.depth}")
    shapes = [tuple(w.shape) for w in weights]
    torch._check(
        shapes == [(width, fused.depth) for width in fused.widths],
        lambda: f"weights are {shapes} and the group has N = {fused.widths}, K = {fused.depth}",
    )
    torch._check(
        len(extras) == len(fused.extras),
        lambda: f"{len(extras)} extras for a group that reads {[extra.name for extra in fused.extras]}",
    )
    return [
        x.new_empty((*x.shape[:-1], width), dtype=getattr(torch, output.dtype))
        for width, output in zip(fused.output_widths, fused.epilogue.outputs, strict=True)
    ]


LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("fused_linear", fused_linear, "CompositeExplicitAutograd")
LIBRARY.impl("fused_linear", launch, "CUDA")
torch.library.register_fake("fxopt::fused_linear", _fake, lib=LIBRARY)


def sample_inputs(
    *, rows: tuple[int, ...] = (2, 1), depth: int = 40, widths: tuple[int, ...] = (24, 24), gated: bool = True,
    norm: Literal["rms", "layer", ""] = "rms", bias: bool = True, residual: bool = True,
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> tuple[FusedLinear, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """A group and its operands: norm (``"rms"``, ``"layer"`` or ``""``), bias, gating or plain, residual add.

    Returns (group, x: [*rows, depth], weights, extras).
    """
    name, count = dtype_name(dtype), len(widths)
    steps: list[Step] = []
    kinds: list[Extra] = []
    shapes: list[tuple[int, ...]] = []

    def step(op: str, *args: str) -> str:
        steps.append(Step(f"s{len(steps)}", op, args, op))
        return steps[-1].name

    def extra(layout: Literal["full", "column"], width: int) -> str:
        kinds.append(Extra(f"e{len(kinds)}", layout, name))
        shapes.append((*rows, width) if layout == "full" else (width,))
        return kinds[-1].name

    values = [f"p{i}" for i in range(count)]
    if bias:
        values = [step("add", value, extra("column", width)) for value, width in zip(values, widths, strict=True)]
    if gated:
        values = [functools.reduce(lambda a, b: step("mul", a, b), [step("silu", values[0]), *values[1:]])]
    if residual:
        values = [step("add", extra("full", width), value) for value, width in zip(values, widths, strict=False)]
    epilogue = Epilogue(count, tuple(Output(value, name) for value in values), tuple(steps), tuple(kinds))
    described = None if not norm else Norm(norm, 1e-5, True, norm == "layer")
    fused = FusedLinear(name, depth, widths, epilogue, described)

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    parameters = [(depth,)] * (len(fused.extras) - len(kinds))
    extras = [normal(*shape) for shape in (*parameters, *shapes)]
    return fused, normal(*rows, depth), [normal(width, depth) * depth**-0.5 for width in widths], extras
