"""Mixture of depths compiled: the captured graph, its shapes, what the report tells, layers to skip."""

from __future__ import annotations

import copy
import json
import pathlib
import runpy

import pytest
import torch
from mod_harness import B, S, decided, made
from torch import nn

import fxopt
from fxopt.codegen import compat
from fxopt.passes.layers import find_layers
from fxopt.passes.mixture_of_depths import MixtureOfDepths
from fxopt.passes.mod_counters import watching
from fxopt.passes.mod_reference import auxiliary_loss, routers
from fxopt.passes.provenance import module_path
from fxopt.testing import TINY, Handwritten, capture, inputs_for


def products(graph):
    """Tokens (second dimension) of the matrix products inside layer 1, and inside layer 0."""
    found = {0: set(), 1: set()}
    for node in graph.nodes:
        if getattr(node.target, "__name__", "") != "linear" or node.meta["example_value"].shape[-1] < 2:
            continue
        path = f"{module_path(node)}."
        for layer in found:
            if f"layers.{layer}." in path and "router" not in path:
                found[layer].add(int(node.meta["example_value"].shape[1]))
    return found


@pytest.mark.parametrize("name", ["handwritten", "llama"])
def test_the_captured_graph_computes_c_tokens(name):
    model, inputs = made(name, capacity=5)
    (graph_module,) = capture(model, **inputs, grad=True)
    assert products(graph_module.graph) == {0: {S}, 1: {5}}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training_step_is_the_eager_one(eager_lowering, dynamic):
    model, inputs = made()
    twin = copy.deepcopy(model)
    expected = twin(**inputs)
    (expected.square().mean() + auxiliary_loss(twin)).backward()
    fxopt.compile(model, dynamic=dynamic, strict=True)
    found = model(**inputs)
    (found.square().mean() + auxiliary_loss(model)).backward()
    torch.testing.assert_close(found, expected)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    (remark,) = [r for r in fxopt.report(model).remarks if r.technique == "mixture_of_depths"]
    assert remark.status == "applied" and remark.path == "layers.1"
    assert dynamic or remark.message == "6 of 12 tokens are computed"
    if dynamic:  # the lengths in the graph are right at another length too
        longer = inputs_for("handwritten", model, length=S + 7)
        torch.testing.assert_close(model(**longer), model.forward(**longer))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_eval_of_any_length(eager_lowering, dynamic):
    """Under dynamic=True Dynamo cannot trace a block twice with floats in it; there is no branch then."""
    model, _ = made(training=False)
    fxopt.compile(model, dynamic=dynamic, strict=True)
    with torch.no_grad():
        for length in (12, 19, 26):
            ids = inputs_for("handwritten", model, length=length)["ids"]
            torch.testing.assert_close(model(ids), model.forward(ids), rtol=1e-5, atol=1e-5)
    told = [r for r in fxopt.report(model).remarks if r.technique == "mixture_of_depths"]
    assert {r.status for r in told} == {"applied"}
    assert all(("on the device" in r.message) == (bool(dynamic) or not compat.cond_may_write()) for r in told)
    assert len(fxopt.report(model).graphs) == 2


@pytest.mark.parametrize("negated", [False, True])
def test_compiled_eval_has_room_and_a_way_out(eager_lowering, negated):
    model, inputs = made(training=False, capacity=0.25)
    with torch.no_grad():
        weight = routers(model)["layers.1"].weight
        x = model.embed(inputs["ids"]).mean((0, 1))
        weight.add_((10.0 if negated else -10.0) * x / x.norm())
        with watching(model) as routes:
            expected = model(**inputs)
            count = int(routes()["layers.1"].sum(1).max())
        assert (count > 4) == negated  # more than there is room for, or not
        fxopt.compile(model, strict=True)
        torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)
    (remark,) = [r for r in fxopt.report(model).remarks if r.technique == "mixture_of_depths"]
    assert remark.message == decided("room for 4 of 12 tokens, all of them on overflow", products=8)


def test_a_changed_capacity_recompiles(eager_lowering):
    model, inputs = made(capacity=3)
    fxopt.compile(model)
    model(**inputs)
    MixtureOfDepths(9)(model)
    torch.testing.assert_close(model(**inputs), model.forward(**inputs))
    assert [r.message[:7] for r in fxopt.report(model).remarks if r.technique == "mixture_of_depths"][-1] == "9 of 12"


