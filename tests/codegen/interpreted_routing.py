"""Kernels of routed blocks for Triton's interpreter: cases that `test_routing_kernels.py` starts as a script."""

from __future__ import annotations

import torch

from fxopt.codegen.kernels.gemm import Norm
from fxopt.codegen.kernels.routing import gather_norm, linear_if, scatter_residual
from fxopt.codegen.ops import routing as ops

TOLERANCE = {torch.float16: 2e-3, torch.float32: 2e-6}


def case_gather_norm(kind: str, offset: bool, affine: bool, width: int, dtype: str, strided: bool) -> None:
    norm = Norm(kind, 1e-5, gamma=affine, beta=affine and kind == "layer", unit_offset=offset)  # type: ignore[arg-type]
    given = ops.sample_inputs(width=width, dtype=getattr(torch, dtype))
    x = given["x"].transpose(0, 1).contiguous().transpose(0, 1) if strided else given["x"]
    parameters = [given["gamma"] if norm.gamma else None, given["beta"].float() if norm.beta else None]
    rows, normed = gather_norm(x, given["index"], *parameters, norm=norm.encode())
    assert torch.equal(rows, given["rows"])
    exact = [None if t is None else t.double() for t in parameters]
    expected = norm.evaluate(given["rows"].double(), *exact)
    error = (normed.double() - expected).abs().max()
    body = ops.gather_norm(given["x"], given["index"], *parameters, norm=norm.encode())[1]
    assert error <= max(TOLERANCE[x.dtype], (body.double() - expected).abs().max())
    assert normed.dtype == x.dtype


def case_scatter_residual(width: int, dtype: str, valid: bool) -> None:
    given = ops.sample_inputs(width=width, dtype=getattr(torch, dtype), valid=valid)
    names = ("x", "index", "rows", "after", "weight", *(["valid"] if valid else []))
    arguments = [given[name] for name in names]
    out = scatter_residual(*arguments)
    exact = [t.double() if t.is_floating_point() else t for t in arguments]
    expected = ops.scatter_residual(*exact)
    error, of_body = ((y.double() - expected).abs().max() for y in (out, ops.scatter_residual(*arguments)))
    assert error <= max(TOLERANCE[out.dtype], of_body)
    taken = torch.zeros(out.shape[:2], dtype=torch.bool).scatter(1, given["index"], True)
    if valid:
        taken.scatter_(1, given["index"], given["valid"])
    assert torch.equal(out[~taken], given["x"][~taken])
    assert not torch.equal(out[taken], given["x"][taken])


def case_linear_if(rows: int, width: int, depth: int, dtype: str, bias: bool) -> None:
    x, weight = torch.randn(rows, 1, depth), torch.randn(width, depth) * depth**-0.5
    x, weight = x.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype))
    b = torch.randn(width).to(x.dtype) if bias else None
    found = linear_if(torch.tensor(True), x, weight, b)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    torch.testing.assert_close(found.double(), expected, atol=2 * TOLERANCE[x.dtype], rtol=TOLERANCE[x.dtype])
    # Where it is not needed nothing but the decision is read.
    none = linear_if(torch.tensor(False), x * torch.nan, weight * torch.nan, b)
    assert torch.equal(none, torch.zeros(rows, 1, width, dtype=x.dtype))


if __name__ == "__main__":
    from interpreter import serve  # type: ignore[import-not-found]

    serve(globals())
