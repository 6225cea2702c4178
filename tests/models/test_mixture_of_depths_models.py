"""Mixture of depths on Hugging Face models: compiled like eager, and decoded step by step like all at once."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from mod_harness import decided, made

import fxopt
from fxopt import SettingError
from fxopt.codegen import compat
from fxopt.passes.mixture_of_depths import MixtureOfDepths, unroute
from fxopt.passes.mod_counters import watching
from fxopt.passes.mod_reference import routers
from fxopt.passes.provenance import inner_graphs
from fxopt.testing import TINY, inputs_for

pytest.importorskip("transformers")

MODELS = ["llama", "qwen3", "gpt2", "gemma2"]


def in_parts(model, ids, cache):
    """Logits of 21 tokens: a prompt of 6, a chunk of 4, then one at a time."""
    pieces = [(0, 6), (6, 10), *((i, i + 1) for i in range(10, 21))]
    return torch.cat([model(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in pieces], 1)


@pytest.mark.parametrize("name", MODELS)
def test_capacity_one_with_weight_one_is_the_dense_model(name):
    model, inputs = made(name, training=True, capacity=1.0)
    dense, _ = made(name, training=True)
    for router in routers(model).values():
        router.forward = lambda x: torch.ones(x.shape[:2])
    with torch.no_grad():
        expected = unroute(dense)(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_predictor_looks_at_nothing_that_follows_and_top_c_does(name):
    for training in (False, True):
        model, inputs = made(name, training, capacity=3, layers=(0, 1))
        ids = inputs["input_ids"]
        differ = []
        with torch.no_grad():
            before = model(input_ids=ids, use_cache=False).logits
            for place in range(1, ids.shape[1]):
                changed = ids.clone()
                changed[:, place] = (changed[:, place] + 1) % model.config.vocab_size
                after = model(input_ids=changed, use_cache=False).logits
                differ.append((before - after)[:, :place].abs().max() > 1e-4)
        assert any(differ) == training


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("training", "dynamic", "batch"),
    [(True, True, 2), (True, False, 2), (True, False, 1), (False, None, 2), (False, None, 1)],
)
def test_compiled_is_eager(eager_lowering, name, training, dynamic, batch):
    model, inputs = made(name, training, batch, length=20)
    with torch.no_grad():
        fxopt.compile(model, dynamic=dynamic, strict=True)
        torch.testing.assert_close(model(**inputs).logits, model.forward(**inputs).logits, rtol=1e-4, atol=1e-4)
        if dynamic is not False:
            longer = inputs_for(name, model, batch=batch, length=31)
            found = model(**longer).logits
            torch.testing.assert_close(found, model.forward(**longer).logits, rtol=1e-4, atol=1e-4)
    remarks = [r for r in fxopt.report(model).remarks if r.technique == "mixture_of_depths"]
    assert {(r.status, r.path.rpartition(".")[2]) for r in remarks} == {("applied", "1")}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_step_by_step_is_all_at_once(name, batch):
    """Prompt, a chunk of several tokens, then single tokens; Gemma 2 with its window of 8 filled and passed."""
    from transformers import DynamicCache

    from fxopt.passes.mod_cache import GROWTH

    model, inputs = made(name, training=False, batch=batch, length=21, layers=(0, 1))
    ids = inputs["input_ids"]
    with torch.no_grad(), watching(model) as routes:
        whole = model(input_ids=ids, use_cache=False).logits
        chosen = routes()
        cache = DynamicCache(config=model.config)
        parts = in_parts(model, ids, cache)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    for index, layer in enumerate(cache.layers[:2]):
        path = next(p for p in chosen if p.endswith(f".{index}"))
        assert layer.get_seq_length() == 21
        for row in range(batch):
            written = layer.positions[row][layer.positions[row] >= 0]
            assert written.tolist() == chosen[path][row].nonzero()[:, 0].tolist()
        if batch == 1:
            assert layer.keys.shape[2] <= int(chosen[path].sum()) + GROWTH


def test_a_block_whose_rows_all_decline_is_not_run():
    from transformers import DynamicCache

    model, inputs = made("llama", training=False)
    calls = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    router = routers(model)["model.layers.1"]
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=inputs["input_ids"], past_key_values=cache)
        for weight, runs in ((0.0, 0), (1.0, 1)):
            router.forward = lambda x, weight=weight: torch.full(x.shape[:2], weight)
            calls.clear()
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
            assert len(calls) == runs


def test_left_padding_and_a_cropped_cache():
    from transformers import DynamicCache

    model, inputs = made("llama", training=False, batch=1)
    ids = inputs["input_ids"]
    with torch.no_grad():
        alone = model(input_ids=ids, use_cache=False).logits[:, -1]
        padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
        mask = torch.ones_like(padded)
        mask[:, :4] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        first = {"attention_mask": mask[:, :10], "position_ids": positions[:, :10]}
        model(input_ids=padded[:, :10], past_key_values=cache, **first)
        model(input_ids=ids[:, :3], past_key_values=cache)  # a draft, rolled back
        cache.crop(-3)
        rest = {"attention_mask": mask, "position_ids": positions[:, 10:]}
        found = model(input_ids=padded[:, 10:], past_key_values=cache, **rest).logits[:, -1]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_what_forwards_without_a_cache_say(beams):
    model, inputs = made("llama", training=False)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    found = model.generate(inputs["input_ids"], use_cache=True, **settings)
    assert torch.equal(found, model.generate(inputs["input_ids"], use_cache=False, **settings))


@pytest.mark.parametrize("compiled", [False, True])
def test_generating_with_untrained_predictors_warns_once_and_says_how(eager_lowering, compiled):
    model = MixtureOfDepths(0.5, every=1)(TINY["llama"]()).eval()
    ids = inputs_for("llama", model, batch=1, length=6)["input_ids"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if compiled:
            fxopt.compile(model)
        for _ in range(2):
            model.generate(ids, max_new_tokens=3, do_sample=False)
    (told,) = [str(w.message) for w in caught if "predictor" in str(w.message)]
    assert "auxiliary_loss" in told and "model.layers.0" in told


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_of_the_compiled_model(eager_lowering, cache):
    model, inputs = made("llama", training=False)
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(inputs["input_ids"], **settings)
    settings["cache_implementation"] = cache
    assert torch.equal(model.generate(inputs["input_ids"], **settings), expected)
    fxopt.compile(model)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        assert torch.equal(model.generate(inputs["input_ids"], **settings), expected)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_static_cache_step_by_step_is_all_at_once(name, batch):
    """Prompt, a chunk, single tokens; Gemma 2 past its window of 8, with both its kinds of layers routed."""
    from transformers import StaticCache

    model, inputs = made(name, training=False, batch=batch, length=21, layers=(0, 1))
    ids = inputs["input_ids"]
    with torch.no_grad(), watching(model) as routes:
        whole = model(input_ids=ids, use_cache=False).logits
        chosen = routes()
        cache = StaticCache(config=model.config, max_cache_len=24)
        for _ in range(2):  # once more after a reset
            torch.testing.assert_close(in_parts(model, ids, cache), whole, rtol=1e-4, atol=1e-4)
            for index, layer in enumerate(cache.layers[:2]):
                path = next(p for p in chosen if p.endswith(f".{index}"))
                assert int(layer.get_seq_length()) == 21
                assert torch.equal(layer.positions[:, :21] >= 0, chosen[path])
                assert torch.equal(layer.counts, chosen[path].sum(1))
            cache.reset()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "growing"),
        ("gemma2", "static"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("llama", "static"), ("gemma2", "growing"), ("qwen3", "growing"), ("qwen3", "static"), ("gpt2", "growing"),
            ("gpt2", "static"),
        )),
    ],
)  # fmt: skip
def test_compiled_prompt_and_decode_are_whole_graphs(eager_lowering, name, kind):
    """No graph break, the same logits as all at once, blocks skipped; Gemma 2 past its window of 8."""
    from transformers import DynamicCache, StaticCache

    model, inputs = made(name, training=False, batch=2, length=16, layers=(0, 1))
    ids = inputs["input_ids"]
    with torch.no_grad(), watching(model) as routes:
        whole = model(input_ids=ids, use_cache=False).logits
        chosen = routes()
    declined = sum(int((~taken[:, 8:]).all(0).sum()) for taken in chosen.values())
    pieces = [(0, 6), (6, 8), *((i, i + 1) for i in range(8, 16))]
    with torch.no_grad():
        fxopt.compile(model, strict=True)
        model(input_ids=ids[:, :1])  # the first call with a cache is eager and shows what the blocks write
        torch._dynamo.utils.counters.clear()
        cache = StaticCache(model.config, max_cache_len=24) if kind == "static" else DynamicCache(config=model.config)
        found = [model(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in pieces]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    remarks = [r for r in fxopt.report(model).remarks if r.technique == "mixture_of_depths"]
    assert {r.status for r in remarks} == {"applied"}
    skips = "a step in which every row declines skips the block"
    assert remarks[-1].message == decided(skips, products=4 if name == "gpt2" else 7)
    assert declined  # a step in which the block was skipped is among them


@pytest.mark.skipif(not compat.cond_may_write(), reason="branches may not write a cache here")
@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_passes_act_in_the_branch_of_a_step(monkeypatch, name, kind):
    """A routed layer's attention stands in a branch, and is packed and bounded there like those of dense layers."""
    from transformers import DynamicCache, StaticCache

    graphs = []
    monkeypatch.setattr(compat, "compile_with_inductor", lambda gm, *_: graphs.append(gm) or gm.forward)
    model, inputs = made(name, training=False, layers=(1,))
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = StaticCache(model.config, max_cache_len=24) if kind == "static" else DynamicCache(config=model.config)
        model(input_ids=ids[:, :8], past_key_values=cache)
        fxopt.compile(model, strict=True)
        found = model(input_ids=ids[:, 8:9], past_key_values=cache).logits
    torch.testing.assert_close(found, whole[:, 8:9], rtol=1e-4, atol=1e-4)
    report, layers = fxopt.report(model), model.config.num_hidden_layers
    grouped = name != "gpt2"
    assert report.count("gqa_packing") == (layers if grouped else 0)
    assert report.count("cache_extent") == (layers if kind == "static" else 1)
    held = {n: [str(o.target) for o in b.graph.nodes if "fxopt." in str(o.target)] for n, b in
            inner_graphs(graphs[-1].graph).items()}  # fmt: skip
    assert held == {"cond_true_0": ["fxopt.attention.default"], "cond_false_0": []}
    attention = "transformer.h.1.attn" if name == "gpt2" else "model.layers.1.self_attn"
    for technique in ["cache_extent", *(["gqa_packing"] if grouped else [])]:
        told = report.why(technique, attention)
        assert told.startswith(f"{technique} was applied at {attention}") and "(in the branch cond_true_0)" in told


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_step_through_inductor_writes_the_cache_in_place(kind):
    """No buffer of the size of a layer's cache is made: a copy of it would cost more than the layer saves."""
    from torch._inductor.utils import run_and_get_code
    from transformers import DynamicCache, StaticCache

    model, inputs = made("llama", training=False, batch=1, layers=(1,))
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = StaticCache(model.config, max_cache_len=56) if kind == "static" else DynamicCache(config=model.config)
        model(input_ids=ids[:, :8], past_key_values=cache)
        cells = cache.layers[1].keys.shape[2]
        fxopt.compile(model, strict=True)
        found, codes = run_and_get_code(lambda: model(input_ids=ids[:, 8:9], past_key_values=cache).logits)
    torch.testing.assert_close(found, whole[:, 8:9], rtol=1e-4, atol=1e-4)
    code = "\n".join(codes)
    assert f"2, {cells}, 16)" in code  # the cache is an operand
    assert not re.search(rf"empty_strided\w*\(\(1, 2, {cells}, 16\)", code)