def test_compile_adds_the_routers(eager_lowering):
    model = TINY["handwritten"]().train()
    ids = inputs_for("handwritten", model)["ids"]
    expected = fxopt.reference(model, MixtureOfDepths(0.5))(ids)
    fxopt.compile(model, MixtureOfDepths(0.5), strict=True)
    weight = model.fxopt_router["1"].weight
    torch.testing.assert_close(model(ids), expected)
    fxopt.compile(model, MixtureOfDepths(2), strict=True)
    assert model.fxopt_router["1"].weight is weight
    with watching(model) as routes:
        model(ids)
        assert routes()["layers.1"].sum(1).tolist() == [2] * len(ids)
    decorated = MixtureOfDepths(3)(TINY["handwritten"]()).train()
    fxopt.compile(decorated, MixtureOfDepths(7))  # the nearer setting wins
    with watching(decorated) as routes:
        decorated(ids)
        assert routes()["layers.1"].sum(1).tolist() == [3] * len(ids)


def test_routed_layers_are_layers_of_the_stack(eager_lowering):
    model, inputs = made("handwritten", capacity=5, layers=(1,))
    (captured,) = capture(model, **inputs, grad=True)
    (stack,) = find_layers(captured.graph).stacks
    assert [layer.index for layer in stack.layers] == list(range(len(model.layers)))
    assert [part.kind for part in stack.layers[1].parts] == ["routed"]
    assert [part.kind for part in stack.layers[0].parts] == ["attention", "mlp"]


@pytest.mark.parametrize("skipped", [0, 1])
def test_layer_skip_of_a_routed_model(eager_lowering, skipped):
    model, inputs = made("handwritten", capacity=5, layers=(1,))
    twin = copy.deepcopy(model)
    twin.layers[skipped].forward = lambda x: x
    fxopt.compile(model, fxopt.LayerSkip(skip=(skipped,)), strict=True)
    torch.testing.assert_close(model(**inputs), twin(**inputs))


@pytest.mark.branches_write
@pytest.mark.skipif(not compat.cond_may_write(), reason="no branch cuts the stack here")
def test_layer_skip_does_not_count_a_stack_that_a_branch_has_cut(eager_lowering):
    model = MixtureOfDepths(0.25, layers=(3,))(Handwritten(layers=5)).eval()
    routers(model)["layers.3"].trained = True
    ids = inputs_for("handwritten", model, length=S)["ids"]
    expected = model.forward(ids)
    fxopt.compile(model, fxopt.LayerSkip(speedup=2))
    with torch.no_grad(), pytest.warns(UserWarning, match="did not act"):
        torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    assert "FX105" in {r.code for r in fxopt.report(model).remarks if r.technique == "layer_skip"}


def test_the_report_tells_what_was_routed(eager_lowering):
    model, inputs = made(training=False)
    fxopt.compile(model, strict=True)
    with torch.no_grad(), watching(model) as routes:
        taken = 0
        for _ in range(3):
            model(**inputs)
            taken += int(routes()["layers.1"].sum())
    report = fxopt.report(model)
    counted = report.routing["layers.1"]
    assert (counted["tokens"], counted["routed"]) == (3 * B * S, taken)
    assert [begin for begin, _ in counted["by_place"]] == [0, 1, 2, 4, 8]
    assert f"{taken / (3 * B * S):.1%} of {3 * B * S} tokens" in report.summary()
    assert fxopt.Report.from_dict(json.loads(json.dumps(report.to_dict()))).routing == report.routing


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_through_inductor(training):
    model, inputs = made(training=training, layers=(1,))
    twin = copy.deepcopy(model)
    fxopt.compile(model, strict=True)
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs), twin(**inputs), rtol=1e-5, atol=1e-5)
        return
    for each in (model, twin):
        (each(**inputs).square().mean() + auxiliary_loss(each)).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


class OneLayer(nn.Module):
    """The stream behind one routed layer, as it is: nothing after it that would hide a changed bit."""

    def __init__(self):
        super().__init__()
        self.layers = TINY["handwritten"]().layers[:2]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_tokens_that_are_not_selected_keep_every_bit_through_inductor(training):
    model = MixtureOfDepths(0.25, layers=(0, 1))(OneLayer()).train(training)
    for router in routers(model).values():
        router.trained = True
    x = torch.randn(B, S, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with watching(model) as routes:
            expected = model(x)
            passed = ~torch.stack(list(routes().values())).any(0)
        fxopt.compile(model, strict=True)
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert passed.any() and torch.equal(found[passed], x[passed])
    assert not torch.isclose(found[~passed], x[~passed]).all(-1).any()


@pytest.mark.slow
def test_the_example_runs(eager_lowering, capsys):
    path = pathlib.Path(__file__).parents[2] / "examples" / "mixture_of_depths.py"
    runpy.run_path(str(path))["main"](layers=2, width=64, length=32, steps=1, rounds=1, dense_backend="eager")
    printed = capsys.readouterr().out
    assert "4 of 32 tokens are computed" in printed and "model.layers.1" in printed and "generated:" in printed
