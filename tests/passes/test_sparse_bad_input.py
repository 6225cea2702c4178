"""Where sparse attention cannot act it says so, and leaves attention exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import StaticCache

import fxopt
from fxopt.passes.sparse_attention import SparseAttention
from fxopt.passes.technique import PassError, SettingError
from fxopt.testing import TINY

PAGES = SparseAttention(method="pages", budget=64, min_length=0)


class Step(nn.Module):
    """A decode step on a static cache; keys are wider than values, as in multi-head latent attention."""

    def __init__(self, value_width=8):
        super().__init__()
        self.register_buffer("keys", torch.randn(1, 2, 160, 16))
        self.register_buffer("values", torch.randn(1, 2, 160, value_width))

    def forward(self, q, k, v, at, mask):
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)


def run(module, value_width=8):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 1, w, generator=generator) for h, w in ((4, 16), (2, 16), (2, value_width)))
    with torch.no_grad():
        return module(q, k, v, torch.tensor([150]), (torch.arange(160) <= 150)[None, None, None])


def remarks(model):
    return [r for g in fxopt.report(model).graphs for r in g.remarks if r.technique == "sparse_attention"]


def test_latent_attention_is_blocked(eager_lowering):
    module = Step()
    expected = run(module)
    fxopt.compile(module, PAGES)
    with pytest.warns(UserWarning, match="latent attention"):
        torch.testing.assert_close(run(module), expected)
    torch._dynamo.reset()
    fxopt.compile(module, PAGES, strict=True)
    with pytest.raises(Exception, match="latent attention"):
        run(module)


class Linear(nn.Module):
    """Layers without softmax attention: each adds a gated sum over what came before."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.gate, self.out = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            h = self.norm(x)
            return x + self.out(torch.sigmoid(self.gate(h)) * h.cumsum(1))

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_linear_attention_is_blocked(eager_lowering):
    model = fxopt.compile(Linear(), PAGES)
    with torch.no_grad(), pytest.warns(UserWarning, match="linear attention"):
        model(torch.randn(1, 5, 16))
    assert [(r.status, r.code) for r in remarks(model)] == [("blocked", "FX208")]


def test_training_stays_exact(eager_lowering):
    model = TINY["llama"]()
    token = torch.tensor([[5]])

    def step(given):
        cache = StaticCache(config=given.config, max_cache_len=128)
        with torch.no_grad():
            given(torch.arange(3, 93)[None], past_key_values=cache)
        return given(token, past_key_values=cache, position_ids=torch.tensor([[90]])).logits

    expected = step(model)
    fxopt.compile(model, PAGES)
    with pytest.warns(UserWarning, match="FX205"):
        found = step(model)
    assert found.requires_grad
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
    fxopt.compile(model, PAGES, strict=True)
    with pytest.raises(Exception, match="FX205") as raised:
        step(model)
    assert isinstance(raised.value, PassError) or "PassError" in str(raised.value)


def test_without_a_cache(eager_lowering):
    model = fxopt.compile(TINY["llama"](), PAGES)
    with torch.no_grad(), pytest.warns(UserWarning, match="reads a KV cache"):
        model(torch.tensor([[5]]), use_cache=False)


def test_a_budget_above_the_length_is_dense(eager_lowering):
    module = Step(16)
    expected = run(module, 16)
    fxopt.compile(module, SparseAttention(method="pages", budget=100_000, min_length=0))
    torch.testing.assert_close(run(module, 16), expected)
    assert [r.status for r in remarks(module)] == ["analysis"] and "covers all 160" in remarks(module)[0].message


def test_a_recipe_of_another_model():
    ids = torch.randint(3, 128, (64,), generator=torch.Generator().manual_seed(0))
    asked = SparseAttention(method="double_sparsity", budget=32, channels=4)
    recipe = fxopt.tune(TINY["llama"](), ids, asked, context=32, show=False)
    with pytest.raises(SettingError, match="another model"):
        fxopt.compile(TINY["qwen3"](), recipe)


def test_a_head_that_does_not_exist(eager_lowering):
    module = fxopt.compile(Step(16), SparseAttention(method="pages", budget=64, heads=(2,), min_length=0))
    with pytest.raises(Exception, match="KV head 2 does not exist"):
        run(module, 16)


def test_routed_layers_are_another_technique():
    from fxopt.passes import kv_policy

    other, reason = kv_policy.conflict("sparse_attention", {"sparse_attention", "mixture_of_depths"})
    assert other == "mixture_of_depths" and "fewer rows" in reason
    assert kv_policy.conflict("sparse_attention", {"layer_skip", "early_exit"}) is None


def test_a_path_without_attention_is_one_warning(eager_lowering):
    model = TINY["llama"]()
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        expected = model(ids).logits
        fxopt.compile(model, {"model.layers.1.mlp": SparseAttention(window=4)})
        with pytest.warns(UserWarning, match="covers no attention of this graph"):
            found = model(ids).logits
    torch.testing.assert_close(found, expected)
    assert [r.code for r in remarks(model)] == ["FX505"]


def test_a_model_without_attention_has_a_remark(eager_lowering):
    class Perceptron(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    model = Perceptron(nn.Linear(8, 8), nn.ReLU())
    fxopt.compile(model, SparseAttention(window=4))
    with torch.no_grad():
        model(torch.ones(2, 8))
    assert [r.message for r in remarks(model)] == ["no attention in this graph"]
