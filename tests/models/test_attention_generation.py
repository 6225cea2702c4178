"""Greedy generation of every architecture that generates: token for token like the uncompiled model, exact counts.

``packed`` and ``bounded`` are the attentions of the last decode graph in which the KV heads are read unrepeated, and in
which only the filled part of the cache is read.
"""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.passes.attention import find_attentions
from fxopt.passes.kv import cache_of
from fxopt.passes.masks import facts_of
from fxopt.testing import TINY, capture, capture_generate

pytest.importorskip("transformers")


def phi3_with_a_window():
    model = TINY["phi3"]()
    return type(model)._from_config(type(model.config)(**model.config.to_dict() | {"sliding_window": 8})).eval()


WINDOWED = {"mistral": TINY["mistral"], "phi3": phi3_with_a_window, "gemma2": TINY["gemma2"]}
STATIC = {
    "llama": (3, 3), "qwen2": (3, 3), "qwen3": (3, 3), "mistral": (3, 3), "gemma2": (3, 3), "gemma3_text": (4, 4),
    "phi3": (3, 3), "gpt2": (0, 3), "gpt_neox": (0, 3), "opt": (0, 3), "falcon": (3, 3), "mixtral": (3, 3),
    "gpt_oss": (3, 3), "t5": (0, 3), "bart": (0, 3),
}  # fmt: skip
EAGER_ONLY = ("gemma2", "gpt_oss")
FORMS = [(name, form) for name in STATIC for form in ("sdpa", "eager") if form == "eager" or name not in EAGER_ONLY]


def build(name, form):
    model = TINY[name]()
    model.set_attn_implementation(form)
    return model


def generated(model, cache, tokens=6, length=5, **settings):
    ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    ids[0, :2] = mask[0, :2] = 0
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            cache_implementation="static" if cache == "static" else None, **settings,
        )  # fmt: skip


def last_counts(model):
    last = [graph for graph in fxopt.report(model).graphs if graph.remarks][-1]
    return last.count("gqa_packing"), last.count("cache_extent")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_static_cache(name, form, eager_lowering):
    model = build(name, form)
    expected = generated(model, "static")
    fxopt.compile(model)
    assert torch.equal(generated(model, "static"), expected)
    assert last_counts(model) == STATIC[name]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_dynamic_cache(name, form, eager_lowering):
    model = build(name, form)
    expected = generated(model, "dynamic", 4)
    fxopt.compile(model)
    assert torch.equal(generated(model, "dynamic", 4), expected)
    assert last_counts(model) == (STATIC[name][0], 0)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("length", [4, 8, 11])
def test_a_window_before_at_and_after_it_fills(name, length, eager_lowering):
    """A window of 8 keys: the prompt leaves room in it, fills it, or is longer; generation goes beyond in each case."""
    model = WINDOWED[name]()
    expected = generated(model, "static", 7, length)
    fxopt.compile(model)
    assert torch.equal(generated(model, "static", 7, length), expected)
    assert last_counts(model) == (3, 3)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
def test_a_prompt_in_chunks(form, eager_lowering):
    """Chunks of three tokens on a static cache: each attends to those before it."""
    model = build("llama", form)
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(2))

    def logits():
        from transformers import StaticCache

        cache = StaticCache(config=model.config, max_cache_len=24)
        cache.early_initialization(2, 2, 16, torch.float32, "cpu")
        parts = []
        with torch.no_grad():
            for start in range(0, 9, 3):
                place = torch.arange(start, start + 3)[None].expand(2, -1)
                mask = torch.arange(24) <= place[:, None, :, None]
                if form == "eager":
                    mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
                parts.append(
                    model(input_ids=ids[:, start : start + 3], position_ids=place, attention_mask=mask,
                          past_key_values=cache).logits
                )  # fmt: skip
        return torch.cat(parts, 1)

    expected = logits()
    fxopt.compile(model)
    torch.testing.assert_close(logits(), expected, atol=1e-5, rtol=1e-5)
    report = fxopt.report(model)
    assert last_counts(model) == (3, 3)
    assert len(report.graphs) == 1  # one graph for all chunks: the extent is data
    with torch.no_grad():
        torch.testing.assert_close(expected, model(input_ids=ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)


def test_generate_with_a_prompt_in_chunks(eager_lowering):
    model = build("llama", "sdpa")
    expected = generated(model, "static", 4, 9, prefill_chunk_size=3)
    fxopt.compile(model)
    assert torch.equal(generated(model, "static", 4, 9, prefill_chunk_size=3), expected)
    assert last_counts(model) == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_what_is_known_of_masks_and_caches_while_decoding(name, form):
    """The mask of a static decode step is an input, so nothing of it is inferred; caches are told apart."""
    graphs = capture_generate(build(name, form), torch.randint(3, 128, (2, 5)), new_tokens=8)
    sites, near = find_attentions(graphs[-1].graph)
    windows = {"mistral": 3, "gemma2": 2, "gemma3_text": 3, "gpt_oss": 2}.get(name, 0)
    kinds = [cache_of(site).kind for site in sites]
    crossed = 3 if name in ("t5", "bart") else 0
    assert (kinds.count("sliding"), kinds.count("fixed")) == (windows, crossed)
    assert kinds.count("static") == STATIC[name][1] - windows
    own = [{facts_of(bias.node).kind for bias in s.biases} for s in sites if cache_of(s).kind != "fixed"]
    assert own == [{"input"}] * STATIC[name][1]
    assert not near


MASKS = {
    "mistral": {"window": 3}, "gemma2": {"window": 2, "causal": 1}, "gemma3_text": {"window": 3, "causal": 1},
    "gpt_oss": {"window": 2, "causal": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt2"])
def test_what_is_known_of_masks_without_a_cache(name):
    model = TINY[name]()
    model.set_attn_implementation("eager")
    (graph,) = capture(model, input_ids=torch.randint(3, 128, (2, 12)), use_cache=False)
    facts = [facts_of(site.mask) for site in find_attentions(graph.graph)[0]]
    found = {kind: sum(f.kind == kind for f in facts) for kind in {f.kind for f in facts}}
    assert found == MASKS.get(name, {"causal": 3})
    assert {f.window for f in facts if f.kind == "window"} <= {8}
