"""Fused linears: epilogues read from FX graphs, descriptions, refusals; kernels run in interpreted_gemm.py."""

import contextlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.passes.shape_prop import ShapeProp

from fxopt.codegen import roofline
from fxopt.codegen.kernels import Unsupported, gemm_launch
from fxopt.codegen.kernels.epilogue import Epilogue, Extra, Output, Step, from_nodes
from fxopt.codegen.kernels.gemm import Config, FusedLinear, Norm, bucket, configure, reference, shared_bytes
from fxopt.codegen.kernels.gemm_launch import _launch, build, interpreted, run
from fxopt.codegen.ops.fused_linear import sample_inputs

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(("file", "least"), [("interpreted_gemm.py", 50), ("interpreted_statistics.py", 120)])
def test_kernels_in_the_interpreter(tmp_path, file, least):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FXOPT_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(HERE / file), "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed.group(1)) >= least
    assert "skipped" not in done.stdout


def traced(function, *example):
    """An FX graph of `function` whose nodes carry `example_value`, its linears and its outputs."""
    module = fx.symbolic_trace(function)
    ShapeProp(module).propagate(*example)
    values = {}
    for node, value in zip(module.graph.nodes, interpret(module, example), strict=True):
        values[node] = node.meta["example_value"] = value
    linears = [node for node in module.graph.nodes if node.target is F.linear]
    (end,) = [node for node in module.graph.nodes if node.op == "output"]
    outputs = list(end.args[0]) if isinstance(end.args[0], (tuple, list)) else [end.args[0]]
    return linears, outputs


def interpret(module, example):
    class Keep(fx.Interpreter):
        def run_node(self, node):
            kept.append(super().run_node(node))
            return kept[-1]

    kept = []
    Keep(module).run(*example)
    return kept


def agree(function, *example):
    """The epilogue read from the graph, evaluated in torch, equals the function; returns epilogue and extra nodes."""
    linears, outputs = traced(function, *example)
    epilogue, nodes = from_nodes(linears, outputs)
    right = function(*example)
    right = list(right) if isinstance(right, (tuple, list)) else [right]
    batch = linears[0].meta["example_value"].shape[:-1]
    products = [
        F.linear(n.args[0].meta["example_value"], n.args[1].meta["example_value"]).flatten(0, -2) for n in linears
    ]
    extras = []
    for node, kind in zip(nodes, epilogue.extras, strict=True):
        value = node.meta["example_value"]
        extras.append(value.reshape(-1, value.shape[-1]) if kind.layout == "full" else value.reshape(-1))
    for got, expected in zip(epilogue.evaluate(products, extras), right, strict=True):
        torch.testing.assert_close(got.view(*batch, -1), expected, rtol=1e-5, atol=1e-5)
    assert Epilogue.decode(epilogue.encode()) == epilogue
    return epilogue, nodes


X, W, W2 = torch.randn(2, 3, 8), torch.randn(6, 8), torch.randn(6, 8)
BIAS, RESIDUAL = torch.randn(6), torch.randn(2, 3, 6)


def test_bias_residual_and_cast():
    epilogue, nodes = agree(lambda x, w, b, r: (F.linear(x, w, b) + r).to(torch.float16).float(), X, W, BIAS, RESIDUAL)
    assert [s.op for s in epilogue.steps] == ["add", "add", "cast", "cast"]
    assert [e.layout for e in epilogue.extras] == ["column", "full"]
    assert [n.name for n in nodes] == ["b", "r"]
    assert [s.dtype for s in epilogue.steps[2:]] == ["float16", "float32"]


def test_gate_and_up():
    epilogue, _ = agree(lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, v), X, W, W2)
    assert [s.op for s in epilogue.steps] == ["silu", "mul"]
    assert epilogue.products == 2
    assert [s.products for s in epilogue.segments()] == [(0, 1)]


def test_every_layout_and_scalar_arithmetic():
    def function(x, w, full, column, row, scalar, truth):
        y = 1.0 - 2 * F.linear(x, w) / 3
        y = torch.where(truth, y.clamp(-1, 1), y.pow(2)) + column.mul(2) - row
        return torch.add(y, full, alpha=0.5) * scalar + y.tanh().neg()

    arguments = (RESIDUAL, BIAS, torch.randn(2, 3, 1), torch.tensor(1.5), RESIDUAL > 0)
    epilogue, _ = agree(function, X, W, *arguments)
    assert {e.layout for e in epilogue.extras} == {"full", "column", "row", "scalar"}
    assert "bool" in {e.dtype for e in epilogue.extras}


