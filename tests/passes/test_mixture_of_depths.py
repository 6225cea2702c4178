"""Mixture of depths, its meaning in eager: settings, selection, what a routed layer computes, causality."""

from __future__ import annotations

import copy

import pytest
import torch
from mod_harness import B, S, logits, made, one_layer
from torch import nn

import fxopt
from fxopt import SettingError
from fxopt.passes.mixture_of_depths import MixtureOfDepths
from fxopt.passes.mod_counters import watching
from fxopt.passes.mod_reference import members, routers, top_tokens
from fxopt.testing import TINY, Handwritten

# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"capacity": 0}, "at least one token"),
        ({"capacity": -3}, "at least one token"),
        ({"capacity": 0.0}, "above 0"),
        ({"capacity": 1.5}, "at most 1.0"),
        ({"capacity": float("nan")}, "at most 1.0"),
        ({"capacity": True}, "number of tokens"),
        ({"capacity": "half"}, "fraction of the sequence"),
        ({"capacity": 0.5, "every": 0}, "every"),
        ({"capacity": 0.5, "layers": 3}, r"layers=\(3,\)"),
        ({"capacity": 0.5, "layers": ()}, "layer indices"),
        ({"capacity": 0.5, "layers": (1,), "every": 3}, "not both"),
        ({"capacity": 0.5, "predictor": "bec"}, "Did you mean 'bce'"),
        ({"capacity": 0.5, "part": "norm"}, "'layer', 'attention', 'mlp'"),
        ({"capacity": 0.5, "router": nn.Linear(2, 1)}, "dotted path"),
    ],
)
def test_impossible_settings_raise(fields, says):
    with pytest.raises(SettingError, match=says):
        MixtureOfDepths(**fields)


def test_which_layers_are_routed():
    assert MixtureOfDepths(0.125).routed(6) == (1, 3, 5)
    assert MixtureOfDepths(0.125, every=1).routed(3) == (0, 1, 2)
    assert MixtureOfDepths(0.125, layers=(-1, 0)).routed(4) == (0, 3)
    with pytest.raises(SettingError, match="layer 7 does not exist"):
        fxopt.compile(TINY["handwritten"](), MixtureOfDepths(0.125, layers=(7,)))


@pytest.mark.parametrize(("capacity", "count"), [(0.125, 2), (1.0, 12), (5, 5), (100, 12), (0.001, 1)])
def test_capacity_in_tokens(capacity, count):
    model, inputs = made(capacity=capacity)
    with watching(model) as routes:
        model(**inputs)
        assert routes()["layers.1"].sum(1).tolist() == [count] * B


def test_a_model_without_layers_and_a_missing_router_are_refused():
    with pytest.raises(SettingError, match="no stack of layers"):
        MixtureOfDepths(0.5)(nn.Linear(4, 4))
    with pytest.raises(SettingError, match="no module 'routr'"):
        MixtureOfDepths(0.5, router="routr")(Handwritten())
    with pytest.raises(SettingError, match="no module of its own for its mlp"):
        MixtureOfDepths(0.5, part="mlp")(Handwritten())


# -- selection ------------------------------------------------------------------------------------------------------


def test_exactly_c_tokens_with_ties_and_without_padding():
    score = torch.zeros(3, 9)
    score[1, 4:] = 1.0
    chosen = top_tokens(score, 4)
    assert chosen.places.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    real = torch.ones(3, 9, dtype=torch.bool)
    real[0, :3] = False
    real[2, 2:] = False
    chosen = top_tokens(score, 4, real)
    assert members(chosen).sum(1).tolist() == [4, 4, 2]
    assert not (members(chosen) & ~real).any()
    assert chosen.places[0].tolist() == [3, 4, 5, 6]


def test_the_order_in_which_tokens_were_found_does_not_matter():
    score = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    found = top_tokens(score, 7).places
    assert torch.equal(found, found.sort(1).values)
    assert torch.equal(found, score.topk(7, sorted=False).indices.sort(1).values)
    assert found.max() > 7  # scattered over the sequence, not only its beginning


def by_hand(layer, router, x):
    """x + r f(X~), token by token: attention over the selected tokens of one sequence, at float64."""
    layer, weight, x = copy.deepcopy(layer).double(), router.weight.double(), x.double()
    out = x.clone()
    for b in range(x.shape[0]):
        r = x[b] @ weight
        chosen = sorted(r.argsort(descending=True)[: router.count(x.shape[1])].tolist())
        tokens = x[b, chosen][None]
        f = type(layer).forward(layer, tokens) - tokens
        for row, place in enumerate(chosen):
            out[b, place] = x[b, place] + r[place] * f[0, row]
    return out


def test_the_routed_layer_by_hand():
    model, layer, x = one_layer()
    with torch.no_grad(), watching(model) as routes:
        found = layer(x)
        chosen = routes()["layers.1"]
        torch.testing.assert_close(found.double(), by_hand(layer, routers(model)["layers.1"], x), rtol=1e-5, atol=1e-5)
    assert chosen.sum(1).tolist() == [5, 5]
    assert torch.equal(found[~chosen], x[~chosen])
    assert not torch.isclose(found[chosen], x[chosen]).all(-1).any()


