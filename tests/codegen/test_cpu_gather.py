"""The C++ kernels of sparse attention against the PyTorch forms in float64."""

from __future__ import annotations

import pytest
import torch

from fxopt.codegen.kernels import cpu_gather
from fxopt.codegen.ops import sparse_gather
from fxopt.codegen.ops.attention import TOLERANCE, attention

CASES = [  # batch, KV heads, group, length, head_dim, block, soft-cap, sinks, mask
    (2, 2, 4, 121, 32, 16, 0.0, True, "bool"),
    (1, 2, 1, 128, 64, 16, 5.0, False, "additive"),
    (2, 3, 5, 1700, 128, 1, 0.0, False, "bool"),
    (1, 1, 2, 2000, 16, 1, 0.0, True, "none"),
]


def inputs(case, dtype):
    batch, kv_heads, group, length, width, block, cap, sinks, kind = case
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, kv_heads * group, 1, width, generator=generator).to(dtype)
    key, value = (torch.randn(batch, kv_heads, length, width, generator=generator).to(dtype) for _ in range(2))
    blocks = -(-length // block)
    count = max(2, blocks // 2)
    order = torch.rand(batch, kv_heads, blocks, generator=generator).argsort(-1)[..., :count]
    valid = torch.randint(1, count + 1, (batch, kv_heads), generator=generator)
    index = torch.where(torch.arange(count) < valid[..., None], order, -1)
    seen = torch.rand(batch, 1, 1, length, generator=generator) > 0.2
    additive = torch.zeros(batch, kv_heads * group, 1, length).masked_fill(~seen, -torch.inf)
    mask = {"bool": seen, "none": None, "additive": additive}[kind]
    logits = torch.linspace(-2, 2, kv_heads * group) if sinks else None
    # The last positions are listed and not filled: they are not to be read.
    key[:, :, length - 3 :] = value[:, :, length - 3 :] = torch.nan
    return query, key, value, index, valid, mask, length - 3, logits, width**-0.5, cap, block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_reads_what_is_listed(case, dtype):
    given = inputs(case, dtype)
    query, key, value, index, valid, mask, filled, sinks, scale, cap, block = given
    found = cpu_gather.attend(*given)
    assert found is not None
    batch, heads = query.shape[:2]
    listed = torch.zeros(batch, key.shape[1], key.shape[2], dtype=torch.bool)
    for b in range(batch):
        for h in range(key.shape[1]):
            for entry in index[b, h, : valid[b, h]].tolist():
                listed[b, h, entry * block : min(entry * block + block, filled)] = True
    keep = listed.repeat_interleave(heads // key.shape[1], 1)[:, :, None]
    hidden = keep if mask is None else keep & mask if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)
    wide = [t.nan_to_num().double() for t in (query, key, value)]
    hidden = hidden if hidden.dtype == torch.bool else hidden.double()
    expected = attention(*wide, hidden, None, None if sinks is None else sinks.double(), scale=scale, soft_cap=cap)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    bare = [t.nan_to_num() for t in (query, key, value)]
    again = cpu_gather.attend(*bare, *given[3:])
    assert torch.equal(found, again)


@pytest.mark.parametrize("case", CASES)
def test_the_form_without_a_compiler(case, monkeypatch):
    given = inputs(case, torch.float32)
    given = (*(t.nan_to_num() for t in given[:3]), *given[3:])
    expected = cpu_gather.attend(*given)
    monkeypatch.setattr(cpu_gather, "attend", lambda *_: None)
    monkeypatch.setattr(sparse_gather, "BUFFER", 1 << 14)  # several stretches and several rounds of heads
    torch.testing.assert_close(sparse_gather.attend_to(*given), expected, atol=2e-5, rtol=2e-5)
