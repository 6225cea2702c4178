"""The C++ linear against float64, its bits, what it leaves to the library, and the operator around it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fxopt.codegen.kernels import cpu_attention, cpu_linear, cpu_vectors
from fxopt.codegen.ops.attention import TOLERANCE as OF_ATTENTION
from fxopt.codegen.ops.attention import attention, sample_inputs
from fxopt.codegen.ops.cpu_linear import TOLERANCE

OP = torch.ops.fxopt.cpu_linear.default


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Uninitialised memory is NaN, so that a result which depends on it shows; small weights count as large."""
    monkeypatch.setattr(cpu_linear, "LEAST_BYTES", 0)
    cpu_linear._call.cache_clear()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    cpu_linear._call.cache_clear()


def tensors(rows, width, depth, dtype=torch.float32, bias=True, seed=0):
    """x, weight and bias, of outputs with unit variance."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(rows, depth, generator=generator), torch.randn(width, depth, generator=generator) / depth**0.5)
    return *(t.to(dtype) for t in made), torch.randn(width, generator=generator).to(dtype) if bias else None


def check(x, weight, bias):
    """The kernel's own result (fails where the library would have run), against float64."""
    out = cpu_linear.run(x, weight, bias)
    assert out is not None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)
    return out


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 17, 24])
def test_rows_and_odd_sizes(rows):
    for width, depth in ((1, 1), (7, 5), (97, 33), (193, 1025), (64, 2048), (100, 3000)):
        check(*tensors(rows, width, depth))
        check(*tensors(rows, width, depth, bias=False))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_bfloat16_is_as_close_as_the_library(rows):
    for width, depth in ((33, 70), (96, 1030), (200, 4096)):
        x, weight, bias = tensors(rows, width, depth, torch.bfloat16)
        exact = F.linear(x.double(), weight.double(), bias.double())
        own = (check(x, weight, bias).double() - exact).abs().max()
        assert own <= (F.linear(x, weight, bias).double() - exact).abs().max() * 1.01


def test_float32_is_as_close_as_the_library():
    for rows in (1, 8):
        x, weight, _ = tensors(rows, 300, 8192)
        exact = F.linear(x.double(), weight.double())
        own, library = ((out - exact).abs().mean() for out in (check(x, weight, None), F.linear(x, weight)))
        assert own <= library * 1.01


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(1, 200), st.integers(1, 2100), st.booleans())
def test_any_size(rows, width, depth, bias):
    check(*tensors(rows, width, depth, bias=bias, seed=rows))


def turned(x, weight, bias):
    """The same with the weight stored [K, N], as GPT-2 does."""
    return x, weight.t().contiguous().t(), bias


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stored_by_columns(rows, dtype):
    for width, depth in ((2, 2), (7, 5), (97, 33), (193, 1025), (1025, 300), (2304, 257)):
        check(*turned(*tensors(rows, width, depth, dtype)))
        check(*turned(*tensors(rows, width, depth, dtype, bias=False)))


def test_weights_stored_by_columns_are_as_close_as_the_library():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = turned(*tensors(5, 300, 3072, dtype))
        exact = F.linear(x.double(), weight.double(), bias.double())
        own, library = ((out - exact).abs().mean() for out in (check(x, weight, bias), F.linear(x, weight, bias)))
        assert own <= library * 1.01


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(2, 1200), st.integers(2, 600), st.booleans())
def test_any_size_by_columns(rows, width, depth, bias):
    check(*turned(*tensors(rows, width, depth, bias=bias, seed=rows)))


def test_by_columns_a_row_depends_on_no_other_row_and_no_thread_bit_for_bit():
    x, weight, bias = turned(*tensors(8, 2500, 700))
    before = torch.get_num_threads()
    whole = check(x, weight, bias)
    sliced = torch.full((700, 3000), float("nan"))[:, :2500].copy_(weight.t()).t()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (1, 3, 8):
                assert torch.equal(cpu_linear.run(x[:rows], weight, bias), whole[:rows])
            assert torch.equal(cpu_linear.run(x, sliced, bias), whole)
    finally:
        torch.set_num_threads(before)


def test_by_columns_numbers_that_are_none_stay_in_their_row():
    x, weight, bias = turned(*tensors(5, 40, 70))
    x[2, 69] = float("nan")
    out = cpu_linear.run(x, weight, bias)
    assert torch.isfinite(out[[0, 1, 3, 4]]).all()
    assert out[2].isnan().all()


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_width_of_register(lanes, monkeypatch):
    """The text for the registers of other machines computes the same here, if not as fast."""
    caches = cpu_linear.compiled, cpu_linear.compiled_turned, cpu_attention.compiled, cpu_attention._call
    monkeypatch.setattr(cpu_vectors, "lanes", lambda: lanes)
    monkeypatch.setattr(cpu_linear, "lanes", lambda: lanes)
    for cache in caches:
        cache.cache_clear()
    try:
        assert f"#define LANES {lanes}\n" in cpu_linear.source(cpu_linear.variant_of(torch.float32, 5))
        for rows in (1, 5, 11):
            check(*tensors(rows, 97, 1041))
        check(*tensors(3, 97, 1041, torch.bfloat16))
        for dtype in cpu_linear.MOST_ROWS:
            check(*turned(*tensors(3, 97, 1041, dtype)))
        for extra in ({}, {"soft_cap": 5.0}, {"sinks": torch.linspace(-4.0, 4.0, 8)}):
            inputs = sample_inputs(length=600, filled=555, tokens=2) | extra
            given_ = {"extent": None, "sinks": None, "is_causal": False, "soft_cap": 0.0} | inputs
            ordered = [given_.pop(name) for name in ("query", "key", "value", "mask", "extent", "sinks")]
            out = cpu_attention.run(*ordered, **given_)
            exact = {n: t.double() if getattr(t, "dtype", None) == torch.float32 else t for n, t in inputs.items()}
            tolerance = OF_ATTENTION[torch.float32]
            torch.testing.assert_close(out.double(), attention(**exact), atol=tolerance, rtol=tolerance)
    finally:
        for cache in caches:
            cache.cache_clear()