@pytest.mark.parametrize(
    "act",
    [
        F.gelu,
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: F.leaky_relu(x, 0.2),
        lambda x: F.leaky_relu(x, negative_slope=0.2, inplace=False),
        F.relu6,
        F.hardtanh,
        torch.sigmoid,
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: torch.clamp(x, min=0.5),
        lambda x: x.clamp(max=0.5),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: torch.relu(x).square(),
        lambda x: 3 - x,
        lambda x: -x,
        lambda x: (x > 0.1).to(torch.float32) * x,
        lambda x: x.type_as(RESIDUAL) + x.exp().log(),
    ],
)
def test_activations(act):
    agree(lambda x, w: act(F.linear(x, w)), X, W)


def test_several_outputs_and_segments():
    def function(x, q, k, v, b):
        return F.linear(x, q, b), F.linear(x, k), F.linear(x, v) * 2

    epilogue, _ = agree(function, X, W, torch.randn(4, 8), torch.randn(4, 8), BIAS)
    assert [s.products for s in epilogue.segments()] == [(0,), (1,), (2,)]
    fused = FusedLinear("float32", 8, (6, 4, 4), epilogue)
    assert fused.output_widths == (6, 4, 4)


def test_what_follows_a_product_and_does_not_come_from_it_is_an_extra():
    epilogue, nodes = agree(lambda x, w, r: F.linear(x, w) + r.sum(-1, keepdim=True).sin(), X, W, RESIDUAL)
    assert [s.op for s in epilogue.steps] == ["add"]
    assert [n.name for n in nodes] == ["sin"]


def test_steps_carry_names_without_counters():
    # Layers differ in nothing but counters; they must share one kernel.
    first, _ = from_nodes(*traced(lambda x, w, r: F.linear(x, w) + r, X, W, RESIDUAL))
    linears, outputs = traced(lambda x, w, r: F.linear(x, w) + r, X, W, RESIDUAL)
    outputs[0]._rename("add_17")
    assert from_nodes(linears, outputs)[0] == first


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w, r: F.linear(x, w).softmax(-1), "softmax.* not a pointwise"),
        (lambda x, w, r: F.linear(x, w).cumsum(-1) + r, "cumsum"),
        (lambda x, w, r: F.linear(x, w).view(2, 3, 2, 3), "larger than the product"),
        (lambda x, w, r: F.linear(x, w) + r[None, None], "more dimensions"),
        (lambda x, w, r: F.linear(x, w) + r[:, :1], "some leading dimensions only"),
        (lambda x, w, r: F.linear(x, w).double() + r, "computes in float64"),
        (lambda x, w, r: F.linear(x, w) + (r * 3).int(), "reads floats and truth values"),
        (lambda x, w, r: F.linear(x, w) ** 1.3, "a power of 1.3"),
        (lambda x, w, r: F.linear(x, w) ** r, "exponent is a tensor"),
        (lambda x, w, r: F.dropout(F.linear(x, w), 0.5, training=True), "dropout in training"),
        (lambda x, w, r: torch.div(F.linear(x, w), r, rounding_mode="floor"), "rounding_mode"),
        (lambda x, w, r: F.silu(F.linear(x, w), inplace=True), "inplace"),
        (lambda x, w, r: F.linear(x, w).add_(r), "add_"),
        (lambda x, w, r: F.linear(x, w).to("cpu"), "also moves"),
        (lambda x, w, r: F.linear(x, w) > r, "store truth values"),
        (lambda x, w, r: F.linear(x, w) * (F.linear(x, w) > 0), "mixes truth values"),
    ],
)
def test_refusals_say_why(function, reason):
    linears, outputs = traced(function, X, W, RESIDUAL)
    with pytest.raises(Unsupported, match=reason):
        from_nodes(linears[:1], outputs)


def plain(products):
    return Epilogue.plain(products, torch.float32)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: FusedLinear("int8", 8, (4,), plain(1)), "int8"),
        (lambda: FusedLinear("float32", 0, (4,), plain(1)), "without rows"),
        (lambda: FusedLinear("float32", 8, (4, 4), plain(1)), "1 products for 2 weights"),
        (lambda: FusedLinear("float32", 8, (4, 4), Epilogue(2, (Output("p0", "float32"),))), r"products \[1\] feed no"),
        (lambda: FusedLinear("float32", 8, (4,), Epilogue(1, (Output("e0", "float32"),))), "depends on no product"),
        (
            lambda: FusedLinear("float32", 8, (4,), replace(plain(1), extras=(Extra("e0", "full", "float32"),))),
            r"extras .'e0'. feed no output",
        ),
        (
            lambda: FusedLinear(
                "float32", 8, (4, 5), Epilogue(2, (Output("s0", "float32"),), (Step("s0", "add", ("p0", "p1"), "a"),))
            ),
            "different widths",
        ),
    ],
)
def test_descriptions_that_cannot_hold(make, reason):
    with pytest.raises(Unsupported, match=reason) as caught:
        make()
    assert caught.value.reason == str(caught.value)


