"""Builds and launches the kernels of fused linears, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxopt.codegen import compat, roofline
from fxopt.codegen.kernels import Unsupported, gemm_source
from fxopt.codegen.kernels.gemm import Config, FusedLinear, configure
from fxopt.codegen.source import load_kernel, write_source
from fxopt.codegen.targets import CompiledInfo, cross_compile


@dataclass(frozen=True)
class Kernel:
    """A generated module: `main` multiplies; `reduce`, with splits only, adds partial sums and ends the group."""

    path: Path
    writer: gemm_source.Writer
    main: Any
    reduce: Any
    compiled: set[torch.device] = field(default_factory=set, compare=False)
    """Devices that this kernel compiled for."""
    resources: dict[str, Any] = field(default_factory=dict, compare=False)
    """Registers, spills and shared memory on the device that it compiled for last, for a report."""


@functools.lru_cache(maxsize=4096)
def build(fused: FusedLinear, config: Config, origin: str = "") -> Kernel:
    """Generates, writes and imports the kernel of a group.

    origin says where the group stands (graph nodes, module paths) and appears in the file's header only.
    """
    writer = gemm_source.Writer(fused, config)
    path = write_source(
        "gemv" if config.family == "gemv" else "flat_gemm",
        writer.module(),
        gemm_source.header(fused, config, origin),
    )
    main = load_kernel(path, "gemv" if config.family == "gemv" else "flat_gemm")
    return Kernel(path, writer, main, load_kernel(path, "reduce_splits") if config.splits > 1 else None)


def interpreted() -> bool:
    """Whether Triton was told to run kernels on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _check(
    fused: FusedLinear, x: torch.Tensor, weights: Sequence[torch.Tensor], extras: Sequence[torch.Tensor]
) -> None:
    if x.device.type != "cuda" and not interpreted():
        raise Unsupported(f"x is on {x.device.type}; kernels run on a GPU, or anywhere under TRITON_INTERPRET=1")
    if len(weights) != len(fused.widths) or len(extras) != len(fused.extras):
        raise Unsupported(
            f"{len(weights)} weights, {len(extras)} extras for a group of {len(fused.widths)} and {len(fused.extras)}"
        )
    if x.shape[-1] != fused.depth:
        raise Unsupported(f"x is {list(x.shape)}; its last dimension should be {fused.depth}")
    wanted = getattr(torch, fused.dtype)
    for width, weight in zip(fused.widths, weights, strict=True):
        if tuple(weight.shape) != (width, fused.depth):
            raise Unsupported(f"a weight is {list(weight.shape)}; it should be [{width}, {fused.depth}]")
        if weight.stride(-1) != 1 and fused.depth > 1:
            raise Unsupported(f"a weight has stride {weight.stride(-1)} along K; kernels read rows that lie together")
    for tensor in (x, *weights):
        if tensor.dtype is not wanted:
            raise Unsupported(f"mixed dtypes: {tensor.dtype} in a group of {fused.dtype}")
    for kind, tensor in zip(fused.extras, extras, strict=True):
        if tensor.dtype is not getattr(torch, kind.dtype):
            raise Unsupported(f"{kind.name} is {tensor.dtype}; the group was described with {kind.dtype}")
    for tensor in (*weights, *extras):
        if tensor.device != x.device:
            raise Unsupported(f"x is on {x.device}, another operand on {tensor.device}")


