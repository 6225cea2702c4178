"""Sparse attention together with other techniques and with sliding windows: what is generated equals the reference."""

from __future__ import annotations

import warnings

import pytest
import torch

import fxopt
from fxopt import EarlyExit, LayerSkip, MixtureOfDepths, SparseAttention
from fxopt.testing import TINY

METHODS = {
    "pages": SparseAttention(method="pages", budget=64, min_length=0),
    "double_sparsity": SparseAttention(
        method="double_sparsity", budget=32, min_length=0, channels=((0, 3, 8, 11), (1, 2, 9, 10))
    ),
    "sink_window": SparseAttention(window=6, sinks=2),
}
WRITES = pytest.mark.branches_write  # state beside a cache is kept up to date in the branches of an exit


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def generated(model, cache="static", tokens=8):
    ids = torch.randint(3, 128, (2, 90), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    ids[0, :5] = mask[0, :5] = 0
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            cache_implementation="static" if cache == "static" else None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return torch.stack(out.logits)


def compared(build, techniques, cache="static"):
    """The compiled model, after it generated what the reference generates."""
    dense = generated(fxopt.reference(build(), *techniques[:-1]) if techniques[1:] else build(), cache)
    meant = generated(fxopt.reference(build(), *techniques), cache)
    model = fxopt.compile(build(), *techniques)
    torch.testing.assert_close(generated(model, cache), meant, rtol=1e-4, atol=1e-4)
    return model, float((dense - meant).abs().max())


def counts(model):
    graph = fxopt.report(model).graphs[-1]
    return {name: graph.count(name) for name in ("layer_skip", "early_exit", "sparse_attention")}


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_layer_skip(cache, method, eager_lowering):
    model, moved = compared(TINY["llama"], (LayerSkip(skip=(1,)), method), cache)
    assert counts(model) == {"layer_skip": 1, "early_exit": 0, "sparse_attention": 2}
    assert moved > 1e-3


@pytest.mark.parametrize(("layers", "threshold"), [((1,), 0.0), ((1,), 0.02), ((1,), 0.999), ((1, 2), 0.02)])
@pytest.mark.parametrize(
    "method",
    [pytest.param("pages", marks=WRITES), pytest.param("double_sparsity", marks=WRITES), "sink_window"],
    indirect=True,
)
def test_early_exit(layers, threshold, method, eager_lowering):
    """Layers that an exit passes over do not keep the state beside their caches up to date; it is derived anew."""
    model, moved = compared(TINY["llama"], (EarlyExit(layers=layers, threshold=threshold), method))
    assert counts(model) == {"layer_skip": 0, "early_exit": len(layers), "sparse_attention": 3}
    assert moved > 1e-3


def test_two_early_exits_where_branches_must_not_write(method, eager_lowering, monkeypatch):
    """State would be written in branches: the exits are left out with a warning, and tokens stay right."""
    monkeypatch.setattr("fxopt.codegen.compat.cond_may_write", lambda: False)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        # No token is sure enough, so that the model without exits is what the pair means.
        model, _ = compared(TINY["llama"], (EarlyExit(layers=(1, 2), threshold=0.999), method))
    stateless = method.method == "sink_window"
    assert counts(model) == {"layer_skip": 0, "early_exit": 2 if stateless else 0, "sparse_attention": 3}
    assert any("early_exit" in str(w.message) or "EarlyExit" in str(w.message) for w in given) is not stateless


def test_mixture_of_depths_is_refused(method, eager_lowering):
    model = TINY["llama"]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its predictors were never trained
        with pytest.raises(Exception, match="holds fewer rows than tokens were seen"):
            generated(fxopt.compile(model, MixtureOfDepths(capacity=0.5), method))


def windowed(name, width):
    """A tiny model whose sliding layers see so many positions."""

    def build():
        model = TINY[name]()
        model.config.sliding_window = width
        for module in model.modules():
            if getattr(module, "sliding_window", None) is not None:
                module.sliding_window = width
        return model

    return build


@pytest.mark.parametrize(  # a window of 80 moves from the first step on, one of 95 after some
    ("width", "cache"),
    [(80, "static"), (95, "static"), (80, "dynamic"), pytest.param(95, "dynamic", marks=pytest.mark.slow)],
)
def test_a_hybrid_model_is_dense_in_its_windows_and_sparse_elsewhere(width, cache, method, eager_lowering):
    model, moved = compared(windowed("gemma3_text", width), (method,), cache)
    windows = 3 if method.method == "sink_window" else 0
    assert counts(model)["sparse_attention"] == 1 + windows
    assert moved > 1e-3
    remarks = [r for r in fxopt.report(model).graphs[-1].remarks if r.technique == "sparse_attention"]
    assert [r.code for r in remarks if r.status == "missed"] == ["FX208"] * (3 - windows)
    assert all("sliding" in r.message for r in remarks if r.status == "missed")


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_model_whose_layers_all_slide_says_why_nothing_acts(cache, eager_lowering):
    with pytest.warns(UserWarning, match="FX208.*sliding"):
        model, moved = compared(windowed("mistral", 80), (METHODS["pages"],), cache)
    assert counts(model)["sparse_attention"] == 0 and moved < 1e-5
