"""AsyncSoftmax: its setting, that it says no on a CPU, and what it puts into the graph where kernels run."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fxopt.codegen import lowering
from fxopt.codegen.kernels.phi import newest_key_phi
from fxopt.passes.async_softmax import AsyncSoftmax
from fxopt.passes.cache_extent import CacheExtent
from fxopt.passes.context import PassContext
from fxopt.passes.gqa_packing import GqaPacking
from fxopt.passes.provenance import number_nodes
from fxopt.passes.record import GraphRecord
from fxopt.passes.rewriter import verify
from fxopt.passes.technique import SettingError
from fxopt.testing import capture

B, H, HKV, T, S, D = 2, 4, 2, 2, 24, 16


@pytest.mark.parametrize("phi", ["automatic", float("nan"), float("inf"), True, None, [1.0]])
def test_a_phi_that_cannot_be_meant(phi):
    with pytest.raises(SettingError, match="phi is 'auto' or a finite number"):
        AsyncSoftmax(phi=phi)


def test_deterministic_is_a_choice():
    with pytest.raises(SettingError, match="allowed are True"):
        AsyncSoftmax(deterministic=1)


def test_it_means_the_model_itself():
    model = torch.nn.Linear(2, 2)
    assert AsyncSoftmax().reference(model) is model
    assert AsyncSoftmax.exact


def step(q, cache, new, at, mask):
    cache.index_copy_(2, at, new)
    return F.scaled_dot_product_attention(q, cache, cache, attn_mask=mask, enable_gqa=True, scale=0.3)


def capped(q, cache, new, at, mask):
    cache.index_copy_(2, at, new)
    keys = cache[:, :, None].expand(B, HKV, 2, S, D).reshape(B, H, S, D)
    scores = torch.tanh(q @ keys.transpose(-1, -2) / 50) * 50
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ keys


def inputs():
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(S) <= 7 + torch.arange(T)[:, None]
    shapes = ((B, H, T, D), (B, HKV, S, D), (B, HKV, T, D))
    return *(torch.randn(*shape, generator=generator) for shape in shapes), torch.arange(7, 7 + T), mask[None, None]


def rewritten(function, technique):
    (graph_module,) = capture(function, *inputs())
    number_nodes(graph_module.graph)
    remarks = []
    for each in (GqaPacking(), CacheExtent(), technique):
        context = PassContext(graph_module.graph, each.name, GraphRecord(0, "-", "test"))
        each.rewrite(graph_module.graph, context)
        verify(graph_module.graph)
        remarks = context.remarks
    graph_module.recompile()
    return graph_module, remarks


def call(graph_module):
    named = dict(zip(("q", "cache", "new", "at", "mask"), inputs(), strict=True))
    places = [str(p.target).removeprefix("L_").rstrip("_") for p in graph_module.graph.find_nodes(op="placeholder")]
    return graph_module(*[named[place] for place in places])[0]


def test_no_kernels_on_a_cpu():
    graph_module, remarks = rewritten(step, AsyncSoftmax())
    assert [(r.status, r.code) for r in remarks] == [("blocked", "FX207")]
    assert "decode_attention" not in graph_module.code
    torch.testing.assert_close(call(graph_module), step(*inputs()))


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """Rewrite as on a GPU; with no kernel to launch the operator's PyTorch body computes the result."""
    monkeypatch.setattr(lowering, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(lowering, "launch", launch)
    launched.clear()


launched = []


def launch(query, key, value, mask, extent, sinks, phi, *, scale, soft_cap, split_size):
    launched.append((phi, extent, split_size, scale))
    return lowering.attention(query, key, value, mask, extent, sinks, scale=scale, soft_cap=soft_cap).contiguous()


def test_phi_from_the_newest_key(kernels_everywhere):
    graph_module, remarks = rewritten(step, AsyncSoftmax())
    assert [r.status for r in remarks] == ["applied"]
    assert "newest key" in remarks[0].message
    torch.testing.assert_close(call(graph_module), step(*inputs()))
    phi, extent, split_size, _ = launched[-1]
    q, _, new, _, _ = inputs()
    torch.testing.assert_close(phi, newest_key_phi(q, new, scale=0.3))
    assert int(extent) == 9
    assert split_size == lowering.SPLIT_SIZE


def test_phi_that_was_given(kernels_everywhere):
    graph_module, remarks = rewritten(step, AsyncSoftmax(phi=2.5, deterministic=False))
    torch.testing.assert_close(call(graph_module), step(*inputs()))
    phi, _, split_size, _ = launched[-1]
    assert phi.tolist() == [2.5] * HKV
    assert split_size == lowering.fitted_split(S, B * HKV, torch.device("cpu"))
    assert "as given" in remarks[0].message


def test_phi_from_a_soft_cap(kernels_everywhere):
    graph_module, remarks = rewritten(capped, AsyncSoftmax())
    torch.testing.assert_close(call(graph_module), capped(*inputs()))
    assert "the soft-cap 50" in remarks[0].message
    assert launched[-1][0].tolist() == [0.0] * HKV


def test_prompts_are_left_alone(kernels_everywhere):
    (graph_module,) = capture(lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m),
                              torch.randn(1, 2, 20, 16), torch.ones(20, 20, dtype=torch.bool))  # fmt: skip
    number_nodes(graph_module.graph)
    context = PassContext(graph_module.graph, "async_softmax", GraphRecord(0, "-", "test"))
    AsyncSoftmax().rewrite(graph_module.graph, context)
    assert [r.code for r in context.remarks] == ["FX503"]
