"""Mixture of depths in training: the router's gradient, the auxiliary loss, checkpointing, accumulation."""

from __future__ import annotations

import pytest
import torch
from mod_harness import B, S, logits, made, one_layer
from torch import nn

from fxopt.passes.mod_counters import watching
from fxopt.passes.mod_reference import auxiliary_loss, routers


def test_router_gradient_against_finite_differences():
    model, layer, x = one_layer()
    model.double()
    x = x.double()
    router = routers(model)["layers.1"]
    direction = torch.randn(B, S, 64, dtype=torch.float64)
    (layer(x) * direction).sum().backward()
    found = router.weight.grad.clone()
    for place in (0, 17, 63):
        step = torch.zeros(64, dtype=torch.float64)
        step[place] = 1e-6
        with torch.no_grad():
            sides = []
            for sign in (1, -1):
                router.weight.add_(sign * step)
                sides.append((layer(x) * direction).sum())
                router.weight.sub_(sign * step)
        torch.testing.assert_close(found[place], (sides[0] - sides[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("predictor", ["bce", "auxiliary"])
def test_auxiliary_loss_teaches_membership(predictor):
    model, inputs = made(capacity=4, predictor=predictor)
    router = routers(model)["layers.1"]
    with watching(model) as routes:
        model(**inputs)
        chosen = routes()["layers.1"]
        found, target, _ = router.observed
    assert torch.equal(target, chosen)
    loss = auxiliary_loss(model)
    torch.testing.assert_close(loss, nn.functional.binary_cross_entropy_with_logits(found, chosen.float()))
    loss.backward()
    if predictor == "bce":
        assert router.weight.grad.abs().sum() > 0 and model.embed.weight.grad.abs().sum() > 0
    else:
        assert router.weight.grad is None and model.embed.weight.grad is None
        assert all(p.grad is not None for p in router.predictor.parameters())
    with pytest.raises(ValueError, match="run the forward first"):
        auxiliary_loss(model)


def test_padding_has_no_part_in_the_auxiliary_loss():
    model, inputs = made("llama", capacity=4)
    ids = inputs["input_ids"]
    model(input_ids=ids, use_cache=False)
    alone = auxiliary_loss(model)
    mask = torch.cat([torch.zeros(B, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
    padded = torch.cat([torch.zeros(B, 3, dtype=torch.long), ids], dim=1)
    model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False)
    torch.testing.assert_close(auxiliary_loss(model), alone, rtol=1e-4, atol=1e-5)


def test_gradients_survive_activation_checkpointing():
    grads = []
    for checkpointed in (False, True):
        model, inputs = made("llama", capacity=4)
        if checkpointed:
            model.gradient_checkpointing_enable()
        (logits(model(**inputs)).square().mean() + auxiliary_loss(model)).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_gradients_accumulate_over_micro_batches():
    grads = []
    for parts in (1, 2):
        model, inputs = made(capacity=4)
        for ids in inputs["ids"].chunk(parts):
            ((model(ids).square().mean() + auxiliary_loss(model)) / parts).backward()
        grads.append([p.grad for p in model.parameters()])
    for whole, accumulated in zip(*grads, strict=True):
        torch.testing.assert_close(whole, accumulated)
