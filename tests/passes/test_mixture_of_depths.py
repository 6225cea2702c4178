"""Mixture of depths against its meaning: selection, gradients, causality, caches, and the compiled graph."""

from __future__ import annotations

import copy
import json
import pathlib
import pickle
import runpy
import warnings

import pytest
import torch
from torch import nn

import fxopt
from fxopt import SettingError
from fxopt.passes.layers import find_layers
from fxopt.passes.mixture_of_depths import MixtureOfDepths, unroute
from fxopt.passes.mod_counters import watching
from fxopt.passes.mod_reference import auxiliary_loss, members, routers, top_tokens
from fxopt.passes.provenance import module_path
from fxopt.testing import TINY, Handwritten, capture, inputs_for

B, S = 2, 12


def logits(output):
    return output.logits if hasattr(output, "logits") else output


def made(name="handwritten", training=True, **fields):
    """A routed tiny model whose predictors count as trained, and its inputs."""
    model = TINY[name]()
    MixtureOfDepths(**{"capacity": 0.5} | fields)(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for router in routers(model).values():
        router.trained = True
    return model.train(training), inputs_for(name, model, batch=B, length=S)


@pytest.fixture
def one_layer():
    """The routed layer of a hand-written model on its own, in training: C = 5 of 12 tokens."""
    model, _ = made(capacity=5, layers=(1,))
    torch.manual_seed(3)
    return model, model.layers[1], torch.randn(B, S, 64)


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


def test_the_routed_layer_by_hand(one_layer):
    model, layer, x = one_layer
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


# -- training -------------------------------------------------------------------------------------------------------


def test_router_gradient_against_finite_differences(one_layer):
    model, layer, x = one_layer
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


def test_an_untrained_predictor_warns_once_and_says_how():
    model = TINY["handwritten"]()
    MixtureOfDepths(0.5)(model).eval()
    with pytest.warns(UserWarning, match="auxiliary_loss"):
        model(inputs_for("handwritten", model)["ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(inputs_for("handwritten", model)["ids"])


# -- the model afterwards -------------------------------------------------------------------------------------------


def test_routers_are_part_of_the_model():
    model, inputs = made()
    assert {k for k in model.state_dict() if k.startswith("fxopt_router")} == {"fxopt_router.1.weight"}
    expected = model(**inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs), expected)
        with torch.no_grad():
            routers(twin)["layers.1"].weight.mul_(-1)
        assert not torch.equal(twin(**inputs), expected) and torch.equal(model(**inputs), expected)
    other = MixtureOfDepths(0.5)(TINY["handwritten"]())
    with pytest.raises(RuntimeError, match=r"fxopt_router\.1\.weight"):
        other.load_state_dict(TINY["handwritten"]().state_dict())
    other.load_state_dict(model.state_dict())
    assert routers(other)["layers.1"].trained


def test_decorating_again_keeps_the_routers_that_stay():
    model, inputs = made(layers=(1, 2))
    weight = routers(model)["layers.1"].weight
    MixtureOfDepths(3, layers=(0, 1))(model)
    assert list(routers(model)) == ["layers.0", "layers.1"] and routers(model)["layers.1"].weight is weight
    with watching(model) as routes:
        model(**inputs)
        assert routes()["layers.1"].sum(1).tolist() == [3, 3]
    dense = TINY["handwritten"]()
    assert torch.equal(unroute(model)(**inputs), dense(**inputs))
    assert model.state_dict().keys() == dense.state_dict().keys()


def test_a_decorated_class_makes_routed_models():
    @MixtureOfDepths(capacity=4)
    class Mine(Handwritten):
        pass

    model = Mine()
    with watching(model) as routes:
        model(inputs_for("handwritten", model)["ids"])
        assert routes()["layers.1"].sum(1).tolist() == [4, 4]


def test_a_router_of_the_model_and_one_from_a_file(tmp_path):
    class Scored(Handwritten):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(64, 1)

    model = MixtureOfDepths(0.5, router="score")(Scored())
    assert not any(k.startswith("fxopt_router") for k in model.state_dict())
    x = torch.randn(B, S, 64)
    assert torch.equal(routers(model)["layers.1"](x), model.score(x)[..., 0])
    save_file = pytest.importorskip("safetensors.torch").save_file
    source, _ = made()
    kept = {k: v for k, v in source.state_dict().items() if "router" in k}
    kept["fxopt_router.1.weight"] += 1
    save_file(kept, tmp_path / "routers.safetensors")
    loaded = MixtureOfDepths(0.5, router=str(tmp_path / "routers.safetensors"))(TINY["handwritten"]())
    assert torch.equal(routers(loaded)["layers.1"].weight, kept["fxopt_router.1.weight"])
    with pytest.raises(SettingError, match=r"no fxopt_router\.0\.weight"):
        MixtureOfDepths(0.5, every=1, router=str(tmp_path / "routers.safetensors"))(TINY["handwritten"]())


def test_reference_is_the_routed_model_itself():
    model, inputs = made()
    assert torch.equal(fxopt.reference(model)(**inputs), model(**inputs))
    dense = TINY["handwritten"]().train()
    meant = fxopt.reference(dense, MixtureOfDepths(0.5))
    assert torch.equal(meant(**inputs), model(**inputs))
    assert not routers(dense) and not any("router" in k for k in dense.state_dict())


# -- compiled -------------------------------------------------------------------------------------------------------


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
    assert all(("on the device" in r.message) == bool(dynamic) for r in told)
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
    assert remark.message == "its predictor decides: room for 4 of 12 tokens, all of them on overflow"


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


def test_gradients_accumulate_over_micro_batches():
    grads = []
    for parts in (1, 2):
        model, inputs = made(capacity=4)
        for ids in inputs["ids"].chunk(parts):
            ((model(ids).square().mean() + auxiliary_loss(model)) / parts).backward()
        grads.append([p.grad for p in model.parameters()])
    for whole, accumulated in zip(*grads, strict=True):
        torch.testing.assert_close(whole, accumulated)


def test_blocks_that_mix_neighbours_are_refused():
    model = TINY["handwritten"]()
    model.layers[1].extra = nn.Conv1d(64, 64, 3)
    with pytest.raises(SettingError, match=r"Conv1d in layers\.1 mixes each token with its neighbours"):
        MixtureOfDepths(0.5)(model)
    assert not routers(model) and "fxopt_router" not in dict(model.named_children())
    MixtureOfDepths(0.5, layers=(0,))(model)
    model.layers[0].extra = nn.GRU(64, 64)
    with pytest.raises(SettingError, match="running state"):
        MixtureOfDepths(0.5, layers=(0,))(model)


def _by_convolution(x):
    kernel = torch.ones(x.shape[-1], 1, 3, device=x.device)
    return nn.functional.conv1d(x.transpose(1, 2), kernel, padding=1, groups=x.shape[-1]).transpose(1, 2)


def _by_linear_attention(x):
    return x @ (x.transpose(-1, -2).softmax(-1) @ x)


def _by_attention(x):
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    return (x @ x.transpose(-1, -2)).masked_fill(~mask, float("-inf")).softmax(-1) @ x


def _by_channel(x):
    return x.cumsum(-1) + x.mean(-1, keepdim=True) + (x @ torch.eye(x.shape[-1], device=x.device)).sum(2, keepdim=True)


MIXING = [
    (_by_convolution, "conv1d"),
    (lambda x: x.roll(1, 1), "roll"),
    (lambda x: x.cumsum(1), "cumsum"),
    (lambda x: torch.cumsum(x.unflatten(-1, (4, -1)).transpose(1, 2), dim=-2).transpose(1, 2).flatten(2), "cumsum"),
    (_by_linear_attention, "matmul"),
    (lambda x: x.mean(1, keepdim=True), "mean"),
]


def with_forward(mix):
    """A hand-written model whose layer 1 adds `mix` of its stream to it."""

    class Mixing(type(TINY["handwritten"]().layers[1])):
        def forward(self, x):
            return x + mix(x)

    model = TINY["handwritten"]()
    model.layers[1] = Mixing(64, 4)
    return MixtureOfDepths(0.5)(model)


@pytest.mark.parametrize(("mix", "name"), MIXING)
def test_a_forward_that_mixes_tokens_is_blocked_with_the_reason(eager_lowering, mix, name):
    """Nothing but the captured graph shows what no module stands for. What is computed is what eager computes."""
    model = with_forward(mix).train()
    inputs = inputs_for("handwritten", model)
    expected = model(**inputs)
    fxopt.compile(model)
    with pytest.warns(UserWarning, match=rf"FX209 \w*{name}\w* in layers\.1 mixes each token"):
        torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match="FX209"):
        fxopt.compile(model, strict=True)(**inputs)


@pytest.mark.parametrize(("mix", "name"), MIXING)
def test_in_eval_it_is_refused(eager_lowering, mix, name):
    """It would meet the tokens that fill rows up, and a compiled graph has others of them than eager."""
    model = with_forward(mix).eval()
    routers(model)["layers.1"].trained = True
    fxopt.compile(model)
    with torch.no_grad(), pytest.raises(Exception, match=rf"{name}\w* in layers\.1 mixes .* Route other layers"):
        model(**inputs_for("handwritten", model))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mix", [_by_attention, _by_channel])
def test_attention_and_sums_over_channels_are_routed(eager_lowering, mix, training):
    model = with_forward(mix).train(training)
    routers(model)["layers.1"].trained = True
    inputs = inputs_for("handwritten", model)
    expected = model(**inputs)
    fxopt.compile(model, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)
    assert fxopt.report(model).count("mixture_of_depths") == 1


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


def test_through_options_without_routers_it_says_what_to_write(eager_lowering):
    model = TINY["handwritten"]()
    ids = inputs_for("handwritten", model)["ids"]
    compiled = torch.compile(model, backend="fxopt", options={"mixture_of_depths": {"capacity": 0.5}})
    with pytest.warns(UserWarning, match=r"write MixtureOfDepths\(capacity=0.5\)\(model\)"):
        found = compiled(ids)
    assert torch.equal(found, model(ids))


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


@pytest.mark.slow
def test_the_example_runs(eager_lowering, capsys):
    path = pathlib.Path(__file__).parents[2] / "examples" / "mixture_of_depths.py"
    runpy.run_path(str(path))["main"](layers=2, width=64, length=32, steps=1, rounds=1, dense_backend="eager")
    printed = capsys.readouterr().out
    assert "4 of 32 tokens are computed" in printed and "model.layers.1" in printed and "generated:" in printed