def test_a_growing_cache_keeps_cells_for_routed_tokens_alone(eager_lowering, monkeypatch):
    """Past its limit it is enlarged between two calls, with one look at the device, and no graph breaks."""
    from transformers import DynamicCache

    from fxopt.passes import mod_cache

    monkeypatch.setattr(mod_cache, "GROWTH", 8)
    model, inputs = made("llama", training=False, batch=2, length=64, layers=(1, 2), capacity=0.125)
    routers(model)["model.layers.1"].logits = lambda x, score: score - score.new_tensor(1.0)
    ids = inputs["input_ids"]
    looks = []
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        fxopt.compile(model, strict=True)
        model(input_ids=ids[:, :1])
        torch._dynamo.utils.counters.clear()
        cache = DynamicCache(config=model.config)
        found = [model(input_ids=ids[:, :12], past_key_values=cache).logits]
        for layer in cache.layers[1:3]:
            reserve = layer.reserve
            monkeypatch.setattr(layer, "reserve", lambda *a, do=reserve: (looks.append(1), do(*a)))
        found += [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(12, 64)]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(fxopt.report(model).graphs) <= 4  # a prompt, a step, a step of symbolic lengths and sizes
    routed = [layer for layer in cache.layers if getattr(layer, "routed", False)]
    most = max(int(layer.counts.max()) for layer in routed)
    (cells,) = {layer.keys.shape[2] for layer in routed}
    assert most < 40 and cells <= most + 16
    assert len(looks) == 2 * 7  # both layers, at 12, 16, 24, ... 56


