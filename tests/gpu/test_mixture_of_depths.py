"""Mixture of depths on a GPU: nothing waits for the device in a step, and the results are those of eager."""

from __future__ import annotations

import copy

import pytest
import torch

import fxopt
from fxopt.passes.mixture_of_depths import MixtureOfDepths
from fxopt.passes.mod_reference import auxiliary_loss, routers
from fxopt.testing import TINY, inputs_for

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture
def llama():
    model = MixtureOfDepths(0.25, layers=(0, 1))(TINY["llama"]()).cuda()
    for router in routers(model).values():
        router.trained = True
    return model, inputs_for("llama", model, batch=2, length=24)["input_ids"].cuda()


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_prompt_and_steps_do_not_synchronise(llama, kind):
    from transformers import DynamicCache, StaticCache

    model, ids = llama
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        fxopt.compile(model, strict=True)
        model(input_ids=ids[:, :1])

        def run(synchronise):
            static = kind == "static"
            cache = StaticCache(model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
            found = [model(input_ids=ids[:, :8], past_key_values=cache).logits]
            found.append(model(input_ids=ids[:, 8:9], past_key_values=cache).logits)
            try:
                torch.cuda.set_sync_debug_mode("default" if synchronise else "error")
                found += [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(9, 24)]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            return torch.cat(found, 1)

        run(synchronise=True)  # compiles
        torch.testing.assert_close(run(synchronise=False), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step(llama, dtype):
    model, ids = llama
    model = model.to(dtype).train()
    twin = copy.deepcopy(model).double()
    fxopt.compile(model, strict=True)
    for each in (model, twin):
        (each(input_ids=ids).logits.float().square().mean() + auxiliary_loss(each)).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        assert (a.grad.double() - b.grad).norm() <= tolerance * b.grad.norm() + 1e-6
