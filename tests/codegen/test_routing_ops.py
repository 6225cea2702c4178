"""The operators of routed blocks: bodies against loops in float64, gradients against finite differences, fakes."""

from __future__ import annotations

import pytest
import torch

from fxopt.codegen.kernels.gemm import Norm
from fxopt.codegen.ops.routing import TOLERANCE, sample_inputs

OPS = torch.ops.fxopt
NORMS = {
    "rms": Norm("rms", 1e-5),
    "offset": Norm("rms", 1e-6, unit_offset=True),
    "layer": Norm("layer", 1e-5, beta=True),
    "bare": Norm("layer", 1e-5, gamma=False),
}


def parameters(norm, given):
    return (given["gamma"] if norm.gamma else None, given["beta"] if norm.beta else None)


def normalised_by_hand(row, norm, gamma, beta):
    row = row - row.mean() if norm.kind == "layer" else row
    row = row / (row.pow(2).mean() + norm.eps).sqrt()
    if gamma is not None:
        row = row * (gamma + 1.0 if norm.unit_offset else gamma)
    return row if beta is None else row + beta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_gather_norm_against_a_loop(name, dtype):
    norm, given = NORMS[name], sample_inputs(dtype=dtype)
    affine = parameters(norm, given)
    rows, normed = OPS.gather_norm(given["x"], given["index"], *affine, norm=norm.encode())
    exact = [None if t is None else t.double() for t in affine]
    for b, listed in enumerate(given["index"].tolist()):
        for c, place in enumerate(listed):
            assert torch.equal(rows[b, c], given["x"][b, place])
            expected = normalised_by_hand(given["x"][b, place].double(), norm, *exact)
            torch.testing.assert_close(normed[b, c].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert normed.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("valid", [True, False])
def test_scatter_residual_against_a_loop(valid, dtype):
    given = sample_inputs(dtype=dtype, valid=valid)
    names = ("x", "index", "rows", "after", "weight", *(["valid"] if valid else []))
    out = OPS.scatter_residual(*(given[n] for n in names))
    expected = given["x"].double()
    for b, listed in enumerate(given["index"].tolist()):
        for c, place in enumerate(listed):
            if not valid or given["valid"][b, c]:
                row, r = given["rows"][b, c].double(), given["weight"][b, c].double()
                expected[b, place] = row + r * (given["after"][b, c].double() - row)
    torch.testing.assert_close(out.double(), expected, atol=2 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    kept = torch.ones(out.shape[:2], dtype=torch.bool).scatter(1, given["index"], False)
    assert torch.equal(out[kept], given["x"][kept])
    assert out.data_ptr() != given["x"].data_ptr()


@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_gather_norm(name):
    norm, given = NORMS[name], sample_inputs(dtype=torch.float64, tokens=6, count=3, width=5)
    leaves = [t.requires_grad_() for t in (given["x"], *parameters(norm, given)) if t is not None]

    def call(x, *affine):
        affine = [*affine, None, None][:2] if norm.gamma else (None, None)
        return OPS.gather_norm(x, given["index"], *affine, norm=norm.encode())

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("valid", [True, False])
def test_gradients_of_scatter_residual(valid):
    given = sample_inputs(dtype=torch.float64, tokens=6, count=3, width=5, valid=valid)
    leaves = [given[n].detach().requires_grad_() for n in ("x", "rows", "after", "weight")]

    def call(x, rows, after, weight):
        return OPS.scatter_residual(x, given["index"], rows, after, weight, given.get("valid"))

    assert torch.autograd.gradcheck(call, leaves)


def test_linear_if():
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    yes, no = torch.tensor(True), torch.tensor(False)
    torch.testing.assert_close(OPS.linear_if(yes, x, weight, bias), x @ weight.mT + bias)
    assert torch.equal(OPS.linear_if(no, x, weight * torch.nan, bias), torch.zeros(2, 3, 5))


def test_opcheck():
    given = sample_inputs()
    x = given["x"].requires_grad_()
    for norm in NORMS.values():
        affine = parameters(norm, given)
        torch.library.opcheck(OPS.gather_norm.default, (x, given["index"], *affine), {"norm": norm.encode()})
    arguments = tuple(given[n] for n in ("x", "index", "rows", "after", "weight", "valid"))
    torch.library.opcheck(OPS.scatter_residual.default, arguments)
    torch.library.opcheck(OPS.linear_if.default, (torch.tensor(True), torch.randn(3, 8), torch.randn(4, 8)))
    plain = sample_inputs()
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(plain[n]) for n in ("x", "index")]
        with pytest.raises(RuntimeError, match="gamma does not fit"):
            OPS.gather_norm(*fakes, norm=Norm("rms", 1e-5).encode())
