"""Fused linears on a GPU: right against float64 in every family and dtype, the same bits twice, in CUDA graphs."""

import pytest
import torch

from fxopt.codegen import dataflow, measuring, roofline
from fxopt.codegen.kernels.epilogue import Epilogue, Extra, Output, Step
from fxopt.codegen.kernels.gemm import Config, FusedLinear, Norm, configure, reference
from fxopt.codegen.kernels.gemm_launch import interpreted, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or interpreted(), reason="needs a GPU"),
]

ROWS = (1, 2, 3, 5, 8, 16, 17, 33, 64)


def residual(dtype):
    return (
        1,
        Epilogue(1, (Output("s0", dtype),), (Step("s0", "add", ("p0", "e0"), "r"),), (Extra("e0", "full", dtype),)),
        None,
    )


def gate(dtype):
    steps = (Step("s0", "silu", ("p0",), "act"), Step("s1", "mul", ("s0", "p1"), "gate"))
    return 2, Epilogue(2, (Output("s1", dtype),), steps), Norm("rms", 1e-6)


def qkv(dtype):
    return 3, Epilogue.plain(3, getattr(torch, dtype), biased=True), Norm("layer", 1e-5, beta=True)


def group(make, dtype, n, k):
    count, epilogue, norm = make(dtype)
    return FusedLinear(dtype, k, (n,) * count, epilogue, norm)


def operands(fused, m):
    kind = getattr(torch, fused.dtype)
    torch.manual_seed(0)
    x = torch.randn(m, fused.depth, device="cuda").to(kind)
    weights = [(torch.randn(n, fused.depth, device="cuda") * fused.depth**-0.5).to(kind) for n in fused.widths]
    extras = []
    for extra in fused.extras:
        width = fused.depth if extra.name in ("gamma", "beta") else fused.widths[0]
        extras.append(torch.randn((m, width) if extra.layout == "full" else (width,), device="cuda").to(kind))
    return x, weights, extras


@pytest.mark.parametrize("make", [residual, gate, qkv])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1024, 2048), (333, 1001), (1024, 4096)])
def test_every_family_against_float64(make, dtype, shape):
    fused = group(make, dtype, *shape)
    device = roofline.current_device()
    for m in ROWS:
        x, weights, extras = operands(fused, m)
        exact = reference(fused, x.double(), [w.double() for w in weights], [e.double() for e in extras], exact=True)
        eager = reference(fused, x, weights, extras)
        configs = [configure(fused, m, "flat", device)]
        if m <= 8:
            configs.append(configure(fused, m, "gemv", device))
        for config in configs:
            found = run(fused, x, weights, extras, config)
            for got, right, peer in zip(found, exact, eager, strict=True):
                scale = max(right.abs().max().item(), 1.0)
                grain = torch.finfo(got.dtype).eps * scale * (1 if dtype != "float32" else 64)
                off = (got.double() - right).abs().max().item()
                assert off <= 2 * (peer.double() - right).abs().max().item() + grain, (m, config)


STATISTICS = {
    "row_sum": (Step("t0", "cast", ("p0",), "norm", "float32"), Step("t1", "square", ("t0",), "norm"),
                Step("t2", "row_sum", ("t1",), "norm"), Step("t3", "sqrt", ("t2",), "norm"),
                Step("t4", "div", ("p0", "t3"), "div")),
    "row_amax": (Step("t0", "abs", ("p0",), "abs"), Step("t1", "row_amax", ("t0",), "amax"),
                 Step("t4", "div", ("p0", "t1"), "div")),
    "row_amin": (Step("t1", "row_amin", ("p0",), "amin"), Step("t4", "sub", ("p0", "t1"), "sub")),
}  # fmt: skip


@pytest.mark.parametrize("name", list(STATISTICS))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(333, 1001), (1024, 4096)])
def test_row_statistics_against_float64_and_beside_a_row_of_nan(name, dtype, shape):
    count, epilogue, _ = residual(dtype)
    before = Epilogue(1, (Output("t4", dtype),), STATISTICS[name])
    fused = FusedLinear(dtype, shape[1], (shape[0],) * count, epilogue, None, before)
    for m in (1, 2, 3, 5, 8, 16):
        x, weights, extras = operands(fused, m)
        x[m // 2, -1] = float("nan")
        exact = reference(fused, x.double(), [w.double() for w in weights], [e.double() for e in extras], exact=True)[0]
        eager = reference(fused, x, weights, extras)[0]
        for family in ("flat", "gemv") if m <= 8 else ("flat",):
            found = run(fused, x, weights, extras, configure(fused, m, family, roofline.current_device()))[0]
            assert torch.equal(found.isnan(), exact.isnan()), (m, family)
            right, peer = exact.nan_to_num(), eager.double().nan_to_num()
            grain = torch.finfo(found.dtype).eps * max(right.abs().max().item(), 1.0)
            grain *= 64 if dtype == "float32" else 1
            off = (found.double().nan_to_num() - right).abs().max().item()
            assert off <= 2 * (peer - right).abs().max().item() + grain, (m, family)


@pytest.mark.parametrize("config", [Config("gemv", 1, 8, 512), Config("flat", 16, 64, 128, 4, 4)], ids=["gemv", "flat"])
def test_two_runs_give_the_same_bits(config):
    fused = group(residual, "bfloat16", 4096, 4096)
    x, weights, extras = operands(fused, 1)
    first = run(fused, x, weights, extras, config)[0]
    for _ in range(20):
        assert torch.equal(run(fused, x, weights, extras, config)[0], first)


def test_a_row_does_not_depend_on_the_batch():
    fused = group(residual, "bfloat16", 4096, 4096)
    x, weights, extras = operands(fused, 16)
    config = configure(fused, 16, "flat", roofline.current_device())
    together = run(fused, x, weights, extras, config)[0]
    for row in (0, 7, 15):
        alone = run(fused, x[row : row + 1], weights, [extras[0][row : row + 1]], config)[0]
        assert torch.equal(alone[0], together[row])


def test_a_graph_replays_with_new_operands():
    fused = group(gate, "bfloat16", 1024, 2048)
    x, weights, extras = operands(fused, 4)
    config = configure(fused, 4, "flat", roofline.current_device())
    run(fused, x, weights, extras, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(fused, x, weights, extras, config)[0]
    x.copy_(torch.randn_like(x))
    weights[0].mul_(0.5)
    graph.replay()
    assert torch.equal(captured, run(fused, x, weights, extras, config)[0])


def test_memory_is_the_outputs_and_the_partial_sums():
    fused = group(residual, "bfloat16", 4096, 4096)
    x, weights, extras = operands(fused, 16)
    config = configure(fused, 16, "flat", roofline.current_device())
    run(fused, x, weights, extras, config)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(fused, x, weights, extras, config)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 16 * 4096 * 2 + config.splits * 16 * (4096 + 1) * 4 + 4096


def test_a_table_is_measured_kept_and_used(tmp_path):
    path = tmp_path / "table.json"
    device, model = torch.device("cuda", 0), roofline.current_device()
    key, timer = dataflow.TableKey.current("bfloat16", device), measuring.cold_timer(device, model.cache_bytes)
    groups = [measuring.residual_group(256, 512, "bfloat16")]
    table = measuring.measure_table(groups, key, path, device=device, model=model, timer=timer, rows=(1, 4, 16))
    assert (256, 512) in table.entries
    flow = dataflow.Dataflow(torch.bfloat16, torch.device("cuda"), path)
    assert flow.measured(256, 512)
    assert flow.thresholds(256, 512) == table.entries[256, 512].thresholds
