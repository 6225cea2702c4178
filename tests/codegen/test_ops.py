"""The semantic operator against float64, its fake and registration, and that it reads no further than its extent."""

from __future__ import annotations

import pytest
import torch

import fxopt.codegen.ops.attention as module
from fxopt.codegen.ops.attention import TOLERANCE, attention, pack_mask, read_extent, sample_inputs

OP = torch.ops.fxopt.attention.default


def reference(query, key, value, mask=None, extent=None, sinks=None, *, scale, is_causal=False, soft_cap=0.0):
    """float64, KV heads repeated, every key read."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., : k.shape[2]]
    return weights @ v


def close(inputs, **changes):
    given = inputs | changes
    query, key, value = given.pop("query"), given.pop("key"), given.pop("value")
    out = OP(query, key, value, **given)
    expected = reference(query, key, value, **given)
    assert out.dtype == query.dtype
    assert out.shape == expected.shape
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    return out


@pytest.mark.parametrize("kind", ["bool", "-inf", "min", "none"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 4), (7, 1)])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_against_float64(kind, heads, kv_heads, tokens):
    for width, length in ((16, 63), (80, 100)):
        close(
            sample_inputs(
                heads=heads, kv_heads=kv_heads, tokens=tokens, length=length, width=width, kind=kind, filled=40
            )
        )


@pytest.mark.parametrize(("width", "value_width"), [(1, 1), (7, 7), (80, 80), (96, 33)])
def test_odd_head_dimensions(width, value_width):
    inputs = sample_inputs(width=width, filled=20)
    value = torch.randn(2, 2, 64, value_width, generator=torch.Generator().manual_seed(9))
    assert close(inputs, value=value).shape == (2, 8, 1, value_width)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    close(sample_inputs(dtype=dtype, filled=30))
    close(sample_inputs(dtype=dtype, filled=30, tokens=4, kind="-inf"), soft_cap=20.0)


def test_soft_cap_sinks_and_a_bias_per_head():
    sinks = torch.randn(8)
    close(sample_inputs(filled=30, tokens=2), soft_cap=5.0)
    close(sample_inputs(filled=30, tokens=2), sinks=sinks)
    close(sample_inputs(filled=30, tokens=2, kind="min"), soft_cap=5.0, sinks=sinks)
    alibi = -torch.rand(8, 1, 1) * torch.arange(64)
    close(sample_inputs(tokens=3, kind="none"), mask=alibi)
    close(sample_inputs(tokens=3, kind="none"), mask=torch.randn(2, 8, 3, 64))


def test_causal_and_a_mask_of_another_dtype():
    close(sample_inputs(tokens=64, kind="none"), is_causal=True)
    close(sample_inputs(tokens=3, kind="none"), is_causal=True)
    close(sample_inputs(tokens=3, kind="bool"), is_causal=True)
    mask = torch.zeros(2, 1, 1, 64).masked_fill(torch.arange(64) > 20, torch.finfo(torch.float32).min)
    close(sample_inputs(dtype=torch.bfloat16, kind="none"), mask=mask)


@pytest.mark.parametrize("window", [1, 7, 64, 100, 999])
@pytest.mark.parametrize("extra", [{}, {"soft_cap": 6.0}, {"sinks": torch.arange(8.0)}])
def test_a_causal_window_block_by_block(window, extra, monkeypatch):
    monkeypatch.setattr(module, "SMALLEST_BLOCK", 16)
    monkeypatch.setattr(module, "LARGEST_BLOCK", 32)
    inputs = sample_inputs(tokens=150, length=150, kind="none")
    place = torch.arange(150)
    seen = (place <= place[:, None]) & (place > place[:, None] - window)
    got = attention(**inputs, is_causal=True, window=window, **extra)
    torch.testing.assert_close(got, attention(**inputs | {"mask": seen}, **extra), atol=1e-5, rtol=1e-5)
    expected = reference(**{k: v for k, v in inputs.items() if k != "mask"}, mask=seen, **extra)
    assert (got.double() - expected).abs().max() < TOLERANCE[torch.float32]
    ones = torch.ones(150, 150, dtype=torch.bool)
    whole = attention(**inputs | {"mask": ones}, is_causal=True, window=window, **extra)
    torch.testing.assert_close(whole, got, atol=1e-5, rtol=1e-5)


def test_a_row_with_nothing_unmasked_is_zero():
    inputs = sample_inputs(filled=30)
    inputs["mask"] = inputs["mask"].clone()
    inputs["mask"][1] = False
    inputs["extent"] = read_extent(inputs["mask"])
    assert int(inputs["extent"]) == 64
    assert close(inputs)[1].abs().max() == 0
    assert close(inputs, soft_cap=9.0)[1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "body"])
@pytest.mark.parametrize("kind", ["bool", "min", "none"])
def test_rows_of_extent_zero_read_nothing(kind, dtype):
    """Their keys and values are NaN, their results zero; the other rows get what they get alone, each to its extent."""
    filled = 64 if kind == "none" else 30
    inputs = sample_inputs(batch=4, filled=filled, kind=kind, dtype=dtype)
    ends = torch.tensor([filled, 0, 64, 0])
    given = inputs | {name: inputs[name].clone() for name in ("key", "value")} | {"extent": ends}
    for name in ("key", "value"):
        given[name][1] = given[name][3] = float("nan")
    out = OP(**given)
    assert out[1].abs().max() == out[3].abs().max() == 0
    for row in (0, 2):
        alone = {n: v[row : row + 1] if getattr(v, "ndim", 0) else v for n, v in inputs.items()}
        torch.testing.assert_close(out[row : row + 1], OP(**alone), atol=1e-6, rtol=1e-6)
    assert OP(**given | {"extent": torch.zeros(4, dtype=torch.int64)}).abs().max() == 0
    torch.testing.assert_close(OP(**inputs | {"extent": ends.clamp(min=filled)}), OP(**inputs), atol=1e-6, rtol=1e-6)


def test_nothing_beyond_the_extent_is_read():
    inputs = sample_inputs(filled=30)
    expected = attention(**inputs)
    for name in ("key", "value"):
        inputs[name] = inputs[name].clone()
        inputs[name][:, :, 30:] = float("nan")
    assert torch.equal(attention(**inputs), expected)
    assert attention(**inputs | {"extent": None}).isnan().any()


@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_off_the_cpu_no_value_is_read_on_the_host(tokens):
    """The meta device has no values: asking for one fails."""
    inputs = sample_inputs(tokens=tokens, filled=64)
    given = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    assert given["extent"].is_meta
    assert attention(**given).shape == attention(**inputs).shape
    assert attention(**given | {"extent": given["extent"].expand(2)}).shape == attention(**inputs).shape


def test_rows_of_different_padding():
    mask = torch.arange(64) < torch.tensor([5, 41])[:, None, None, None]
    mask[0, ..., :2] = False
    close(sample_inputs(), mask=mask, extent=read_extent(mask))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(
    "extra", [{}, {"soft_cap": 8.0}, {"sinks": torch.randn(8)}, {"extent": torch.tensor([20, 0])}]
)
def test_opcheck(permuted, extra):
    inputs = sample_inputs(tokens=3, filled=20) | extra
    tensors = [inputs.pop(name) for name in ("query", "key", "value")]
    if permuted:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
        tensors[1] = tensors[1].mT.contiguous().mT
    torch.library.opcheck(OP, tuple(tensors), inputs)


@pytest.mark.parametrize("tokens", [1, 5])
def test_strides_are_what_the_fake_says(tokens):
    inputs = sample_inputs(tokens=tokens, filled=20)
    real = OP(**inputs)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = OP(**{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
    assert real.stride() == fake.stride()
    assert real.shape == fake.shape


def test_heads_that_do_not_divide():
    inputs = sample_inputs(heads=8, kv_heads=3)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError, match="8 query heads do not divide"):
        OP(**{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})


def test_packing_a_mask_is_a_view_for_one_token():
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    assert pack_mask(mask, 2, 4, 1).data_ptr() == mask.data_ptr()
    per_head = torch.randn(2, 8, 3, 9)
    packed = pack_mask(per_head, 2, 4, 3)
    assert torch.equal(packed[1, 1, 2 * 3 + 1], per_head[1, 1 * 4 + 2, 1])
