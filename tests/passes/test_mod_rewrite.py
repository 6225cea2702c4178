"""Mixture of depths where the device decides: no branch, linears that read no weight, kernels that move the tokens."""

from __future__ import annotations

import copy
import types

import mod_harness
import pytest
import torch
from mod_harness import S, logits
from torch import nn

import fxopt
from fxopt.passes import mod_forward, mod_rewrite
from fxopt.passes.mixture_of_depths import MixtureOfDepths
from fxopt.passes.mod_counters import watching
from fxopt.passes.mod_reference import auxiliary_loss, routers
from fxopt.testing import Handwritten, inputs_for


def made(name="handwritten", training=False, **fields):
    """A model with layer 1 routed for a quarter of the tokens, in eval."""
    return mod_harness.made(name, training, **{"capacity": 0.25, "layers": (1,)} | fields)


@pytest.fixture
def on_device(eager_lowering, monkeypatch):
    """As on a GPU: no branch, and operators for what kernels do; their PyTorch bodies run here. Collects the graphs."""
    from fxopt.codegen import compat

    graphs = []
    monkeypatch.setattr(mod_forward, "DEVICE_DECIDES", ("cpu",))
    monkeypatch.setattr(mod_rewrite, "lowering", types.SimpleNamespace(KERNEL_DEVICES=("cpu",)))
    monkeypatch.setattr(compat, "compile_with_inductor", lambda gm, *_: graphs.append(gm) or gm.forward)
    return graphs


def operators(graph_module):
    """How often each operator of fxopt stands in a graph, and torch.cond."""
    names = [str(n.target) for n in graph_module.graph.nodes if n.op == "call_function"]
    wanted = ("linear_if", "gather_norm", "scatter_residual", "cond")
    return {name: sum(name == n.split(".")[1] if "fxopt." in n else name == n for n in names) for name in wanted}


def remark(model):
    return [r for r in fxopt.report(model).remarks if r.technique == "mixture_of_depths"][-1]


CHOICES = {
    "all": lambda x, score: score + 10.0,
    "none": lambda x, score: score - 10.0,
    "some": lambda x, score: score - score.flatten().topk(4).values[-1],  # three of the batch
}


def choose(model, taken):
    """Let the predictors take all tokens, none, or three of the batch."""
    for router in routers(model).values():
        router.logits = CHOICES[taken]


@pytest.mark.parametrize("taken", ["some", "all", "none"])
def test_a_forward_without_a_cache(on_device, taken):
    """Fewer tokens than there is room for, more than there is room for, and none."""
    model, inputs = made()
    choose(model, taken)
    with torch.no_grad():
        with watching(model) as routes:
            expected = logits(model(**inputs))
            count = int(routes()["layers.1"].sum(1).max())
        assert {"some": 0 < count <= 4, "all": count == S, "none": count == 0}[taken]
        fxopt.compile(model, strict=True)
        torch.testing.assert_close(logits(model(**inputs)), expected, rtol=1e-5, atol=1e-5)
    assert operators(on_device[0]) == {"linear_if": 8, "gather_norm": 2, "scatter_residual": 2, "cond": 0}
    assert remark(model).message == (
        "its predictor decides, on the device: room for 4 of 12 tokens, all of them on overflow; 8 of 8 products "
        "read no weight where they are not needed; gather with norm; scatter with residual"
    )


def test_what_is_not_needed_is_not_multiplied(on_device):
    """The weights are poisoned: had they been read, the result were NaN; and the stream passes by bit for bit."""
    model, inputs = made()
    choose(model, "none")
    streams = []
    model.layers[2].register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    with torch.no_grad():
        before = model.layers[0](model.embed(inputs["ids"]) + model.positions(torch.arange(S)))
        for parameter in model.layers[1].parameters():
            if parameter.ndim == 2:
                parameter.fill_(torch.nan)
        fxopt.compile(model, strict=True)
        assert model(**inputs).isfinite().all()
    torch.testing.assert_close(model.layers[1].forward(before), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["growing", pytest.param("static", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "gemma2", "qwen3"))]
)
def test_a_prompt_and_steps_on_a_cache(on_device, name, kind):
    from transformers import DynamicCache, StaticCache

    model, inputs = made(name, layers=(0, 1))
    ids = inputs["input_ids"]
    with torch.no_grad(), watching(model) as routes:
        whole = model(input_ids=ids, use_cache=False).logits
        chosen = routes()
    with torch.no_grad():
        fxopt.compile(model, strict=True)
        model(input_ids=ids[:, :1])
        torch._dynamo.utils.counters.clear()
        cache = StaticCache(model.config, max_cache_len=16) if kind == "static" else DynamicCache(config=model.config)
        found = [model(input_ids=ids[:, :6], past_key_values=cache).logits]
        found += [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(6, S)]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
    for index, layer in enumerate(cache.layers[:2]):
        path = next(p for p in chosen if p.endswith(f".{index}"))
        assert torch.equal(layer.counts, chosen[path].sum(1))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert all(operators(gm)["cond"] == 0 and operators(gm)["linear_if"] for gm in on_device)
    products = 4 if name == "gpt2" else 7
    assert f"{products} of {products} products read no weight" in remark(model).message


