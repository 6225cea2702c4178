"""Kernels of routed blocks: in Triton's interpreter against float64, and compiled for GPUs that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import interpreted_routing as cases
import pytest
import torch

from fxopt.codegen.kernels import Unsupported, routing
from fxopt.codegen.kernels.gemm import Norm
from fxopt.codegen.kernels.routing import LinearIf
from fxopt.codegen.targets import TARGETS, CompiledInfo, cross_compile


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("kind", "offset", "affine", "width", "strided"),
    [("rms", False, True, 64, False), ("rms", True, True, 100, True), ("layer", False, True, 768, False),
     ("layer", False, False, 63, False)],
)  # fmt: skip
def test_gather_norm(
    interpreted: Any, kind: str, offset: bool, affine: bool, width: int, strided: bool, dtype: str
) -> None:
    given = {"kind": kind, "offset": offset, "affine": affine, "width": width, "strided": strided, "dtype": dtype}
    interpreted(cases.case_gather_norm, **given)


@pytest.mark.parametrize(("width", "dtype"), [(64, "float16"), (100, "float32"), (1027, "float16")])
@pytest.mark.parametrize("valid", [True, False])
def test_scatter_residual(interpreted: Any, width: int, dtype: str, valid: bool) -> None:
    interpreted(cases.case_scatter_residual, width=width, dtype=dtype, valid=valid)


@pytest.mark.parametrize(
    ("rows", "width", "depth", "dtype", "bias"),
    [(1, 64, 128, "float16", False), (3, 100, 80, "float32", True), (130, 40, 63, "float16", True)],
)
def test_linear_if(interpreted: Any, rows: int, width: int, depth: int, dtype: str, bias: bool) -> None:
    interpreted(cases.case_linear_if, rows=rows, width=width, depth=depth, dtype=dtype, bias=bias)


def test_what_no_kernel_takes() -> None:
    x, index = torch.zeros(1, 2, 4, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64)
    norm = Norm("rms", 1e-5, gamma=False).encode()
    with pytest.raises(Unsupported, match="float64"):
        routing.gather_norm(x, index, norm=norm)
    with pytest.raises(Unsupported, match="20000 channels"):
        routing.gather_norm(torch.zeros(1, 1, 20000), index, norm=norm)
    with pytest.raises(RuntimeError, match="gather_norm needs a GPU"):
        routing.gather_norm(torch.zeros(1, 1, 64), index, norm=norm)
    assert [routing.rows_per_program(rows) for rows in (1, 16, 17, 100, 5000)] == [16, 16, 32, 128, 128]


ATOMICS = r"\b(?:atom|red)\.|(?:global|flat|buffer)_atomic|\bds_add"
POINTERS = {"index": "*i64", "valid": "*u8", "active": "*u8"}
INTEGERS = {"count", "length", "M", "x_batch", "x_token", "x_row", "weight_row"}


def compiled(kernel: Any, dtype: torch.dtype, target: str, warps: int, stages: int = 3) -> CompiledInfo:
    element = f"*{routing.DTYPES[dtype]}"
    types = {name: "i32" if name in INTEGERS else POINTERS.get(name, element) for name in kernel.arg_names}
    aligned = [name for name in types if types[name] != "i32" or name in ("x_batch", "x_token", "x_row", "weight_row")]
    info = cross_compile(kernel, types, {}, target, warps, stages, aligned)
    assert info.spills == 0, info.summary()
    assert info.count(ATOMICS) == 0
    assert info.shared_bytes <= (64 << 10 if target == "gfx942" else 160 << 10), info.summary()
    return info


def all_kernels(target: str, *, small: bool) -> None:
    norms = [Norm("rms", 1e-5), Norm("layer", 1e-5, beta=True)]
    for width in (2048,) if small else (768, 2048, 4096, 8192, 16384):
        for norm in norms[:1] if small else norms:
            info = compiled(routing.gather_kernel(norm, width), torch.bfloat16, target, routing.row_warps(width))
            assert target == "gfx942" or info.count(r"ld\.global\S*\.v4|ld\.global\S*\.v2\.b64") > 0
        compiled(routing.scatter_kernel(width, True), torch.bfloat16, target, routing.row_warps(width))
    for dtype in (torch.bfloat16,) if small else (torch.bfloat16, torch.float32):
        for rows in (16,) if small else (16, 32, 64, 128):
            desc = LinearIf(dtype, 4096, 2048, True, rows)
            info = compiled(routing.linear_kernel(desc), dtype, target, desc.tiles[3], desc.tiles[2])
            assert dtype == torch.float32 or info.count(r"mma\.sync|wgmma\.mma|tcgen05|v_mfma") > 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiled_for_a_target(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    all_kernels(target, small=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_shipped_configuration(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    all_kernels(target, small=False)