def test_a_compiled_step_that_declines_does_not_run_the_block(eager_lowering):
    """The block's weights are poisoned: had it run, its keys in the cache were NaN."""
    from transformers import StaticCache

    model, inputs = made("llama", training=False, batch=2, length=9)
    ids = inputs["input_ids"]
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=12)
        model(input_ids=ids[:, :8], past_key_values=cache)
        for parameter in model.model.layers[1].parameters():
            parameter.fill_(torch.nan)
        fxopt.compile(model, strict=True)
        for weight, runs in ((0.0, False), (1.0, True)):
            routers(model)["model.layers.1"].logits = lambda x, score, weight=weight: torch.full_like(score, weight)
            torch._dynamo.reset()
            step = model(input_ids=ids[:, 8:9], past_key_values=cache).logits
            assert bool(step.isnan().any()) == runs
            assert bool(cache.layers[1].keys.isnan().any()) == runs


def test_static_rewind_reorder_and_two_conversations():
    from transformers import StaticCache

    model, inputs = made("llama", training=False, batch=2, length=14, layers=(0, 1))
    ids = inputs["input_ids"]
    other = ids.flip(1)
    with torch.no_grad():
        whole, flipped = (model(input_ids=x, use_cache=False).logits for x in (ids, other))
        caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
        for start, stop in ((0, 8), (8, 11)):
            for cache, x, expected in zip(caches, (ids, other), (whole, flipped), strict=True):
                found = model(input_ids=x[:, start:stop], past_key_values=cache).logits
                torch.testing.assert_close(found, expected[:, start:stop], rtol=1e-4, atol=1e-4)
        model(input_ids=other[:, 3:6], past_key_values=caches[0])  # a draft, rolled back
        for layer in caches[0].layers:
            layer.cumulative_length.fill_(11)
        caches[0].reorder_cache(torch.tensor([1, 0]))
        found = model(input_ids=ids[:, 11:14].flip(0), past_key_values=caches[0]).logits
    torch.testing.assert_close(found, whole[:, 11:14].flip(0), rtol=1e-4, atol=1e-4)


