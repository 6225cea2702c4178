"""The C++ decode kernel against the operator's meaning in float64, its bits, and what it leaves to PyTorch."""

from __future__ import annotations

import warnings

import pytest
import torch

from fxopt.codegen import compat
from fxopt.codegen.kernels import cpu_attention
from fxopt.codegen.kernels.cpu_attention import CpuAttention, chosen, compiled, source
from fxopt.codegen.ops.attention import TOLERANCE, attention, sample_inputs

OP = torch.ops.fxopt.attention.default


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory is NaN, so that a result which depends on it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(inputs):
    """The kernel's own result; fails where the body would have run."""
    given = {"mask": None, "extent": None, "sinks": None, "is_causal": False, "soft_cap": 0.0} | inputs
    tensors = [given.pop(name) for name in ("query", "key", "value", "mask", "extent", "sinks")]
    out = cpu_attention.run(*tensors, **given)
    assert out is not None
    return out


def check(inputs, tolerance=None):
    out = run(inputs)
    exact = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    tolerance = tolerance or TOLERANCE[inputs["query"].dtype]
    torch.testing.assert_close(out.double(), attention(**exact), atol=tolerance, rtol=tolerance)
    return out


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_head_dimensions_and_lengths(width):
    for length in (1, 63, 100, 512, 513, 1027):
        check(sample_inputs(length=length, width=width, filled=max(1, length - 3)))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens"), [(3, 3, 1), (4, 2, 1), (1, 1, 2), (6, 2, 1), (8, 2, 4), (7, 1, 2)]
)
@pytest.mark.parametrize("kind", ["bool", "-inf", "min", "none"])
def test_rows_and_masks(heads, kv_heads, tokens, kind):
    check(sample_inputs(heads=heads, kv_heads=kv_heads, tokens=tokens, length=300, filled=290, kind=kind))


def test_soft_cap_and_sinks():
    sinks = torch.linspace(-4.0, 4.0, 8)
    for extra in ({"soft_cap": 5.0}, {"sinks": sinks}, {"sinks": sinks, "soft_cap": 50.0}):
        check(sample_inputs(length=600, filled=555, tokens=2) | extra)


def test_large_and_small_scores():
    """Maxima far apart between blocks and splits, in both directions; a soft-cap at its ends."""
    inputs = sample_inputs(length=1100, kind="none")
    grows, falls = dict(inputs), dict(inputs)
    grows["key"] = inputs["key"] * torch.linspace(1.0, 300.0, 1100)[:, None]
    falls["key"] = grows["key"].flip(2)
    for case in (grows, falls, grows | {"soft_cap": 30.0}):
        check(case, 1e-3)  # scores of 1000 have 6e-5 of rounding in float32


def test_bfloat16():
    dtype = torch.bfloat16
    for extra in ({}, {"tokens": 2, "heads": 4}, {"soft_cap": 9.0}, {"kind": "min"}):
        cap = {"soft_cap": extra.pop("soft_cap")} if "soft_cap" in extra else {}
        inputs = sample_inputs(dtype=dtype, length=700, filled=650, **extra) | cap
        out = check(inputs)
        exact = attention(**{n: t.double() if getattr(t, "dtype", None) == dtype else t for n, t in inputs.items()})
        own = attention(**inputs).double()
        assert (out.double() - exact).abs().max() <= (own - exact).abs().max() + torch.finfo(dtype).eps


def test_value_width_of_its_own():
    inputs = sample_inputs(length=70)
    inputs["value"] = torch.randn(2, 2, 70, 48, generator=torch.Generator().manual_seed(1))
    assert check(inputs).shape == (2, 8, 1, 48)