LONGEST = Step("t0", "row_amax", ("p0",), "amax")
SUM = Step("t1", "row_sum", ("p0",), "sum")


def statistic_group(*steps, extras=(), norm=None, after=None):
    prologue = Epilogue(1, (Output(steps[-1].name, "float32"),), steps, extras)
    return FusedLinear("float32", 8, (4,), after or plain(1), norm, prologue)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: statistic_group(
                LONGEST, SUM, Step("t2", "mul", ("t0", "t1"), "m"), Step("t3", "mul", ("p0", "t2"), "m")
            ),
            r"2 row statistics, row_amax \(amax\) and row_sum \(sum\)",
        ),
        (
            lambda: statistic_group(LONGEST, Step("t1", "div", ("p0", "t0"), "div"), norm=Norm("rms", 1e-6)),
            "row_amax before a norm",
        ),
        (
            lambda: statistic_group(
                LONGEST, Step("t1", "div", ("q0", "t0"), "div"), extras=(Extra("q0", "full", "float32"),)
            ),
            "of another tensor than the row",
        ),
        (lambda: statistic_group(LONGEST), "of another tensor than the row"),
        (
            lambda: FusedLinear("float32", 8, (4,), Epilogue(
                1, (Output("s1", "float32"),),
                (Step("s0", "row_sum", ("p0",), "sum"), Step("s1", "div", ("p0", "s0"), "div")),
            )),
            "row_sum after the products",
        ),
    ],
    ids=["two", "norm", "another", "alone", "after"],
)  # fmt: skip
def test_row_statistics_that_no_kernel_computes(make, reason):
    with pytest.raises(Unsupported, match=reason):
        make()


def test_a_file_with_a_statistic_holds_each_step_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    steps = (Step("t0", "mul", ("p0", "q0"), "gate"), LONGEST, Step("t2", "sqrt", ("t1",), "root"))
    steps = (steps[0], Step("t1", "row_amax", ("t0",), "amax"), steps[2], Step("t3", "div", ("p0", "t2"), "div"))
    fused = statistic_group(*steps, extras=(Extra("q0", "full", "float32"),))
    for config in (Config("gemv", 2, 2, 32), Config("flat", 16, 16, 16, splits=2)):
        text = build(fused, config).path.read_text()
        functions = dict(re.findall(r"^def (\w+)\((?:[^\n]|\n(?!\n))*?\):\n((?:    .*\n)+)", text, re.MULTILINE))
        assert ("t0 =" in functions["reduced"], "t0 =" in functions["prologue"]) == (True, False)
        assert ("t2 =" in functions["reduced"], "t2 =" in functions["prologue"]) == (False, True)
        assert "tl.load(q0" in functions["reduced"] and "tl.load(q0" not in functions["prologue"]
        assert text.count("= row_statistic(") == (2 if config.family == "gemv" else 1)


def test_outputs_that_need_different_numbers_of_products():
    steps = (Step("s0", "mul", ("p0", "p1"), "gate"),)
    epilogue = Epilogue(3, (Output("s0", "float32"), Output("p2", "float32")), steps)
    with pytest.raises(Unsupported, match="different numbers of products"):
        FusedLinear("float32", 8, (4, 4, 4), epilogue)


def test_norm_matches_torch():
    x, gamma, beta = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    layer = Norm("layer", 1e-5, beta=True).evaluate(x, gamma, beta)
    torch.testing.assert_close(layer, F.layer_norm(x, (8,), gamma, beta, 1e-5))
    torch.testing.assert_close(Norm("rms", 1e-6).evaluate(x, gamma, None), F.rms_norm(x, (8,), gamma, 1e-6))
    shifted = Norm("rms", 1e-6, unit_offset=True).evaluate(x, gamma, None)
    torch.testing.assert_close(shifted, F.rms_norm(x, (8,), 1 + gamma, 1e-6))


