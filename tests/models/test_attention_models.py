"""Attention of whole architectures: exact counts, and real generation token for token like the uncompiled model."""

from __future__ import annotations

import pytest
import torch

import fxopt
import fxopt.passes.cache_extent
import fxopt.passes.gqa_packing
import fxopt.passes.mask_structure
from fxopt.passes.attention import find_attentions
from fxopt.passes.kv import cache_of
from fxopt.testing import TINY, capture, capture_generate, inputs_for

pytest.importorskip("transformers")

COUNTS = {
    "llama": 3, "qwen2": 3, "qwen3": 3, "mistral": 3, "gemma2": 3, "gemma3_text": 4, "phi3": 3, "gpt2": 3,
    "gpt_neox": 3, "opt": 3, "falcon": 3, "mixtral": 3, "bert": 3, "roberta": 3, "vit": 3, "t5": 9, "bart": 8,
    "gpt_oss": 3, "handwritten": 3,
}  # fmt: skip
EAGER_ONLY = ("gemma2", "gpt_oss")
SDPA_ONLY = ("falcon", "handwritten")
FORWARDS = [
    (name, form)
    for name in COUNTS
    for form in ("sdpa", "eager")
    if not (form == "sdpa" and name in EAGER_ONLY) and not (form == "eager" and name in SDPA_ONLY)
]


def build(name, form):
    model = TINY[name]()
    if name not in SDPA_ONLY:
        model.set_attn_implementation(form)
        for module in model.modules():  # transformers 5.17 leaves out the configs that T5 copies for its stacks
            if hasattr(module, "config"):
                module.config._attn_implementation = form
    return model


@pytest.mark.parametrize(("name", "form"), FORWARDS)
def test_counts(name, form):
    model = build(name, form)
    (graph_module,) = capture(model, **inputs_for(name, model))
    sites, near = find_attentions(graph_module.graph)
    assert len(sites) == COUNTS[name]
    assert {site.form for site in sites} == {form}
    assert not near
    grouped = name in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "mixtral", "gpt_oss")
    assert {site.group for site in sites} == {4 if name == "falcon" else 2 if grouped else 1}
    assert {site.soft_cap for site in sites} == {50.0 if name == "gemma2" else 0.0}
    assert {site.sinks is not None for site in sites} == {name == "gpt_oss"}


@pytest.mark.parametrize(("cache", "kinds"), [("static", ["static", "static"]), ("dynamic", ["dynamic"] * 3)])
def test_cache_facts_of_llama(cache, kinds):
    graphs = capture_generate(build("llama", "sdpa"), torch.randint(3, 128, (2, 5)), cache=cache)
    found = [{cache_of(site).kind for site in find_attentions(g.graph)[0]} for g in graphs]
    assert found == [{kind} for kind in kinds]


def test_a_window_slides_once_it_is_full():
    graphs = capture_generate(build("mistral", "sdpa"), torch.randint(3, 128, (2, 5)), cache="static", new_tokens=8)
    kinds = [{cache_of(site).kind for site in find_attentions(g.graph)[0]} for g in graphs]
    assert kinds == [{"static"}, {"static"}, {"sliding"}]


def generated(model, ids, mask, cache, tokens):
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            cache_implementation="static" if cache == "static" else None,
        )  # fmt: skip


def left_padded(length=5):
    ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    ids[0, :2] = mask[0, :2] = 0
    return ids, mask


@pytest.mark.parametrize(
    ("name", "form", "cache", "packed", "bounded"),
    [
        ("llama", "sdpa", "static", 3, 3),
        ("llama", "eager", "dynamic", 3, 0),
        ("gemma2", "eager", "static", 3, 3),
        ("gpt_oss", "eager", "static", 3, 3),
        ("mistral", "sdpa", "static", 3, 3),
        ("falcon", "sdpa", "static", 3, 3),
        ("gpt2", "sdpa", "static", 0, 3),
        ("t5", "eager", "static", 0, 3),
    ],
)
def test_generation(name, form, cache, packed, bounded, eager_lowering):
    """`packed`, `bounded`: attentions of the last decode graph; the sliding windows of 8 fill and slide on the way."""
    model = build(name, form)
    ids, mask = left_padded()
    expected = generated(model, ids, mask, cache, 6)
    fxopt.compile(model)
    assert torch.equal(generated(model, ids, mask, cache, 6), expected)
    last = [r for r in fxopt.report(model).graphs if "attention" in str(r.remarks) or r.remarks][-1]
    assert (last.count("gqa_packing"), last.count("cache_extent")) == (packed, bounded)


def test_generation_through_inductor():
    model = build("llama", "sdpa")
    ids, mask = left_padded()
    expected = generated(model, ids, mask, "static", 6)
    fxopt.compile(model)
    assert torch.equal(generated(model, ids, mask, "static", 6), expected)
    assert fxopt.report(model).count("cache_extent") >= 3


def test_prompts_without_a_cache_get_their_structure(eager_lowering):
    cases = [("llama", "eager"), ("llama", "sdpa"), ("mistral", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")]
    for name, form in cases:
        torch._dynamo.reset()  # transformers 5.17 has one frame for all models: a second scale would be a symbol
        model = build(name, form)
        inputs = inputs_for(name, model)
        with torch.no_grad():
            expected = model(**inputs).logits
            got = fxopt.compile(model)(**inputs).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert fxopt.report(model).count("mask_structure") == 3


def test_switched_off_one_by_one(eager_lowering):
    model = build("llama", "sdpa")
    ids, mask = left_padded()
    expected = generated(model, ids, mask, "static", 4)
    for disable, packed, bounded in ((("gqa_packing",), 0, 0), (("cache_extent",), 3, 0)):
        fxopt.compile(model, disable=disable)
        assert torch.equal(generated(model, ids, mask, "static", 4), expected)
        last = fxopt.report(model).graphs[-1]
        assert (last.count("gqa_packing"), last.count("cache_extent")) == (packed, bounded)


@pytest.mark.parametrize(("name", "form"), [("llama", "sdpa"), ("mistral", "eager"), ("gemma2", "eager")])
def test_a_training_step_has_the_models_gradients(name, form, eager_lowering):
    """No operator of ours is put where gradients are recorded; what the library knows by name it may get."""
    model = build(name, form)
    ids = inputs_for(name, model)["input_ids"]

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = gradients()
    fxopt.compile(model)
    for parameter, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[parameter], atol=1e-5, rtol=1e-4)
    report = fxopt.report(model)
    assert report.count("gqa_packing") == report.count("cache_extent") == 0
    assert report.count("mask_structure") == (3 if name == "llama" else 0)
