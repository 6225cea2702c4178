"""Recognition of attention: what must not match first, then every way of writing it that is understood."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt.codegen.ops.attention  # noqa: F401
from fxopt.passes.attention import find_attentions
from fxopt.passes.kv import cache_of
from fxopt.passes.nodes import value_of
from fxopt.testing import capture

B, H, HKV, T, S, D = 2, 4, 2, 3, 7, 8


def tensors(kv_heads=H):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, h, n, D, generator=generator) for h, n in ((H, T), (kv_heads, S), (kv_heads, S))]


def found(function, *args, **kwargs):
    (graph_module,) = capture(function, *args, **kwargs)
    return find_attentions(graph_module.graph)


def attend(q, k, v, mask=None, scale=0.5, dim=-1):
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, dim), v)


# -- what must not match ----------------------------------------------------------------------------------------------


def refuses(code, word, function, *args):
    sites, near = found(function, *args)
    assert not sites
    assert [n.code for n in near] == [code]
    assert word in near[0].message


def test_weights_that_are_returned():
    def function(q, k, v):
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return weights @ v, weights

    refuses("FX104", "weights", function, *tensors())


def test_weights_read_twice():
    def function(q, k, v):
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return weights @ v + (weights @ v.square())

    refuses("FX104", "matmul", function, *tensors())


def test_scores_read_twice():
    def function(q, k, v):
        scores = q @ k.transpose(-1, -2)
        return torch.softmax(scores, -1) @ v, scores.sum()

    refuses("FX104", "scores", function, *tensors())


def test_dropout_that_is_active():
    def function(q, k, v):
        return F.dropout(torch.softmax(q @ k.transpose(-1, -2), -1), 0.1, training=True) @ v

    refuses("FX205", "dropout", function, *tensors())
    refuses("FX205", "dropout", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), *tensors())


def test_softmax_over_the_queries():
    q, k, v = tensors()
    refuses("FX102", "dimension -2", lambda q, k, v: attend(q, k, v, dim=-2), q, k, v)


def test_scores_scaled_by_a_tensor():
    refuses("FX103", "tensor", lambda q, k, v, t: attend(q, k, v, scale=t), *tensors(), torch.tensor(0.3))


def test_bias_inside_of_the_soft_cap():
    def function(q, k, v, bias):
        scores = torch.tanh((q @ k.transpose(-1, -2) + bias) / 20) * 20
        return torch.softmax(scores, -1) @ v

    refuses("FX101", "inside", function, *tensors(), torch.zeros(T, S))


def test_scores_filled_with_an_ordinary_number():
    def function(q, k, v, mask):
        return torch.softmax((q @ k.transpose(-1, -2)).masked_fill(mask, -5.0), -1) @ v

    refuses("FX103", "lowest number", function, *tensors(), torch.zeros(T, S, dtype=torch.bool))


def test_weights_on_the_right():
    def function(q, k, v):
        return v.transpose(-1, -2) @ torch.softmax(q @ k.transpose(-1, -2), -1).transpose(-1, -2)

    refuses("FX104", "transpose", function, *tensors())


def test_merged_heads_with_baddbmm_are_named():
    def function(q, k, v, alibi):  # as BLOOM does
        scores = alibi.baddbmm(q.flatten(0, 1), k.flatten(0, 1).transpose(-1, -2), beta=1.0, alpha=0.5)
        weights = torch.softmax(scores.view(B, H, T, S), -1)
        return torch.bmm(weights.view(B * H, T, S), v.flatten(0, 1))

    refuses("FX101", "view", function, *tensors(), torch.zeros(B * H, 1, S))


def test_softmax_of_a_linear_layer_is_nobodys_business():
    sites, near = found(lambda x, w: torch.softmax(x @ w, -1) @ w.T, torch.randn(2, 3, 5, 8), torch.randn(8, 8))
    assert not sites
    assert not near


def test_another_order_of_repeated_heads_is_no_repetition():
    q, k, v = tensors(HKV)

    def tiled(q, k, v):  # heads 0 1 0 1, where grouped queries mean 0 0 1 1
        k, v = (t[:, None].expand(B, 2, HKV, S, D).reshape(B, H, S, D) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    (site,), _ = found(tiled, q, k, v)
    assert site.group == 1
    assert not site.repeated


# -- ways of writing it -----------------------------------------------------------------------------------------------


def only(function, *args):
    (site,), near = found(function, *args)
    assert not near
    return site


def test_library_call():
    site = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *tensors())
    assert (site.form, site.is_causal, site.biases, site.group) == ("sdpa", True, (), 1)
    assert site.scale == pytest.approx(1 / math.sqrt(D))


def test_enable_gqa():
    site = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), *tensors(HKV))
    assert (site.heads, site.kv_heads, site.group, site.repeated) == (H, HKV, 2, False)


@pytest.mark.parametrize("how", ["getitem", "unsqueeze", "interleave", "function", "contiguous"])
def test_repeated_heads(how):
    def repeat(x):
        if how == "interleave":
            return x.repeat_interleave(2, dim=1)
        if how == "function":
            return torch.repeat_interleave(x, 2, 1)
        x = x.unsqueeze(2) if how == "unsqueeze" else x[:, :, None, :, :]
        x = x.expand(B, HKV, 2, S, D).reshape(B, H, S, D)
        return x.contiguous() if how == "contiguous" else x

    q, k, v = tensors(HKV)
    site = only(lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)), q, k, v)
    assert (site.group, site.repeated) == (2, True)
    assert {site.key.op, site.value.op} == {"placeholder"}


def test_one_head_for_all():
    q, k, v = tensors(1)
    site = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q, k, v)
    assert (site.kv_heads, site.group) == (1, H)
    site = only(lambda q, k, v: attend(q, k.expand(B, H, S, D), v.expand(B, H, S, D)), q, k, v)
    assert (site.kv_heads, site.group, site.repeated) == (1, H, True)


def test_written_out_with_everything():
    def function(q, k, v, alibi, mask, hidden):
        scores = (q * 2) @ k.permute(0, 1, 3, 2) / 4
        scores = torch.tanh(scores / 30) * 30
        scores = (scores + alibi) + mask
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, dim=3, dtype=torch.float32).to(q.dtype)
        return F.dropout(weights, 0.2, training=False) @ v

    extra = (torch.zeros(H, 1, S), torch.zeros(B, 1, T, S), torch.zeros(T, S, dtype=torch.bool))
    site = only(function, *tensors(), *extra)
    assert (site.form, site.scale, site.soft_cap) == ("eager", pytest.approx(0.25), pytest.approx(30))
    assert [bias.fill is not None for bias in site.biases] == [True, False, False]
    assert site.mask is None


def test_a_bias_that_is_scaled_with_the_scores():
    site = only(
        lambda q, k, v, b: torch.softmax((q @ k.transpose(-1, -2) + b) * 0.5, -1) @ v, *tensors(), torch.zeros(T, S)
    )
    assert (site.scale, site.biases[0].multiplier) == (0.5, 0.5)
    assert site.mask is None


def test_sinks():
    def function(q, k, v, sinks):
        scores = q @ k.transpose(-1, -2)
        column = sinks.reshape(1, -1, 1, 1).expand(B, -1, T, -1)
        both = torch.cat([scores, column], dim=-1)
        both = both - both.max(dim=-1, keepdim=True).values
        return F.softmax(both, -1)[..., :-1] @ v

    site = only(function, *tensors(), torch.zeros(H))
    assert value_of(site.sinks).shape == (H,)


def test_a_value_of_another_width():
    q, k, _ = tensors()
    site = only(attend, q, k, torch.randn(B, H, S, 5))
    assert value_of(site.output).shape == (B, H, T, 5)


# -- caches -----------------------------------------------------------------------------------------------------------


class Cached(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer("keys", torch.zeros(B, H, S, D))
        self.register_buffer("values", torch.zeros(B, H, S, D))

    def forward(self, q, k, v, at):
        keys, values = self.keys, self.values
        if self.kind == "static":
            keys.index_copy_(2, at, k)
            values.index_copy_(2, at, v)
        elif self.kind == "slice":
            keys[:, :, :T] = k
            values[:, :, :T] = v
        elif self.kind == "sliding":
            for cache, new in ((keys, k), (values, v)):
                shifted = cache.roll(-T, dims=-2)
                shifted[:, :, -T:] = new
                cache.copy_(shifted)
        elif self.kind == "dynamic":
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        elif self.kind == "none":
            keys, values = k * 2, v * 2
        return F.scaled_dot_product_attention(q, keys, values)


@pytest.mark.parametrize("kind", ["static", "slice", "sliding", "dynamic", "fixed", "none"])
def test_cache_kinds(kind):
    new = [torch.randn(B, H, T, D) for _ in range(3)]
    site = only(Cached(kind), *new, torch.arange(T))
    facts = cache_of(site)
    assert facts.kind == ("static" if kind == "slice" else kind)
    assert facts.preallocated == (kind in ("static", "slice", "sliding"))
    assert bool(facts.writes) == facts.preallocated
