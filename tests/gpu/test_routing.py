"""Operators of routed blocks on a real device: results, gradients, poisoned memory, no host synchronisation, graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxopt.codegen.kernels.gemm import Norm
from fxopt.codegen.ops.routing import TOLERANCE, sample_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
OPS = torch.ops.fxopt
NORMS = {
    "rms": Norm("rms", 1e-5),
    "offset": Norm("rms", 1e-6, unit_offset=True),
    "layer": Norm("layer", 1e-5, beta=True),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fills every torch.empty with NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [63, 100, 768, 4096, 16384])
@pytest.mark.parametrize("name", NORMS)
def test_gather_norm(name: str, width: int, dtype: torch.dtype) -> None:
    norm = NORMS[name]
    given = sample_inputs(batch=3, tokens=100, count=27, width=width, dtype=dtype, device="cuda")
    affine = (given["gamma"], given["beta"] if norm.beta else None)
    rows, normed = OPS.gather_norm(given["x"], given["index"], *affine, norm=norm.encode())
    assert torch.equal(rows, given["rows"])
    exact = norm.evaluate(given["rows"].double(), *(None if t is None else t.double() for t in affine))
    body = norm.evaluate(given["rows"], *affine)
    error, of_torch = ((y.double() - exact).abs().max() for y in (normed, body))
    assert error <= max(TOLERANCE[dtype], of_torch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [63, 768, 4096])
@pytest.mark.parametrize("valid", [True, False])
def test_scatter_residual(valid: bool, width: int, dtype: torch.dtype) -> None:
    given = sample_inputs(batch=3, tokens=100, count=27, width=width, dtype=dtype, valid=valid, device="cuda")
    names = ("x", "index", "rows", "after", "weight", *(["valid"] if valid else []))
    arguments = [given[name] for name in names]
    out = OPS.scatter_residual(*arguments)
    exact = OPS.scatter_residual(*(t.cpu().double() if t.is_floating_point() else t.cpu() for t in arguments))
    torch.testing.assert_close(out.cpu().double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    kept = torch.ones(out.shape[:2], dtype=torch.bool, device="cuda").scatter(1, given["index"], False)
    assert torch.equal(out[kept], given["x"][kept])


@pytest.mark.parametrize("name", NORMS)
def test_gradients_equal_those_on_the_cpu(name: str) -> None:
    norm, found = NORMS[name], []
    for device in ("cpu", "cuda"):
        given = sample_inputs(device=device)
        leaves = [given[n].detach().requires_grad_() for n in ("x", "gamma", "after", "weight")]
        x, gamma, after, weight = leaves
        beta = given["beta"] if norm.beta else None
        rows, normed = OPS.gather_norm(x, given["index"], gamma, beta, norm=norm.encode())
        out = OPS.scatter_residual(x, given["index"], rows, after * normed, weight, given["valid"])
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    for own, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64, 100, 1027])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_if(bias: bool, rows: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, 1000, device="cuda").to(dtype), (torch.randn(777, 1000, device="cuda") / 30).to(dtype)
    b = torch.randn(777, device="cuda").to(dtype) if bias else None
    found = OPS.linear_if(torch.tensor(True, device="cuda"), x, weight, b)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    torch.testing.assert_close(found.double(), expected, atol=2 * TOLERANCE[dtype] + 1e-5, rtol=TOLERANCE[dtype])
    none = OPS.linear_if(torch.tensor(False, device="cuda"), x, weight * torch.nan, b)
    assert torch.equal(none, torch.zeros_like(none))


def test_no_host_synchronisation_and_cuda_graph() -> None:
    given = sample_inputs(batch=2, tokens=64, count=8, width=512, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16) / 20
    active = torch.tensor(True, device="cuda")

    def step() -> torch.Tensor:
        rows, normed = OPS.gather_norm(given["x"], given["index"], given["gamma"], None, norm=NORMS["rms"].encode())
        after = rows + OPS.linear_if(active, normed, weight)
        return OPS.scatter_residual(given["x"], given["index"], rows, after, given["weight"], given["valid"])

    step()  # compiles
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    # The graph follows what the device holds: which tokens, and whether the linear is needed at all.
    for decision in (False, True):
        active.fill_(decision)
        given["index"].copy_(torch.rand(2, 64, device="cuda").argsort(1)[:, :8].sort(1).values)
        graph.replay()
        torch.testing.assert_close(out, step())
    active.fill_(False)
    graph.replay()
    assert torch.equal(out, given["x"])
