"""Routers of mixture of depths as parts of a model: saved, copied, exchanged, taken away; and their warnings."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from mod_harness import B, S, made
from torch import nn

import fxopt
from fxopt import SettingError
from fxopt.passes.mixture_of_depths import MixtureOfDepths, unroute
from fxopt.passes.mod_counters import watching
from fxopt.passes.mod_reference import routers
from fxopt.testing import TINY, Handwritten, inputs_for


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


def test_an_untrained_predictor_warns_once_and_says_how():
    model = TINY["handwritten"]()
    ids = inputs_for("handwritten", model)["ids"]
    MixtureOfDepths(0.5, every=1)(model).eval()
    twin = copy.deepcopy(model)
    for each in (model, twin):  # once for all of its layers, and for each model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                each(ids)
        (told,) = caught
        assert "layers.0 was never trained" in str(told.message) and "auxiliary_loss" in str(told.message)


def test_through_options_without_routers_it_says_what_to_write(eager_lowering):
    model = TINY["handwritten"]()
    ids = inputs_for("handwritten", model)["ids"]
    compiled = torch.compile(model, backend="fxopt", options={"mixture_of_depths": {"capacity": 0.5}})
    with pytest.warns(UserWarning, match=r"write MixtureOfDepths\(capacity=0.5\)\(model\)"):
        found = compiled(ids)
    assert torch.equal(found, model(ids))