def test_description_survives_a_string():
    extras = (Extra("e0", "full", "bfloat16"),)
    epilogue = Epilogue(1, (Output("s0", "bfloat16"),), (Step("s0", "add", ("p0", "e0"), "residual"),), extras)
    fused = FusedLinear("bfloat16", 64, (32,), epilogue, Norm("rms", 1e-5))
    assert FusedLinear.decode(fused.encode()) == fused
    assert [e.name for e in fused.extras] == ["gamma", "e0"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"family": "flat", "block_m": 8, "block_n": 64, "block_k": 64},
        {"family": "flat", "block_m": 16, "block_n": 48, "block_k": 64},
        {"family": "flat", "block_m": 16, "block_n": 64, "block_k": 8},
        {"family": "gemv", "block_m": 1, "block_n": 8, "block_k": 512, "splits": 2},
        {"family": "flat", "block_m": 16, "block_n": 64, "block_k": 64, "stages": 0},
    ],
)
def test_impossible_configurations(arguments):
    with pytest.raises(ValueError, match=r"power of two|16 at least|GEMV neither|start at 1"):
        Config(**arguments)


def test_buckets_and_configurations_fit_every_device():
    assert [bucket(m) for m in (1, 2, 3, 4, 5, 16, 17, 33, 64, 65)] == [1, 2, 4, 4, 16, 16, 32, 64, 64, 64]
    gate = Epilogue(2, (Output("s0", "float32"),), (Step("s0", "mul", ("p0", "p1"), "gate"),))
    for device in roofline.DEVICES.values():
        for dtype in ("bfloat16", "float32"):
            for fused in (FusedLinear(dtype, 4096, (4096,), plain(1)), FusedLinear(dtype, 4096, (14336, 14336), gate)):
                flat = [configure(fused, m, "flat", device) for m in (1, 16, 17, 64, 200)]
                assert len({c.splits for c in flat}) == 1, "splits depend on M"
                for config in flat:
                    assert shared_bytes(fused, config) <= device.shared_bytes
                configure(fused, 1, "gemv", device)


@pytest.mark.skipif(torch.cuda.is_available() or interpreted(), reason="says what happens without a GPU")
def test_without_a_gpu_the_kernel_refuses_and_the_reference_runs():
    fused = FusedLinear("float32", 8, (6,), plain(1))
    with pytest.raises(Unsupported, match="kernels run on a GPU"):
        run(fused, X, [W])
    torch.testing.assert_close(reference(fused, X, [W], [])[0], F.linear(X, W))


@pytest.mark.skipif(torch.cuda.is_available() or interpreted(), reason="needs Triton without a device")
def test_a_kernel_that_triton_cannot_compile_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    kernel = build(FusedLinear("float32", 8, (6,), plain(1)), Config("gemv", 1, 2, 32))
    with pytest.raises(Unsupported, match="does not compile for cpu"):
        _launch(kernel, X[0], [W], {}, [torch.empty(3, 6)])
    assert not kernel.compiled


@pytest.mark.skipif(torch.cuda.is_available() or interpreted(), reason="pretends that a device is there")
def test_a_kernel_is_compiled_before_it_runs(tmp_path, monkeypatch):
    """Every parameter gets a dtype or a number; what the compiler says becomes the reason."""
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(gemm_launch.compat, "compile_ahead", lambda *call: asked.append(call) or {"registers": 40})
    fused, *_ = sample_inputs(depth=1100, dtype=torch.bfloat16)
    kernel, device = build(fused, Config("flat", 16, 32, 32, splits=2)), torch.device("cuda", 0)
    gemm_launch.compile_here(kernel, 3, torch.device("cpu"))
    assert not asked
    gemm_launch.compile_here(kernel, 3, device)
    gemm_launch.compile_here(kernel, 3, device)
    assert [jit.__name__ for jit, *_ in asked] == ["flat_gemm", "reduce_splits"]
    assert [len(arguments) for _, arguments, *_ in asked] == [
        len(kernel.writer.main_parameters()), len(kernel.writer.reduce_parameters())
    ]  # fmt: skip
    assert kernel.resources == {"registers": 40, "reduce_splits registers": 40}
    assert asked[0][1][:3] == [torch.bfloat16, 1100, 3]
    assert asked[0][3]["num_stages"] == 3

    def fail(*call):
        raise gemm_launch.compat.KernelNotCompiled("no such instruction")

    monkeypatch.setattr(gemm_launch.compat, "compile_ahead", fail)
    other = build(fused, Config("gemv", 2, 2, 32))
    with pytest.raises(Unsupported, match="does not compile for cuda:0: no such instruction"):
        gemm_launch.compile_here(other, 2, device)
    assert not other.compiled


def test_one_file_for_equal_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    fused = FusedLinear("float16", 72, (24,), Epilogue.plain(1, torch.float16))
    config = Config("flat", 16, 16, 16)
    paths = {build(fused, config, origin).path for origin in ("model.layers.0.mlp", "model.layers.1.mlp")}
    assert len(paths) == 1
    text = paths.pop().read_text()
    assert "model.layers.0.mlp" in text
    assert "[24, 72]" in text
    assert "block_n=16" in text
