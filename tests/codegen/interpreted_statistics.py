"""Row statistics before fused linears in Triton's interpreter; test_gemm.py runs this file under TRITON_INTERPRET=1.

The prologues are read from the functions that they are compared with, so what is checked is the model's own meaning.
"""

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from interpreted_gemm import CONFIGS, Traffic, check_near, operands, prologues, residual, wide
from torch import fx

from fxopt.codegen import roofline
from fxopt.codegen.kernels.epilogue import Epilogue, Extra, Output, Step
from fxopt.codegen.kernels.gemm import FusedLinear, reference
from fxopt.codegen.kernels.gemm_launch import run
from fxopt.codegen.kernels.prologue import match_pointwise
from fxopt.codegen.kernels.row_statistic import REDUCTIONS

ROWS = (1, 2, 3, 5, 8, 16)
FUNCTIONS = {
    "norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "norm 1": lambda x: x / torch.linalg.vector_norm(x, ord=1, dim=-1, keepdim=True),
    "norm inf": lambda x: x / torch.linalg.norm(x, ord=math.inf, dim=-1, keepdim=True),
    "norm -inf": lambda x: x * torch.norm(x, -math.inf, -1, True),
    "normalize": lambda x: F.normalize(x, dim=-1, eps=1e-6),
    "amax": lambda x: x / x.abs().amax(-1, keepdim=True).clamp(min=1e-5),
    "amax below zero": lambda x: x * (-1.0 - x.abs()).amax(-1, keepdim=True),
    "amin": lambda x: (x - x.amin(dim=-1, keepdim=True)).sqrt(),
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "sum": lambda x: x * torch.tanh(torch.exp(x * 0.1).sum([-1], True).reciprocal().expand_as(x) * 9.0),
}


class Keep(fx.Interpreter):
    def run_node(self, node):
        node.meta["example_value"] = value = super().run_node(node)
        return value


def prologue_of(function, depth, dtype):
    module = fx.symbolic_trace(function)
    Keep(module).run(torch.ones(2, depth, dtype=getattr(torch, dtype)))
    (end,) = [node for node in module.graph.nodes if node.op == "output"]
    return match_pointwise(end.args[0], lambda node: node.op.startswith("call")).prologue


def group(function, dtype, depth=51):
    fused = FusedLinear(dtype, depth, (37,), residual(dtype), None, prologue_of(function, depth, dtype))
    assert FusedLinear.decode(fused.encode()) == fused
    return fused


def straight(function, x, weight, bias, added):
    return F.linear(function(x), weight, bias) + added


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_every_statistic_at_every_number_of_rows(name, dtype, family):
    function = FUNCTIONS[name]
    fused = group(function, dtype)
    assert fused.prologue.statistic is not None
    for m in ROWS:
        x, weights, extras = operands(fused, m)
        (found,) = run(fused, x, weights, extras, CONFIGS[family](m))
        right = straight(function, x.double(), *wide([*weights, *extras]))
        torch.testing.assert_close(reference(fused, x.double(), wide(weights), wide(extras), exact=True)[0], right)
        peer = (straight(function, x, *weights, *extras).double() - right).abs().max().item()
        grain = torch.finfo(found.dtype).eps * max(right.abs().max().item(), 1.0)
        allowed = 1.5 * peer + grain * (16 if dtype == "float32" else 1)
        off = (found.double() - right).abs().max().item()
        assert off <= allowed, f"{off} > {allowed} for {m} rows"


def known(x):
    """The row without its NaN, so that one in the output comes from the statistic."""
    return torch.where(x == x, x, 1.0)


ODD = {
    **FUNCTIONS,
    "distance": lambda x: torch.exp(x - x.amax(-1, keepdim=True)),
    "known amax": lambda x: known(x) * x.amax(-1, keepdim=True),
    "known amin": lambda x: known(x) * x.amin(-1, keepdim=True),
    "known sum": lambda x: known(x) * x.sum(-1, keepdim=True),
}


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("name", list(ODD))
def test_nan_and_infinity_in_a_row_are_those_of_torch_and_stay_there(name, family):
    function = ODD[name]
    fused = group(function, "float32")
    clean, weights, extras = operands(fused, 5)
    x = clean.clone()
    for row, place, value in ((1, 7, math.nan), (2, 50, math.inf), (4, 0, -math.inf)):  # 50: the last of all columns
        x[row, place] = value
    (found,) = run(fused, x, weights, extras, CONFIGS[family](5))
    right = straight(function, x, *weights, *extras)
    assert torch.equal(found.isnan(), right.isnan())
    torch.testing.assert_close(found, right, equal_nan=True, rtol=1e-4, atol=1e-4)
    (untouched,) = run(fused, clean, weights, extras, CONFIGS[family](5))
    assert torch.equal(found[[0, 3]], untouched[[0, 3]])


