"""Tiny routed models and their inputs, for the tests of mixture of depths."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxopt.codegen import compat
from fxopt.passes.mixture_of_depths import MixtureOfDepths
from fxopt.passes.mod_reference import routers
from fxopt.testing import TINY, inputs_for

B, S = 2, 12


def made(
    name: str = "handwritten", training: bool = True, batch: int = B, length: int = S, **fields: Any
) -> tuple[Any, dict[str, Any]]:
    """A routed tiny model (half of the tokens, if `fields` says nothing else) whose predictors count as trained, and
    inputs ``[batch, length]`` of it."""
    model = TINY[name]()
    MixtureOfDepths(**{"capacity": 0.5} | fields)(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for router in routers(model).values():
        router.trained = True
    return model.train(training), inputs_for(name, model, batch=batch, length=length)


def one_layer() -> tuple[Any, Any, torch.Tensor]:
    """A hand-written model, its one routed layer, in training, and a stream for it: C = 5 of 12 tokens."""
    model, _ = made(capacity=5, layers=(1,))
    torch.manual_seed(3)
    return model, model.layers[1], torch.randn(B, S, 64)


def logits(output: Any) -> torch.Tensor:
    """The logits of what a model returns."""
    return output.logits if hasattr(output, "logits") else output


def decided(what: str, products: int) -> str:
    """What is told of a layer in eval on a CPU: the device decides where branches may not write a cache, and then says
    how many products were given the decision."""
    if compat.cond_may_write():
        return f"its predictor decides: {what}"
    given = f"{products} of {products} products read no weight where they are not needed"
    return f"its predictor decides, on the device: {what}; {given}"
