"""The operator of fused linears: its body against float64 written out here, its fake and registration."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fxopt.codegen import dataflow as dataflow_module
from fxopt.codegen import roofline
from fxopt.codegen.kernels.epilogue import Epilogue
from fxopt.codegen.kernels.gemm import FusedLinear, reference
from fxopt.codegen.ops import fused_linear as op
from fxopt.codegen.ops.fused_linear import TOLERANCE, dataflow, sample_inputs

OP = torch.ops.fxopt.fused_linear.default


def written_out(x, weights, extras, *, gated, norm, bias, residual):
    """float64, each step by hand."""
    x, *rest = (t.double() for t in (x, *extras))
    weights = [w.double() for w in weights]
    if norm == "rms":
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * rest.pop(0)
    elif norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], rest.pop(0), rest.pop(0), 1e-5)
    products = [x @ w.mT for w in weights]
    if bias:
        products = [p + rest.pop(0) for p in products]
    if gated:
        gate = F.silu(products[0])
        for product in products[1:]:
            gate = gate * product
        products = [gate]
    return [p + rest.pop(0) for p in products] if residual else products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["rms", "layer", ""])
@pytest.mark.parametrize(("gated", "bias", "residual"), [(1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_against_float64(dtype, norm, gated, bias, residual):
    widths = (24, 24) if gated else (24, 7, 40)
    for rows in ((2, 1), (3,), (1, 1), (17,)):
        how = {"gated": gated, "norm": norm, "bias": bias, "residual": residual}
        fused, x, weights, extras = sample_inputs(rows=rows, widths=widths, dtype=dtype, **how)
        outputs = OP(x, weights, extras, group=fused.encode())
        expected = written_out(x, weights, extras, **how)
        assert [y.dtype for y in outputs] == [dtype] * len(expected)
        for y, wanted in zip(outputs, expected, strict=True):
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(y.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("how", [{}, {"norm": "layer"}, {"norm": "", "gated": False, "widths": (24, 9, 16)}])
def test_opcheck(how):
    fused, x, weights, extras = sample_inputs(**how)
    torch.library.opcheck(OP, (x, weights, extras), {"group": fused.encode(), "origin": "layers.*.mlp"})


def test_opcheck_with_sliced_weights_and_a_permuted_residual():
    fused, x, weights, extras = sample_inputs(rows=(3, 2))
    both = torch.cat(weights)
    sliced = [both[:24], both[24:]]
    extras[-1] = extras[-1].transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(OP, (x, sliced, extras), {"group": fused.encode()})
    (found,) = OP(x, sliced, extras, group=fused.encode())
    torch.testing.assert_close(found, OP(x, weights, [e.contiguous() for e in extras], group=fused.encode())[0])


@pytest.mark.parametrize("rows", [(2, 1), (1, 1), (4, 3), (0,)])
def test_shapes_and_strides_are_what_the_fake_says(rows):
    fused, x, weights, extras = sample_inputs(rows=rows)
    (real,) = OP(x, weights, extras, group=fused.encode())
    with torch._subclasses.FakeTensorMode() as mode:
        x, *tensors = (mode.from_tensor(t) for t in (x, *weights, *extras))
        (fake,) = OP(x, tensors[: len(weights)], tensors[len(weights) :], group=fused.encode())
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_operands_that_do_not_fit_the_group():
    fused, x, weights, extras = sample_inputs()
    group = fused.encode()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(RuntimeError, match="the group has K = 40"):
            OP(x[..., :-1], weights, extras, group=group)
        with pytest.raises(RuntimeError, match=r"the group has N = \(24, 24\)"):
            OP(x, weights[:1], extras, group=group)
        with pytest.raises(RuntimeError, match="extras for a group that reads"):
            OP(x, weights, extras[:-1], group=group)


def test_a_gpu_gets_the_dataflow(monkeypatch):
    """Without a GPU the CUDA implementation is called directly; what it hands over is what a kernel would be given."""
    fused, x, weights, extras = sample_inputs()
    asked = []

    class Flow:
        def run(self, *operands):
            asked.append(operands)
            return [torch.zeros(2, 1, 24)]

    monkeypatch.setattr(op, "dataflow", lambda *key: asked.append(key) or Flow())
    (y,) = op.launch(x, weights, extras, group=fused.encode(), tables="some/folder", max_m=8, origin="mlp")
    assert y.shape == (2, 1, 24)
    assert asked[0] == ("float32", torch.device("cpu"), "some/folder", 8)
    assert asked[1] == (fused, x, weights, extras, "mlp")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fxopt::fused_linear", "CUDA")


def test_decisions_are_kept_for_a_process(monkeypatch):
    made = []
    monkeypatch.setattr(op, "Dataflow", lambda *given: made.append(given) or object())
    op._dataflow.cache_clear()
    try:
        first = dataflow("float16", torch.device("cpu"), "", 64)
        assert dataflow("float16", torch.device("cpu"), "", 64) is first
        assert made == [("float16", torch.device("cpu"), None, 64, None)]
    finally:
        op._dataflow.cache_clear()


def test_inside_a_compiled_function():
    group = FusedLinear("float32", 40, (24, 9), Epilogue.plain(2, torch.float32)).encode()
    _, x, weights, _ = sample_inputs(widths=(24, 9), gated=False)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x, *weights):
        first, second = OP(x, list(weights), [], group=group)
        return first.relu(), second * 2

    first, second = compiled(x, *weights)
    torch.testing.assert_close(first, (x @ weights[0].mT).relu())
    torch.testing.assert_close(second, x @ weights[1].mT * 2)


def test_rows_are_dispatched_over_buckets_without_compiling_again(monkeypatch):
    """One graph for 2 to 64 rows: the operator asks the dataflow by the shape of each call, which the host knows."""
    fused, _, weights, _ = sample_inputs(norm="", gated=False, bias=False, residual=False, widths=(24, 9))
    served, compiled = [], []

    def kernel(fused, x, weights, extras, config, origin):
        served.append((x.shape[0], config.family, config.block_m))
        return reference(fused, x, weights, extras)

    flow = dataflow_module.Dataflow("float32", torch.device("cpu"), model=roofline.DEVICES["H200"])
    monkeypatch.setattr(flow, "thresholds", lambda n, k: dataflow_module.Thresholds(3, 50))
    monkeypatch.setattr(dataflow_module, "run", kernel)
    monkeypatch.setattr(op, "dataflow", lambda *key: flow)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("the host waited for the device"))
    group = fused.encode()

    def backend(gm, inputs):
        compiled.append(gm)
        return gm.forward

    with torch.library._scoped_library("fxopt", "IMPL") as library:
        library.impl("fused_linear", op.launch, "CPU")
        function = torch.compile(lambda x: OP(x, list(weights), [], group=group)[0], backend=backend)
        for rows in (5, 2, 3, 16, 17, 33, 49, 50, 64):
            x = torch.randn(rows, 40)
            torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
            torch.testing.assert_close(function(x), x @ weights[0].mT)
    assert len(compiled) == 1
    assert served == [
        (5, "flat", 16), (2, "gemv", 2), (3, "flat", 16), (16, "flat", 16), (17, "flat", 32), (33, "flat", 64),
        (49, "flat", 64),
    ]  # fmt: skip
