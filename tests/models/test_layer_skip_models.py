"""LayerSkip on every architecture: exact counts, and the same as the Hugging Face model with those layers deleted."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt import LayerSkip
from fxopt.passes.modules import module_stacks
from fxopt.testing import TINY, inputs_for

pytest.importorskip("transformers")

HUGGING_FACE = [name for name in TINY if name != "handwritten"]
DECODERS = [n for n in HUGGING_FACE if n not in ("bert", "roberta", "vit", "t5", "bart")]


def first_tensor(output):
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_forward_equals_the_deleted_model(eager_lowering, name):
    model = TINY[name]()
    technique = LayerSkip(skip=(1,))
    inputs = inputs_for(name, model)
    with torch.no_grad():
        expected = first_tensor(fxopt.reference(model, technique)(**inputs))
        before = first_tensor(model(**inputs))
        fxopt.compile(model, technique, strict=True)
        found = first_tensor(model(**inputs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-4)
    assert fxopt.report(model).count("layer_skip") == len(module_stacks(model))


@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_part_equals_the_zeroed_part(eager_lowering, name, part):
    model = TINY[name]()
    technique = LayerSkip(skip=(1,), part=part)
    inputs = inputs_for(name, model)
    with torch.no_grad():
        expected = first_tensor(fxopt.reference(model, technique)(**inputs))
        fxopt.compile(model, technique, strict=True)
        found = first_tensor(model(**inputs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert fxopt.report(model).count("layer_skip") == len(module_stacks(model))


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", DECODERS)
def test_generates_what_the_deleted_model_generates(eager_lowering, name, cache):
    model = TINY[name]()
    technique = LayerSkip(skip=(0,))
    reference = fxopt.reference(model, technique)
    settings = {
        "max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "disable_compile": True,
        "cache_implementation": None if cache == "dynamic" else cache,
    }  # fmt: skip
    ids = torch.tensor([[5, 17, 3, 99, 42], [7, 8, 9, 10, 11]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = reference.generate(ids, attention_mask=mask, **settings)
        fxopt.compile(model, technique)
        found = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(found, expected)
    graphs = fxopt.report(model).graphs
    assert all(graph.count("layer_skip") == 1 for graph in graphs)