def test_strides():
    inputs = sample_inputs(tokens=2, length=90, filled=80)
    permuted = dict(inputs)
    for name in ("query", "key", "value"):
        permuted[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    larger = torch.full((2, 2, 180, 32), float("nan"))
    permuted["key"] = larger[:, :, ::2, 16:].copy_(inputs["key"])
    per_head = inputs["mask"].expand(2, 8, 2, 90).clone()
    per_head[:, ::2, 1, 5:40] = False
    for mask in (inputs["mask"], per_head, per_head.mT.contiguous().mT, per_head[0, 0], per_head[..., :1]):
        expected = check(inputs | {"mask": mask})
        assert torch.equal(run(permuted | {"mask": mask}), expected)


def test_masks_with_nothing_in_them():
    inputs = sample_inputs(length=600)
    mask = torch.ones(2, 1, 1, 600, dtype=torch.bool)
    mask[1] = False
    mask[0, ..., :590] = False
    assert run(inputs | {"mask": mask, "extent": None})[1].abs().max() == 0
    check(inputs | {"mask": mask, "extent": None})
    check(inputs | {"mask": torch.full((2, 1, 1, 600), torch.finfo(torch.float32).min), "extent": None})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_stay_in_their_row(number):
    for name in ("query", "key", "value"):
        inputs = sample_inputs(length=40, kind="none")
        inputs[name] = inputs[name].clone()
        inputs[name][0, 0, -1, 3] = number
        got = run(inputs)
        torch.testing.assert_close(got, attention(**inputs), equal_nan=True, atol=2e-5, rtol=2e-5)
        assert torch.isfinite(got[1]).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_depends_on_nothing_else_bit_for_bit(threads):
    """Not on its batch, the unused cache behind it, the other tokens of the step or the number of threads."""
    whole = sample_inputs(batch=3, heads=4, kv_heads=2, tokens=1, length=1300, filled=1111, width=64)
    expected = run(whole)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = {n: t[1:2] if getattr(t, "ndim", 0) else t for n, t in whole.items()}
        assert torch.equal(run(alone), expected[1:2])
        assert torch.equal(run(whole | {"extent": torch.tensor(1300)}), expected)
        short = whole | {n: whole[n][:, :, :1111] for n in ("key", "value")} | {"mask": None, "extent": None}
        assert torch.equal(run(short), expected)
        several = whole | {"query": torch.cat([whole["query"], whole["query"] + 1.0, whole["query"]], 2)}
        got = run(several)
        assert torch.equal(got[:, :, :1], expected)
        assert torch.equal(got[:, :, 2:], expected)
    finally:
        torch.set_num_threads(before)


def test_what_is_left_to_pytorch():
    def variant(**shape):
        inputs = sample_inputs(**shape)
        return chosen(inputs["query"], inputs["key"], inputs["value"], is_causal=False, soft_cap=0.0)

    assert variant() == CpuAttention(torch.float32, 16, 16, 4, False)
    assert variant(width=24) is None
    assert variant(width=272) is None
    assert variant(dtype=torch.float64) is None
    assert variant(dtype=torch.float16) is None
    assert variant(tokens=5) is None  # 20 rows: more arithmetic than reading
    inputs = sample_inputs()
    tensors = [inputs[name] for name in ("query", "key", "value")]
    assert chosen(*tensors, is_causal=True, soft_cap=0.0) is None
    assert chosen(tensors[0], tensors[1].mT.contiguous().mT, tensors[2], is_causal=False, soft_cap=0.0) is None


@pytest.mark.parametrize("wrong", ["mask of another length", "mask of another batch", "sinks", "values", "empty"])
def test_what_does_not_fit_together_is_refused(wrong):
    inputs = sample_inputs(kind="none")
    if wrong.startswith("mask"):
        inputs["mask"] = torch.ones(2, 1, 1, 63) if "length" in wrong else torch.ones(3, 1, 1, 64)
    elif wrong == "sinks":
        inputs["sinks"] = torch.zeros(7)
    elif wrong == "values":
        inputs["value"] = inputs["value"][:, :, :50]
    else:
        inputs |= {"key": inputs["key"][:, :, :0], "value": inputs["value"][:, :, :0], "extent": torch.tensor(0)}
    with pytest.raises(RuntimeError):
        OP(**inputs)


def test_without_a_compiler(monkeypatch):
    """The same result from PyTorch, and one warning."""

    def refuse(types, text):
        raise compat.KernelNotCompiled("c++: not found")

    def forget():
        compiled.cache_clear()
        cpu_attention._call.cache_clear()

    monkeypatch.setattr(compat, "cpp_function", refuse)
    forget()
    inputs = sample_inputs(filled=20)
    try:
        with pytest.warns(UserWarning, match="c\\+\\+: not found.*runs in PyTorch"):
            out = OP(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(OP(**inputs), out)
    finally:
        forget()
    assert torch.equal(out, attention(**inputs))


def test_a_compiler_that_refuses():
    with pytest.raises(compat.KernelNotCompiled):
        compat.cpp_function(["const float*"], "this is no C++")


def test_the_source_says_what_it_is():
    text = source(CpuAttention(torch.bfloat16, 128, 64, 2, True))
    for line in ("cpu_attention_bfloat16_d128_64_t2_capped", "D = 128;", "DV = 64;", "TILE = 2;", "CAPPED = true;"):
        assert line in text