@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_row_of_zeros_and_a_length_beyond_float16(family):
    fused = group(FUNCTIONS["normalize"], "float16")
    x, weights, extras = operands(fused, 3)
    x[0], x[1] = 0.0, 3e4  # the sum of squares, and the length itself, leave the range
    (found,) = run(fused, x, weights, extras, CONFIGS[family](3))
    right = straight(FUNCTIONS["normalize"], x.double(), *wide([*weights, *extras]))
    torch.testing.assert_close(found.double(), right, rtol=1e-2, atol=1e-2)
    # The operator's own body says the same.
    torch.testing.assert_close(reference(fused, x, weights, extras)[0].double(), right, rtol=1e-2, atol=1e-2)


def test_a_statistic_does_not_depend_on_the_batch_or_on_the_split():
    fused = group(FUNCTIONS["norm"], "float16", 131)
    x, weights, extras = operands(fused, 16)
    together = run(fused, x, weights, extras, CONFIGS["split"](16))[0]
    alone = run(fused, x[4:5], weights, [extras[0], extras[1][4:5]], CONFIGS["split"](1))[0]
    assert torch.equal(together[4:5], alone)


@st.composite
def statistics(draw, dtype):
    """A random chain, a reduction of it, steps on its result with extras of every layout, and the row they meet."""
    lead = draw(prologues(dtype))
    kinds = [e for e in lead.extras if e.layout in ("row", "scalar")]
    op = draw(st.sampled_from(list(REDUCTIONS)))
    chain = lead.outputs[0].value
    steps = [*lead.steps, Step("u0", "tanh", (chain,), "squash"), Step("u1", op, ("u0",), "reduce")]
    for index in range(draw(st.integers(0, 2))):
        other = draw(st.sampled_from([e.name for e in kinds] + ["u1"]) | st.floats(-2, 2, width=16))
        steps.append(Step(f"u{index + 2}", draw(st.sampled_from(["add", "mul"])), (steps[-1].name, other), "row"))
    row = draw(st.sampled_from(["p0", chain, "u0"]))
    steps.append(Step("v0", draw(st.sampled_from(["add", "sub", "mul"])), (row, steps[-1].name), "meet"))
    drawn = Epilogue(1, (Output("v0", dtype),), tuple(steps), lead.extras)
    read = drawn.reach(0)
    used = tuple(s for s in drawn.steps if s.name in read)
    return replace(drawn, steps=used, extras=tuple(e for e in lead.extras if e.name in read))


@settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(["float16", "float32"]), st.sampled_from(list(CONFIGS)))
def test_random_statistics(data, dtype, family):
    before = data.draw(statistics(dtype))
    # A chain that multiplies by zero or forgets x leaves no statistic of the row; FusedLinear refuses it elsewhere.
    if "p0" not in before.needed(before.statistic.args[0]):
        return
    m = data.draw(st.sampled_from([1, 3, 17]))
    fused = FusedLinear(dtype, 34, (21,), residual(dtype), None, before)
    check_near(fused, m, CONFIGS[family](m))


@pytest.mark.parametrize("family", ["gemv", "flat", "swap"])
def test_bytes_of_the_roofline_are_those_the_kernel_touches(monkeypatch, family):
    steps = (Step("t0", "mul", ("p0", "q0"), "gate"), Step("t1", "row_amax", ("t0",), "amax"),
             Step("t2", "mul", ("t1", "q1"), "scale"), Step("t3", "div", ("p0", "t2"), "div"))  # fmt: skip
    extras = (Extra("q0", "full", "float16"), Extra("q1", "row", "float16"))
    before = Epilogue(1, (Output("t3", "float16"),), steps, extras)
    fused = FusedLinear("float16", 50, (37,), residual("float16"), None, before)
    for m in (1, 5):
        x, weights, given_extras = operands(fused, m)
        with monkeypatch.context() as patch:
            traffic = Traffic(patch)
            run(fused, x, weights, given_extras, CONFIGS[family](m))
        assert traffic.bytes == roofline.fused_linear(fused).at(M=m)[1]