def test_a_row_depends_on_no_other_row_and_no_thread_bit_for_bit():
    x, weight, bias = tensors(24, 301, 2500)
    before = torch.get_num_threads()
    whole = check(x, weight, bias)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 4, 7, 8, 13, 24):
                assert torch.equal(cpu_linear.run(x[:rows], weight, bias), whole[:rows])
        assert torch.equal(cpu_linear.run(x[5:6], weight, bias), whole[5:6])
        assert torch.equal(cpu_linear.run(x, weight[:97], bias[:97]), whole[:, :97])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_in_their_row_and_column(number):
    x, weight, bias = tensors(5, 40, 70)
    x[2, 69] = number
    out = cpu_linear.run(x, weight, bias)
    torch.testing.assert_close(out, F.linear(x, weight, bias), equal_nan=True)
    assert torch.isfinite(out[[0, 1, 3, 4]]).all()
    assert not torch.isfinite(out[2]).any()


def test_strides():
    x, weight, bias = tensors(6, 50, 90)
    expected = check(x, weight, bias)
    spread = torch.full((6, 200), float("nan"))[:, 10:100].copy_(x)
    sliced = torch.full((50, 300), float("nan"))[:, :90].copy_(weight)
    for rows in (spread, x.view(2, 3, 90), spread.view(6, 1, 90), x.view(1, 6, 1, 90)):
        for own in (weight, sliced):
            assert torch.equal(cpu_linear.run(rows, own, bias).view(6, 50), expected)
    assert torch.equal(cpu_linear.run(x[0], weight, bias), expected[0])


def refusals():
    x, weight, bias = tensors(4, 8, 16)
    return {
        "25 rows": (torch.zeros(25, 16), weight, bias),
        "5 rows": (torch.zeros(5, 16, dtype=torch.bfloat16), weight.bfloat16(), bias.bfloat16()),
        "float64": (x.double(), weight.double(), bias.double()),
        "bfloat16 by float32": (x.bfloat16(), weight, bias),
        r"x \[4, 16\] by \[8, 15\]": (x, weight[:, :15].contiguous(), bias),
        r"by \[8, 16\]": (x, weight, bias[:7]),
        "of the weight": (x, torch.zeros(8, 32)[:, ::2], bias),
        "9 rows": (torch.zeros(9, 16), weight.t().contiguous().t(), bias),
        "of x": (x.t().contiguous().t(), weight, bias),
        r"strides \[16, 1\]": (x[:0], weight, bias),
    }


@pytest.mark.parametrize("reason", refusals())
def test_what_the_library_keeps(reason):
    import re

    given_ = refusals()[reason]
    said = cpu_linear.refused(*given_)
    assert said is not None and re.search(reason, said.reason), said
    assert cpu_linear.run(*given_) is None


def test_the_operator_runs_the_library_for_what_is_refused():
    for given_ in refusals().values():
        try:
            expected = F.linear(*given_)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                OP(*given_)
        else:
            torch.testing.assert_close(OP(*given_), expected)


def test_small_weights_are_left(monkeypatch):
    monkeypatch.setattr(cpu_linear, "LEAST_BYTES", 4 * 64 * 64 + 1)
    x, weight, bias = tensors(1, 64, 64)
    assert "16 kB of weights are too few" in cpu_linear.refused(x, weight, bias).reason
    assert cpu_linear.run(x, weight, bias) is None


@pytest.mark.parametrize("shape", [(1, 1, 40), (3, 40), (40,), (2, 30, 40)])
def test_opcheck(shape):
    weight, bias = torch.randn(17, 40), torch.randn(17)
    torch.library.opcheck(OP, (torch.randn(shape), weight, bias))
    torch.library.opcheck(OP, (torch.randn(shape).mT.contiguous().mT if len(shape) > 1 else torch.randn(40), weight))


def test_shapes_that_do_not_fit():
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError, match=r"weight \(8, 15\)"):
        OP(*(mode.from_tensor(t) for t in (torch.zeros(2, 16), torch.zeros(8, 15))))


def test_without_a_compiler_the_library_runs_with_one_warning(monkeypatch):
    from fxopt.codegen import compat

    def refuse(*_):
        raise compat.KernelNotCompiled("no C++ compiler")

    monkeypatch.setattr(compat, "cpp_function", refuse)
    cpu_linear.compiled.cache_clear()
    x, weight, bias = tensors(2, 64, 64)
    try:
        with pytest.warns(UserWarning, match="no C\\+\\+ compiler.*PyTorch instead"):
            torch.testing.assert_close(OP(x, weight, bias), F.linear(x, weight, bias))
    finally:
        cpu_linear.compiled.cache_clear()
