"""Fused linears in Triton's interpreter against float64; test_gemm.py runs this file under TRITON_INTERPRET=1.

The interpreter computes bfloat16 dots wrongly, so float16 and float32 stand for the three. An operation of the
interpreter costs about a millisecond, hence few and large blocks.
"""

import itertools
import os
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fxopt.codegen import roofline
from fxopt.codegen.kernels import Unsupported
from fxopt.codegen.kernels.epilogue import Epilogue, Extra, Output, Step
from fxopt.codegen.kernels.gemm import Config, FusedLinear, Norm, reference
from fxopt.codegen.kernels.gemm_launch import run
from fxopt.codegen.kernels.pointwise import OPERATIONS

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_gemm.py, or with TRITON_INTERPRET=1"
torch.set_num_threads(1)

ROWS = (1, 2, 3, 5, 8, 16, 17, 33, 64)
CONFIGS = {
    "gemv": lambda m: Config("gemv", 1 if m == 1 else 2 if m < 8 else 8 if m == 8 else 16, 64, 32, stages=3),
    "flat": lambda m: Config("flat", 16 if m <= 16 else 64, 32, 32, stages=3),
    "split": lambda m: Config("flat", 16 if m <= 16 else 64, 64, 16, stages=2, splits=3),
    "swap": lambda m: Config("flat", 16 if m <= 16 else 32, 64, 32, stages=2, swap=True),
}


def residual(dtype):
    steps = (Step("s0", "add", ("p0", "e0"), "bias"), Step("s1", "add", ("s0", "e1"), "residual"))
    extras = (Extra("e0", "column", dtype), Extra("e1", "full", dtype))
    return Epilogue(1, (Output("s1", dtype),), steps, extras)


def gate(dtype):
    steps = (Step("s0", "silu", ("p0",), "act"), Step("s1", "mul", ("s0", "p1"), "gate"))
    return Epilogue(2, (Output("s1", dtype),), steps)


GROUPS = {
    "residual": lambda dtype: ((37,), residual(dtype)),
    "gate": lambda dtype: ((37, 37), gate(dtype)),
    "qkv": lambda dtype: ((37, 19, 23), Epilogue.plain(3, getattr(torch, dtype), biased=True)),
}
NORMS = (
    None,
    Norm("rms", 1e-6),
    Norm("rms", 1e-6, unit_offset=True),
    Norm("layer", 1e-5, beta=True),
    Norm("rms", 1e-5, gamma=False),
)


