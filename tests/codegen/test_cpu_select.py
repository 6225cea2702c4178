"""The C++ kernels that choose what sparse attention reads, against float64 and against sorting by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxopt.codegen.ops.sparse_select
import fxopt.codegen.ops.sparse_state  # noqa: F401
from fxopt.codegen.kernels import cpu_select
from fxopt.codegen.ops.sparse_state import restored

OPS = torch.ops.fxopt


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_bounds_of_pages(kept, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    key, query = torch.randn(2, 2, 121, 32, generator=generator), torch.randn(2, 10, 1, 32, generator=generator)
    bounds, filled = torch.zeros(2, 2, 8, 64, dtype=kept), torch.tensor(-1)
    stepped, known = torch.zeros(2, 2, 8, 64, dtype=kept), torch.tensor(-1)
    extent = torch.tensor(100)
    OPS.update_page_bounds(bounds, filled, key, extent, page=16)
    for end in range(90, 101):
        OPS.update_page_bounds(stepped, known, key, torch.tensor(end), page=16)
    assert torch.equal(bounds, stepped)
    scores = OPS.page_scores(query, bounds, extent, page=16)
    exact = torch.einsum("bkgd,bksd->bkgs", query.view(2, 2, 5, 32), key).amax(2)[..., :100]
    for page in range(7):
        assert (scores[:, :, page] >= exact[..., page * 16 : page * 16 + 16].amax(-1) - 1e-5).all()
    assert (scores[:, :, 7:] == -torch.inf).all()
    monkeypatch.setattr(cpu_select, "page_bounds", lambda *_: None)
    torch.testing.assert_close(OPS.page_scores(query, bounds, extent, page=16), scores, atol=1e-4, rtol=1e-5)


SCORES = [  # batch, KV heads, group, length, filled, head_dim, channels (None: all)
    (2, 2, 4, 4224, 4100, 64, 8),
    (1, 3, 5, 256, 201, 16, 3),
    (2, 1, 1, 384, 1, 32, None),
    (1, 2, 2, 128, 128, 128, 5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("case", SCORES)
def test_scores_of_tokens(case, bits, dtype, monkeypatch):
    batch, kv_heads, group, length, filled, width, count = case
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(batch, kv_heads * group, 1, width, generator=generator).to(dtype)
    key = torch.randn(batch, kv_heads, length, width, generator=generator).to(dtype)
    key[:, :, filled:] = torch.nan  # nothing of what is not filled is read
    chosen = None
    if count is not None:
        chosen = torch.stack([torch.randperm(width, generator=generator)[:count] for _ in range(kv_heads)])
    kept = torch.int8 if bits == 8 else torch.uint8 if bits == 4 else dtype
    features = torch.zeros(batch, kv_heads, count or width, length // (2 if bits == 4 else 1), dtype=kept)
    scales = torch.zeros(batch, kv_heads, count or width, -(-length // cpu_select.QUANTUM)) if bits else None
    extent = torch.tensor(filled)
    OPS.update_features(features, torch.tensor(-1), key, extent, chosen, scales, bits=bits)
    found = OPS.feature_scores(query, features, extent, chosen, scales, bits=bits)
    grouped = query.view(batch, kv_heads, group, width).double()
    for b in range(batch):
        for h in range(kv_heads):
            listed = restored(features[b, h], None if scales is None else scales[b, h], filled, bits).double()
            q = grouped[b, h] if chosen is None else grouped[b, h][:, chosen[h]]
            expected = (q @ listed).amax(0)
            torch.testing.assert_close(found[b, h, :filled].double(), expected, atol=2e-5, rtol=2e-5)
    assert (found[..., filled:] == -torch.inf).all()
    assert (OPS.feature_scores(query, features, extent, chosen, scales, least=filled, bits=bits) == -torch.inf).all()
    monkeypatch.setattr(cpu_select, "feature_scores", lambda *_: None)
    again = OPS.feature_scores(query, features, extent, chosen, scales, bits=bits)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[..., :filled], again[..., :filled], atol=tolerance, rtol=tolerance)


def best_by_hand(scores, bias, used, count):
    """Sorted by descending sum, those that come first among equal ones; then by place. NaN is above everything."""
    pairs = zip(scores, bias, strict=False)  # there may be more scores
    sums = [(math.inf if math.isnan(s) else s + b, math.isnan(s), j) for j, (s, b) in enumerate(pairs)]
    seen = [entry for entry in sums[:used] if entry[0] != -math.inf]
    taken = sorted(seen, key=lambda entry: (not entry[1], -entry[0], entry[2]))[:count]
    return sorted(j for *_, j in taken)


NUMBER = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, math.inf, -math.inf, math.nan]),
    st.floats(-100, 100, width=32),
    st.integers(-3, 3).map(float),
)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), used=st.integers(1, 40), extra=st.integers(0, 5), count=st.integers(1, 50))
def test_the_best(data, used, extra, count):
    scores = data.draw(st.lists(NUMBER, min_size=used + extra, max_size=used + extra))
    bias = data.draw(st.lists(st.sampled_from([0.0, 0.0, 0.0, math.inf, -math.inf]), min_size=used, max_size=used))
    for j, b in enumerate(bias):  # the two that add up to NaN do not meet: what is hidden or kept has a finite score
        if math.isinf(b) and not math.isfinite(scores[j]):
            scores[j] = 0.5
    found, valid = cpu_select.best(torch.tensor(scores).view(1, 1, -1), torch.tensor(bias)[None], used, count, ())
    expected = best_by_hand(scores, bias, used, count)
    assert found[0, 0].tolist() == expected + [-1] * (count - len(expected))
    assert int(valid) == len(expected)


@pytest.mark.parametrize("counts", [(), (7, 300, 0)])
@pytest.mark.parametrize("steps", [3, 1 << 20])
def test_long_rows_and_counts_of_heads(steps, counts, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    scores = (torch.randn(2, 3, 2500, generator=generator) * steps).round() / steps
    bias = torch.zeros(2, 2400)
    bias[0, :4] = bias[1, 10:14] = torch.inf
    bias[1, :10] = -torch.inf
    extent = torch.tensor(2390)
    index, valid = OPS.choose(scores, bias, extent, count=300, counts=counts)
    for b in range(2):
        for h in range(3):
            count = counts[h] if counts else 300
            expected = best_by_hand(scores[b, h].tolist(), bias[b].tolist(), 2390, count)
            assert index[b, h, : valid[b, h]].tolist() == expected
            assert (index[b, h, valid[b, h] :] == -1).all()
    monkeypatch.setattr(cpu_select, "best", lambda *_: None)
    other, others = OPS.choose(scores, bias, extent, count=300, counts=counts)
    assert torch.equal(valid, others)
    # Which of equal ones the library takes is its own affair.
    keys = scores[:, :, :2400] + bias[:, None]
    for b in range(2):
        for h in range(3):
            n = int(valid[b, h])
            assert torch.equal(keys[b, h, index[b, h, :n]].sort()[0], keys[b, h, other[b, h, :n]].sort()[0])