def test_capacity_one_with_weight_one_is_the_dense_model():
    model, inputs = made("llama", capacity=1.0)
    dense = logits(TINY["llama"]()(**inputs))
    for router in routers(model).values():
        router.forward = lambda x: torch.ones(x.shape[:2])
    torch.testing.assert_close(logits(model(**inputs)), dense, rtol=1e-5, atol=1e-5)


def test_rotary_positions_are_the_original_ones():
    model, _ = made("llama", capacity=6, layers=(1,))
    layer, router = model.model.layers[1], routers(model)["model.layers.1"]
    x = torch.randn(1, S, 64)
    tables = model.model.rotary_emb(x, position_ids=torch.arange(S)[None])
    chosen = top_tokens(router(x), 6).places
    assert chosen[0].tolist() != list(range(6))
    here = torch.stack([x[0, chosen[0]]])
    cut = tuple(t[:, chosen[0]] for t in tables)
    weight = router(x)[0, chosen[0], None]
    expected = here + weight * (type(layer).forward(layer, here, position_embeddings=cut) - here)
    found = layer(x, position_embeddings=tables)
    torch.testing.assert_close(found[0, chosen[0]], expected[0])


def test_padding_is_never_selected_and_changes_nothing():
    model, inputs = made("llama", capacity=4)
    ids = inputs["input_ids"]
    padded = torch.cat([torch.zeros(B, 3, dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with watching(model) as routes:
        alone = logits(model(input_ids=ids, use_cache=False))
        found = logits(model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False))
        assert not routes()["model.layers.1"][:, :3].any() and routes()["model.layers.1"].sum(1).tolist() == [4, 4]
    torch.testing.assert_close(found[:, 3:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_part_contributes_at_the_selected_tokens_only(part):
    model, inputs = made("llama", capacity=5, layers=(1,), part=part)
    name = "self_attn" if part == "attention" else "mlp"
    seen = {}

    def look(_, __, output):
        seen["out"] = output[0] if isinstance(output, tuple) else output

    model.model.layers[1].get_submodule(name).register_forward_hook(look)
    with watching(model) as routes:
        model(**inputs)
        chosen = routes()["model.layers.1"]
    assert chosen.sum(1).tolist() == [5, 5]
    assert not seen["out"][~chosen].any() and seen["out"][chosen].abs().sum(-1).gt(0).all()
    with pytest.raises(SettingError, match="undo the router's weight"):
        MixtureOfDepths(0.5, part=part)(TINY["gemma2"]())


@pytest.mark.parametrize("length", [1, 2, 3, 4, 16, 64])
def test_lengths_that_equal_another_size(length):
    """Batch 2, 4 heads, of 16 channels, width 64; of the selected tokens as many as heads or channels."""
    model, _ = made("llama", capacity=0.25 if length > 4 else 1.0, layers=(1,))
    layer, router = model.model.layers[1], routers(model)["model.layers.1"]
    x = torch.randn(B, length, 64, generator=torch.Generator().manual_seed(length))
    cos, sin = model.model.rotary_emb(x, position_ids=torch.arange(length)[None])
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        found = layer(x, attention_mask=mask, position_embeddings=(cos, sin))
        for b in range(B):
            chosen = router(x[b : b + 1])[0].argsort(descending=True)[: router.count(length)].sort().values
            here = x[b : b + 1, chosen]
            f = type(layer).forward(layer, here, position_embeddings=(cos[:, chosen], sin[:, chosen])) - here
            expected = x[b].clone()
            expected[chosen] += router(here)[0, :, None] * f[0]
            torch.testing.assert_close(found[b], expected, rtol=1e-5, atol=1e-5)


# -- causality ------------------------------------------------------------------------------------------------------


def after_a_change(model, ids, place):
    changed = ids.clone()
    changed[:, place] = (changed[:, place] + 1) % 128
    return logits(model(ids))[:, :place], logits(model(changed))[:, :place]


@pytest.mark.parametrize("predictor", ["bce", "auxiliary"])
def test_the_predictor_looks_at_nothing_that_follows(predictor):
    model, inputs = made(training=False, predictor=predictor)
    for place in range(1, S):
        before, after = after_a_change(model, inputs["ids"], place)
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


def test_top_c_in_training_does():
    model, inputs = made(capacity=3)
    differ = [not torch.allclose(*after_a_change(model, inputs["ids"], place), atol=1e-5) for place in range(1, S)]
    assert any(differ)


def test_rows_of_a_batch_do_not_touch_each_other():
    model, inputs = made(training=False)
    together = model(inputs["ids"])
    for row in range(B):
        torch.testing.assert_close(together[row : row + 1], model(inputs["ids"][row : row + 1]), rtol=1e-5, atol=1e-5)