def operands(fused, m, seed=0):
    """x [m, K], weights and extras; the outputs of a norm-free product have unit variance."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)  # a scalar has no sizes to unpack

    kind = getattr(torch, fused.dtype)
    x = (normal(m, fused.depth) * 1.5 + 0.25).to(kind)
    weights = [(normal(n, fused.depth) * fused.depth**-0.5).to(kind) for n in fused.widths]
    extras = []
    for extra in fused.extras:
        width = fused.extra_width(extra)
        shape = {"full": (m, width), "column": (width,), "row": (m, 1), "scalar": ()}[extra.layout]
        value = normal(*shape)
        extras.append(value > 0 if extra.dtype == "bool" else value.to(getattr(torch, extra.dtype)))
    return x, weights, extras


def wide(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check(fused, m, config, seed=0):
    """The kernel is no farther from float64 than PyTorch in the same dtype, within a factor for luck of rounding."""
    x, weights, extras = operands(fused, m, seed)
    found = run(fused, x, weights, extras, config)
    exact = reference(fused, x.double(), wide(weights), wide(extras), exact=True)
    eager = reference(fused, x, weights, extras)
    for got, right, peer, output in zip(found, exact, eager, fused.epilogue.outputs, strict=True):
        assert got.shape == right.shape
        assert got.dtype is getattr(torch, output.dtype)
        scale = max(right.abs().max().item(), 1.0)
        grain = torch.finfo(got.dtype).eps * (scale if got.dtype is not torch.float32 else 16 * scale)
        off = (got.double() - right).abs().max().item()
        allowed = 1.5 * (peer.double() - right).abs().max().item() + grain
        assert off <= allowed, f"{off} > {allowed} for {fused} with {config}"
    return found


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_family_at_every_number_of_rows(dtype, family):
    # Groups and norms take turns, so that every pair of them occurs without running all products.
    turns = itertools.cycle(itertools.product(GROUPS, NORMS))
    for _ in range(list(CONFIGS).index(family) * 4 + (dtype == "float32") * 2):
        next(turns)
    for m, (group, norm) in zip(ROWS, turns, strict=False):
        widths, epilogue = GROUPS[group](dtype)
        check(FusedLinear(dtype, 50, widths, epilogue, norm), m, CONFIGS[family](m))


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: "none" if n is None else f"{n.kind}-{n.gamma}-{n.unit_offset}")
def test_every_norm_in_every_family(family, norm):
    check(FusedLinear("float32", 50, (19,), Epilogue.plain(1, torch.float32), norm), 3, CONFIGS[family](3))


@pytest.mark.parametrize("family", list(CONFIGS))
def test_depth_and_width_that_fill_their_blocks(family):
    check(FusedLinear("float16", 128, (64, 64), gate("float16")), 3, CONFIGS[family](3))


@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_least_there_is(family):
    check(FusedLinear("float32", 1, (1,), Epilogue.plain(1, torch.float32)), 1, CONFIGS[family](1))


def test_unnormalised_row_times_gamma_may_leave_float16():
    fused = FusedLinear("float16", 64, (32,), Epilogue.plain(1, torch.float16), Norm("rms", 1e-6))
    x, weights, _ = operands(fused, 2)
    x[:, 5] = 3e4
    for config in (CONFIGS["gemv"](2), CONFIGS["flat"](2), CONFIGS["split"](2)):
        gamma = torch.full((64,), 8.0, dtype=torch.float16)
        (found,) = run(fused, x, weights, [gamma], config)
        assert found.isfinite().all()
        (right,) = reference(fused, x.double(), wide(weights), [gamma.double()], exact=True)
        torch.testing.assert_close(found.double(), right, rtol=2e-2, atol=2e-2)


def test_a_large_mean_does_not_cancel():
    fused = FusedLinear("float32", 64, (32,), Epilogue.plain(1, torch.float32), Norm("layer", 1e-5))
    x, weights, extras = operands(fused, 3)
    x += 1000.0
    exact = reference(fused, x.double(), wide(weights), wide(extras), exact=True)[0]
    eager = reference(fused, x, weights, extras)[0]
    for config in (CONFIGS["gemv"](3), CONFIGS["flat"](3)):
        (found,) = run(fused, x, weights, extras, config)
        assert (found - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-6


def test_sliced_and_strided_operands_give_the_same_bits():
    fused = FusedLinear("float16", 50, (37,), residual("float16"))
    x, weights, (bias, added) = operands(fused, 3)
    plain = run(fused, x, weights, [bias, added], CONFIGS["flat"](3))[0]
    store = torch.full((40, 80), float("nan"), dtype=torch.float16)
    store[2:39, 10:60] = weights[0]
    wide_x = torch.full((3, 64), float("nan"), dtype=torch.float16)
    wide_x[:, :50] = x
    sliced = run(fused, wide_x[:, :50], [store[2:39, 10:60]], [bias, added.t().contiguous().t()], CONFIGS["flat"](3))[0]
    assert torch.equal(plain, sliced)


def test_leading_dimensions_are_kept_and_no_rows_give_no_rows():
    fused = FusedLinear("float32", 50, (37,), residual("float32"))
    x, weights, (bias, added) = operands(fused, 6)
    flat = run(fused, x, weights, [bias, added], CONFIGS["flat"](6))[0]
    cubed = run(fused, x.view(2, 3, 50), weights, [bias, added.view(2, 3, 37)], CONFIGS["flat"](6))[0]
    assert torch.equal(cubed, flat.view(2, 3, 37))
    empty = run(fused, x[:0], weights, [bias, added[:0]])[0]
    assert empty.shape == (0, 37)


def test_weights_changed_in_place_are_seen_and_never_written():
    fused = FusedLinear("float32", 50, (37,), Epilogue.plain(1, torch.float32))
    x, weights, _ = operands(fused, 2)
    before = weights[0].clone()
    first = run(fused, x, weights, [], CONFIGS["gemv"](2))[0]
    assert torch.equal(weights[0], before)
    weights[0].mul_(2.0)
    torch.testing.assert_close(run(fused, x, weights, [], CONFIGS["gemv"](2))[0], 2 * first)


def test_split_sums_do_not_depend_on_the_batch():
    fused = FusedLinear("float16", 130, (37,), Epilogue.plain(1, torch.float16), Norm("rms", 1e-6))
    x, weights, extras = operands(fused, 16)
    together = run(fused, x, weights, extras, CONFIGS["split"](16))[0]
    alone = run(fused, x[4:5], weights, extras, CONFIGS["split"](1))[0]
    assert torch.equal(together[4:5], alone)


def test_default_configuration_runs():
    fused = FusedLinear("float16", 50, (37, 37), gate("float16"), Norm("rms", 1e-6))
    for m in (1, 3):
        check(fused, m, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, w, e: (x.half(), w, e), "mixed dtypes"),
        (lambda x, w, e: (x, [w[0].half()], e), "mixed dtypes"),
        (lambda x, w, e: (x[:, :49], w, e), "last dimension"),
        (lambda x, w, e: (x, [w[0].t().contiguous().t()], e), "rows that lie together"),
        (lambda x, w, e: (x, [w[0].to("meta")], e), "another operand on meta"),
        (lambda x, w, e: (x, [w[0][:36]], e), r"should be \[37, 50\]"),
        (lambda x, w, e: (x, w, e[:1]), "1 extras"),
        (lambda x, w, e: (x, w, [e[0].half(), e[1]]), "described with float32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, reason):
    fused = FusedLinear("float32", 50, (37,), residual("float32"))
    with pytest.raises(Unsupported, match=reason):
        run(fused, *change(*operands(fused, 2)), CONFIGS["flat"](2))


SAFE = {
    "add": 2, "sub": 2, "mul": 2, "maximum": 2, "minimum": 2, "neg": 1, "abs": 1, "square": 1, "erf": 1, "sigmoid": 1,
    "tanh": 1, "relu": 1, "silu": 1, "gelu": 1, "gelu_tanh": 1, "leaky_relu": 2, "clamp_min": 2, "clamp_max": 2,
    "sin": 1, "cos": 1,
}  # fmt: skip


@st.composite
def epilogues(draw):
    """Random DAGs over one or two products, with every layout, casts, comparisons and several outputs."""
    dtype = draw(st.sampled_from(["float16", "float32"]))
    products = draw(st.integers(1, 2))
    layouts = draw(st.lists(st.sampled_from(["full", "column", "row", "scalar"]), max_size=3))
    extras = tuple(Extra(f"e{i}", layout, dtype) for i, layout in enumerate(layouts))
    names = [f"p{i}" for i in range(products)] + [e.name for e in extras]
    steps = [Step("s0", "add", ("p0", f"p{products - 1}"), "join")]
    chain = "s0"
    for index in range(1, draw(st.integers(2, 6))):
        pool = [*names, *(s.name for s in steps if s.op != "lt")]
        op = draw(st.sampled_from([*SAFE, "cast", "where"]))
        other = draw(st.sampled_from(pool) | st.floats(-2, 2, allow_nan=False, width=16))
        name = f"s{len(steps)}"
        if op == "cast":
            steps.append(Step(name, "cast", (chain,), "to", draw(st.sampled_from(["float16", "float32"]))))
        elif op == "where":
            steps.append(Step(name, "lt", (chain, other), "compare"))
            name = f"s{len(steps)}"
            steps.append(Step(name, "where", (steps[-1].name, 0.5, 0.25), "choose"))
            chain_next = f"s{len(steps)}"
            steps.append(Step(chain_next, "mul", (chain, name), f"use{index}"))
            name = chain_next
        elif op == "leaky_relu":
            steps.append(Step(name, op, (chain, 0.125), "act"))
        elif op.startswith("clamp"):
            steps.append(Step(name, op, (chain, draw(st.floats(-1, 1, width=16))), "clamp"))
        elif op in ("maximum", "minimum"):
            steps.append(Step(name, op, (chain, draw(st.sampled_from(names[:products]))), op))
        else:
            steps.append(Step(name, op, (chain, other)[: SAFE[op]], op))
        chain = name
    outputs = [Output(chain, dtype)]
    if draw(st.booleans()):
        outputs.append(Output("s0", "float32"))
    drawn = Epilogue(products, tuple(outputs), tuple(steps))
    read = set().union(*(drawn.reach(i) for i in range(len(outputs))))
    return dtype, products, replace(drawn, extras=tuple(e for e in extras if e.name in read))


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(epilogues(), st.sampled_from(NORMS), st.sampled_from(list(CONFIGS)), st.sampled_from([1, 3, 17]))
def test_random_epilogues(drawn, norm, family, m):
    dtype, products, epilogue = drawn
    fused = FusedLinear(dtype, 34, (21,) * products, epilogue, norm)
    assert FusedLinear.decode(fused.encode()) == fused
    x, weights, extras = operands(fused, m)
    found = run(fused, x, weights, extras, CONFIGS[family](m))
    # float32 arithmetic on the same inputs: comparisons may flip at a tie that float64 breaks otherwise.
    exact = reference(fused, x.double(), wide(weights), wide(extras), exact=True)
    for got, right in zip(found, exact, strict=True):
        scale = right.abs().max().clamp_min(1.0)
        # Each of few steps may multiply the products' rounding error; a flipped comparison halves a few values.
        bound = 0.05 if "float16" in (dtype, *(s.dtype for s in epilogue.steps)) else 1e-4
        far = (got.double() - right).abs() > bound * scale
        assert far.float().mean() < 0.03, (epilogue, (got.double() - right).abs().max(), scale)


@st.composite
def prologues(draw, dtype):
    """Random chains from x on, with every layout and casts: what pointwise nodes before a linear become."""
    layouts = draw(st.lists(st.sampled_from(["full", "column", "row", "scalar"]), max_size=3))
    extras = tuple(Extra(f"q{i}", layout, dtype) for i, layout in enumerate(layouts))
    steps, chain = [], "p0"
    for index in range(draw(st.integers(1, 4))):
        op = draw(st.sampled_from(["add", "mul", "silu", "gelu", "tanh", "exp", "neg", "cast"]))
        other = draw(st.sampled_from(["p0", *(e.name for e in extras)]) | st.floats(-2, 2, width=16))
        if op == "exp":  # of something small: one and not zero where a tile lies outside of x
            steps.append(Step(f"t{len(steps)}", "tanh", (chain,), "squash"))
            chain = steps[-1].name
        name = f"t{len(steps)}"
        if op == "cast":
            steps.append(Step(name, op, (chain,), op, draw(st.sampled_from([dtype, "float32"]))))
        else:
            steps.append(Step(name, op, (chain, other) if op in ("add", "mul") else (chain,), f"{op}_{index}"))
        chain = name
    drawn = Epilogue(1, (Output(chain, dtype),), tuple(steps), extras)
    read = drawn.reach(0)
    return replace(drawn, extras=tuple(e for e in extras if e.name in read))


def check_near(fused, m, config):
    """One output of a group at m rows, against float64 and against what eager rounds."""
    x, weights, extras = operands(fused, m)
    (found,) = run(fused, x, weights, extras, config)
    (exact,) = reference(fused, x.double(), wide(weights), wide(extras), exact=True)
    (eager,) = reference(fused, x, weights, extras)
    scale = exact.abs().max().clamp_min(1.0)
    off, peer = (found.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    # Eager rounds after every node and the kernel once, so the kernel is as near, but for luck with a single rounding.
    assert off <= 2 * peer + (5e-3 if fused.dtype == "float16" else 1e-5) * scale, (fused, off, peer)


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(["float16", "float32"]), st.sampled_from(NORMS), st.sampled_from(list(CONFIGS)))
def test_random_prologues(data, dtype, norm, family):
    before = data.draw(prologues(dtype))
    m = data.draw(st.sampled_from([1, 3, 17]))
    fused = FusedLinear(dtype, 34, (21,), residual(dtype), norm, before)
    assert FusedLinear.decode(fused.encode()) == fused
    check_near(fused, m, CONFIGS[family](m))


ONE_INPUT = sorted(name for name, op in OPERATIONS.items() if op.arity == 1 and not op.takes_boolean)


def test_every_operation_of_the_table():
    """All operations in one kernel: each has an output of its own, on values where it is defined."""
    steps, outputs = [], []

    def step(op, *args, dtype=""):
        steps.append(Step(f"s{len(steps)}", op, args, op, dtype))
        return steps[-1].name

    positive = step("add", step("abs", "p0"), 0.5)
    for op in ONE_INPUT:
        outputs.append(step(op, positive if op in ("log", "sqrt", "rsqrt", "reciprocal") else "p0"))
    for op in ("add", "sub", "mul", "div", "maximum", "minimum", "clamp_min", "clamp_max", "leaky_relu"):
        outputs.append(step(op, "p0", 0.3 if op == "leaky_relu" else positive))
    for op in ("lt", "le", "gt", "ge", "eq", "ne"):
        truth = step(op, "p0", "e0")
        both = step("logical_and", truth, step("logical_or", "e1", step("logical_not", truth)))
        outputs.append(step("where", both, "p0", 7.0))
    outputs.append(step("cast", "e1", dtype="float32"))
    outputs[-1] = step("mul", outputs[-1], "p0")
    used = {s.op for s in steps}
    assert used >= set(OPERATIONS), set(OPERATIONS) - used
    extras = (Extra("e0", "column", "float32"), Extra("e1", "full", "bool"))
    epilogue = Epilogue(1, tuple(Output(o, "float32") for o in outputs), tuple(steps), extras)
    fused = FusedLinear("float32", 34, (21,), epilogue)
    x, weights, extras = operands(fused, 3)
    exact = reference(fused, x.double(), wide(weights), wide(extras), exact=True)
    for name, got, right in zip(outputs, run(fused, x, weights, extras, CONFIGS["flat"](3)), exact, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_nan_and_infinity_pass_through_as_in_torch():
    ops = ("relu", "clamp_min", "clamp_max", "maximum", "minimum", "leaky_relu")
    steps = tuple(Step(f"s{i}", op, ("e0",) if op == "relu" else ("e0", "p0" if op[0] == "m" else 0.5), op)
                  for i, op in enumerate(ops))  # fmt: skip
    tied = tuple(Step(f"t{i}", "add", (s.name, "p0"), "join") for i, s in enumerate(steps))
    outputs = tuple(Output(s.name, "float32") for s in tied)
    fused = FusedLinear("float32", 4, (3,), Epilogue(1, outputs, steps + tied, (Extra("e0", "full", "float32"),)))
    values = torch.tensor([[float("nan"), float("inf"), float("-inf")]])
    x, w = torch.ones(1, 4), torch.full((3, 4), 0.25)
    for op, got, right in zip(ops, run(fused, x, [w], [values], CONFIGS["flat"](1)), reference(fused, x, [w], [values]),
                              strict=True):  # fmt: skip
        assert torch.equal(got.isnan(), right.isnan()), op
        assert torch.equal(got.nan_to_num(), right.nan_to_num()), op


class Traffic:
    """Counts the bytes of distinct addresses that a kernel loads and stores, by watching the interpreter."""

    def __init__(self, monkeypatch):
        from triton.runtime import interpreter

        self.read: dict[int, int] = {}
        self.written: dict[int, int] = {}
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def note(place, ptrs, mask):
            size = ptrs.dtype.element_ty.primitive_bitwidth // 8
            for address in ptrs.data[mask.data.astype(bool)].ravel().tolist():
                place[address] = size

        def loaded(this, ptrs, mask, *rest):
            note(self.read, ptrs, mask)
            return load(this, ptrs, mask, *rest)

        def stored(this, ptrs, value, mask, *rest):
            note(self.written, ptrs, mask)
            return store(this, ptrs, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", loaded)
        monkeypatch.setattr(builder, "create_masked_store", stored)

    @property
    def bytes(self):
        return sum(self.read.values()) + sum(self.written.values())


@pytest.mark.parametrize("family", ["gemv", "flat", "swap"])
@pytest.mark.parametrize("group", list(GROUPS))
def test_bytes_of_the_roofline_are_those_the_kernel_touches(monkeypatch, family, group):
    widths, epilogue = GROUPS[group]("float16")
    norm = {"residual": None, "gate": Norm("rms", 1e-6), "qkv": Norm("layer", 1e-5, beta=True)}[group]
    fused = FusedLinear("float16", 50, widths, epilogue, norm)
    gating = (Step("t0", "silu", ("p0",), "act"), Step("t1", "mul", ("t0", "q0"), "gate"))
    before = Epilogue(1, (Output("t1", "float16"),), gating, (Extra("q0", "full", "float16"),))
    for m, group_of in ((1, fused), (5, replace(fused, prologue=before))):
        x, weights, extras = operands(group_of, m)
        with monkeypatch.context() as patch:
            traffic = Traffic(patch)
            run(group_of, x, weights, extras, CONFIGS[family](m))
        assert traffic.bytes == roofline.fused_linear(group_of).at(M=m)[1]