def test_more_tokens_than_room_on_a_cache(on_device):
    """The rows written for the room are written again for every token, to the same cells."""
    from transformers import DynamicCache

    model, inputs = made("llama")
    choose(model, "all")
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        fxopt.compile(model, strict=True)
        model(input_ids=ids[:, :1])
        cache = DynamicCache(config=model.config)
        first = model(input_ids=ids[:, :8], past_key_values=cache).logits
        assert "room for 3 of 8 tokens" in remark(model).message
        rest = model.forward(input_ids=ids[:, 8:], past_key_values=cache).logits
    assert cache.layers[1].counts.tolist() == [S, S]
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["handwritten", "llama"])
def test_a_training_step_with_operators_is_the_eager_one(on_device, name):
    model, inputs = made(name, training=True)
    twin = copy.deepcopy(model)
    expected = logits(twin(**inputs))
    (expected.square().mean() + auxiliary_loss(twin)).backward()
    fxopt.compile(model, strict=True)
    found = logits(model(**inputs))
    (found.square().mean() + auxiliary_loss(model)).backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for (path, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, path=path: f"{path}: {m}")
    assert operators(on_device[0]) == {"linear_if": 0, "gather_norm": 1, "scatter_residual": 1, "cond": 0}
    assert remark(model).message == "3 of 12 tokens are computed; gather with norm; scatter with residual"


@pytest.mark.parametrize("skipped", [0, 3])
def test_layer_skip_finds_the_stack_in_eval_too(on_device, skipped):
    """Without branches a routed layer is a layer like the others."""
    model = MixtureOfDepths(0.25, layers=(3,))(Handwritten(layers=5)).eval()
    routers(model)["layers.3"].trained = True
    ids = inputs_for("handwritten", model, length=S)["ids"]
    twin = copy.deepcopy(model)
    twin.layers[skipped].forward = lambda x: x
    fxopt.compile(model, fxopt.LayerSkip(skip=(skipped,)), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), twin(ids), rtol=1e-5, atol=1e-5)


def test_a_norm_that_is_not_known_stays_and_the_rest_is_fused(on_device):
    model, inputs = made(training=True)
    model.layers[1].norm1 = nn.Softmax(-1)
    expected = model.forward(**inputs)
    fxopt.compile(model, strict=True)
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)
    assert operators(on_device[0])["gather_norm"] == 0 and operators(on_device[0])["scatter_residual"] == 1


def test_elsewhere_inductor_fuses(eager_lowering, monkeypatch):
    from fxopt.codegen import compat

    graphs = []
    monkeypatch.setattr(compat, "compile_with_inductor", lambda gm, *_: graphs.append(gm) or gm.forward)
    model, inputs = made(training=True)
    fxopt.compile(model, strict=True)
    model(**inputs)
    assert not any(operators(graphs[0]).values())


@pytest.mark.slow
def test_through_inductor(monkeypatch):
    monkeypatch.setattr(mod_forward, "DEVICE_DECIDES", ("cpu",))
    monkeypatch.setattr(mod_rewrite, "lowering", types.SimpleNamespace(KERNEL_DEVICES=("cpu",)))
    for training in (False, True):
        model, inputs = made(training=training)
        expected = model(**inputs)
        twin = copy.deepcopy(model)
        fxopt.compile(model, strict=True)
        if not training:
            with torch.no_grad():
                torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)
            continue
        for each in (model, twin):
            (each(**inputs).square().mean() + auxiliary_loss(each)).backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