def test_static_cache_with_left_padding():
    from transformers import StaticCache

    model, inputs = made("llama", training=False, batch=1, layers=(0, 1))
    ids = inputs["input_ids"]
    with torch.no_grad():
        alone = model(input_ids=ids, use_cache=False).logits[:, -1]
        padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
        mask = torch.ones_like(padded)
        mask[:, :4] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = StaticCache(config=model.config, max_cache_len=24)
        for start, stop in ((0, 10), (10, 16)):
            rest = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            found = model(input_ids=padded[:, start:stop], past_key_values=cache, **rest).logits[:, -1]
        assert not (cache.layers[1].positions[:, :4] >= 0).any()
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_caches_that_cannot_leave_rows_out_are_refused():
    from transformers import DynamicCache, StaticCache

    model, inputs = made("llama", training=False)
    ids = inputs["input_ids"]
    with torch.no_grad():
        static = StaticCache(config=model.config, max_cache_len=32)
        TINY["llama"]()(input_ids=ids, past_key_values=static)
        with pytest.raises(SettingError, match="Start from an empty cache"):
            model(input_ids=ids, past_key_values=static)
        cache = DynamicCache(config=model.config)
        TINY["llama"]()(input_ids=ids, past_key_values=cache)
        with pytest.raises(SettingError, match="Start from an empty cache"):
            model(input_ids=ids, past_key_values=cache)
        cache = model.train()(input_ids=ids).past_key_values
        with pytest.raises(SettingError, match=r"Fill it in model\.eval"):
            model.eval()(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(("name", "says"), [("t5", "encoder-decoder"), ("bert", "not causal")])
def test_only_decoders_are_routed(name, says):
    with pytest.raises(SettingError, match=says):
        MixtureOfDepths(0.5)(TINY[name]())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_parts_step_by_step_and_compiled(eager_lowering, part):
    from transformers import DynamicCache

    model, inputs = made("llama", training=False, length=13, part=part)
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = model(**inputs).logits
        cache = DynamicCache(config=model.config)
        steps = [(0, 5), (5, 8), *((i, i + 1) for i in range(8, 13))]
        found = [model(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in steps]
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
        fxopt.compile(model, strict=True)
        torch.testing.assert_close(model(**inputs).logits, whole, rtol=1e-4, atol=1e-4)
    (remark,) = [r for r in fxopt.report(model).remarks if r.technique == "mixture_of_depths"]
    products = 2 * (4 if part == "attention" else 3)  # once for the room, once for every token
    assert remark.message == decided("room for 9 of 13 tokens, all of them on overflow", products)