def _arguments(fused: FusedLinear, rows: int, extras: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Tensors and strides of the extras by parameter name; only `[M, N]` ones may be copied, and only when strided."""
    found: dict[str, Any] = {}
    for kind, tensor in zip(fused.extras, extras, strict=True):
        if kind.layout == "full":
            flat = tensor.reshape(rows, -1)
            flat = flat if flat.stride(-1) == 1 else flat.contiguous()
            found[kind.name], found[f"{kind.name}_stride"] = flat, flat.stride(0)
        else:
            found[kind.name] = tensor.reshape(-1).contiguous()
    return found


def run(
    fused: FusedLinear,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    extras: Sequence[torch.Tensor] = (),
    config: Config | None = None,
    origin: str = "",
) -> list[torch.Tensor]:
    """Runs a group: x [..., K], weights [N_i, K], extras as `fused.extras` lists them, to outputs [..., N].

    Weights may be slices (any row stride) and are never copied. Without a configuration the dataflow's default decides.
    Nothing synchronises with the host: the number of rows is a shape.

    Raises:
        Unsupported: operands that do not fit the description, or a kernel that does not compile for x's device.
    """
    _check(fused, x, weights, extras)
    flat = x.reshape(-1, fused.depth)
    flat = flat if flat.stride(-1) == 1 or fused.depth == 1 else flat.contiguous()
    rows = flat.shape[0]
    outputs = [
        torch.empty(rows, width, dtype=getattr(torch, output.dtype), device=x.device)
        for width, output in zip(fused.output_widths, fused.epilogue.outputs, strict=True)
    ]
    if rows:
        if config is None:
            config = configure(fused, rows, "gemv" if rows <= 2 else "flat", roofline.current_device(x.device))
        _launch(build(fused, config, origin), flat, weights, _arguments(fused, rows, extras), outputs)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs]


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: its function, grid, run-time parameters in order, constants and compiler options."""

    jit: Any
    grid: tuple[int, ...]
    parameters: tuple[str, ...]
    constants: tuple[tuple[str, int], ...]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the call."""
        return {**dict(self.constants), "num_warps": self.warps, "num_stages": self.stages}


def launches(kernel: Kernel, rows: int) -> list[Launch]:
    """What runs for `rows` rows: the multiplication and, where K is split, the ordered sum."""
    writer, config = kernel.writer, kernel.writer.config
    grid: tuple[int, ...] = (writer.programs(), math.ceil(rows / config.block_m))
    grid = grid if kernel.reduce is None else (*grid, writer.splits())
    constants = tuple(writer.constants().items())
    found = [Launch(kernel.main, grid, tuple(writer.main_parameters()), constants, config.warps, config.stages)]
    if kernel.reduce is not None:
        grid = (writer.programs(), math.ceil(rows / gemm_source.REDUCE_ROWS))
        constants = tuple(writer.reduce_constants().items())
        found.append(Launch(kernel.reduce, grid, tuple(writer.reduce_parameters()), constants, 4, 3))
    return found


def workspace(kernel: Kernel, rows: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the float32 tensors that split-K needs between its two kernels; empty without splits."""
    splits, total = kernel.writer.splits(), sum(kernel.writer.fused.widths)
    shapes = {"partials": (splits, rows, total), "squares": (splits, rows)}
    return {name: shapes[name] for name in kernel.writer.workspace()}


def _launch(
    kernel: Kernel,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    extras: dict[str, Any],
    outputs: Sequence[torch.Tensor],
) -> None:
    rows = x.shape[0]
    values: dict[str, Any] = {"x": x, "x_stride": x.stride(0), "M": rows, **extras}
    for index, weight in enumerate(weights):
        values |= {f"w{index}": weight, f"w{index}_stride": weight.stride(0)}
    values |= {f"out{index}": output for index, output in enumerate(outputs)}
    for name, shape in workspace(kernel, rows).items():
        values[name] = torch.empty(shape, dtype=torch.float32, device=x.device)
    calls = [(launch, [values[name] for name in launch.parameters]) for launch in launches(kernel, rows)]
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device_of(x), _refusing(kernel, x.device):
        # Compiling apart from launching tells a kernel this device cannot have from an error of the device itself.
        if x.device not in kernel.compiled and not interpreted():
            _compile(kernel, calls, x.device)
        for launch, arguments in calls:
            launch.jit[launch.grid](*arguments, **launch.options)


@contextlib.contextmanager
def _refusing(kernel: Kernel, device: torch.device) -> Iterator[None]:
    try:
        yield
    except compat.compile_errors() as problem:
        raise Unsupported(f"the kernel {kernel.path.name} does not compile for {device}: {problem}") from problem


def _compile(kernel: Kernel, calls: Sequence[tuple[Launch, Sequence[Any]]], device: torch.device) -> None:
    for number, (launch, arguments) in enumerate(calls):
        found = compat.compile_ahead(launch.jit, arguments, launch.grid, launch.options)
        prefix = "reduce_splits " if number else ""
        kernel.resources.update({f"{prefix}{name}": value for name, value in found.items()})
    kernel.compiled.add(device)


def compile_here(kernel: Kernel, rows: int, device: torch.device) -> None:
    """Compile a kernel for `device` before anything runs, as it will be called with operands that lie together.

    Does nothing where nothing would run: in the interpreter, on devices that are no GPU, in a plan for another GPU.

    Raises:
        Unsupported: where Triton cannot compile it for this device.
    """
    if device.type != "cuda" or device in kernel.compiled or interpreted() or roofline.planned_device() is not None:
        return
    fused = kernel.writer.fused
    values: dict[str, Any] = {"M": rows, "x_stride": fused.depth, "x": getattr(torch, fused.dtype)}
    values |= dict.fromkeys(("partials", "squares"), torch.float32)
    for index, output in enumerate(fused.epilogue.outputs):
        values[f"out{index}"] = getattr(torch, output.dtype)
    for extra in fused.extras:
        values |= {extra.name: getattr(torch, extra.dtype), f"{extra.name}_stride": fused.extra_width(extra)}
    for index in range(len(fused.widths)):
        values |= {f"w{index}": getattr(torch, fused.dtype), f"w{index}_stride": fused.depth}
    calls = [(launch, [values[name] for name in launch.parameters]) for launch in launches(kernel, rows)]
    with torch.cuda.device(device), _refusing(kernel, device):
        _compile(kernel, calls, device)


_POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "bool": "*i1"}


def compile_for(fused: FusedLinear, config: Config, target: str) -> dict[str, CompiledInfo]:
    """Compiles a group's kernels for a target without a GPU: `{"flat_gemm": ..., "reduce_splits": ...}`.

    Pointers and strides count as multiples of 16 bytes where the launcher would find them so for contiguous operands.
    """
    kernel = build(fused, config)
    types = {"x": _POINTERS[fused.dtype], "M": "i32", "x_stride": "i32", "partials": "*fp32", "squares": "*fp32"}
    types |= {kind.name: _POINTERS[kind.dtype] for kind in fused.extras}
    types |= {f"{kind.name}_stride": "i32" for kind in fused.extras if kind.layout == "full"}
    for index in range(len(fused.widths)):
        types |= {f"w{index}": _POINTERS[fused.dtype], f"w{index}_stride": "i32"}
    types |= {f"out{i}": _POINTERS[output.dtype] for i, output in enumerate(fused.epilogue.outputs)}
    aligned = {name for name, kind in types.items() if kind.startswith("*")}
    if fused.depth % 16 == 0:
        aligned |= {"x_stride", *(f"w{index}_stride" for index in range(len(fused.widths)))}
        aligned |= {name for name in types if name.startswith("q") and name.endswith("_stride")}
    if all(width % 16 == 0 for width in fused.widths):
        aligned |= {name for name in types if name.startswith("e") and name.endswith("_stride")}
    found = {}
    for launch in launches(kernel, config.block_m):
        signature = {name: types[name] for name in launch.parameters}
        found[launch.jit.__name__] = cross_compile(
            launch.jit, signature, dict(launch.constants), target, launch.warps, launch.stages,
            aligned & set(launch.parameters),
        )  # fmt: skip
    return found
