"""LayerSkip: its setting, the layers it keeps, and what the rewritten graph computes."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt import LayerSkip, SettingError
from fxopt.backend import Backend
from fxopt.options import Settings
from fxopt.testing import TINY, Handwritten

IDS = torch.tensor([[5, 17, 3, 99, 42, 8, 61]])


# -- the setting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of"),
        ({"skip": (1,), "keep": (0,)}, "exactly one of"),
        ({"skip": 3}, "skip=(3,)"),
        ({"skip": (1.5,)}, "no layer index"),
        ({"skip": (True,)}, "no layer index"),
        ({"keep": ()}, "at least one"),
        ({"speedup": 1}, "above 1"),
        ({"speedup": 0.5}, "above 1"),
        ({"speedup": float("nan")}, "above 1"),
        ({"speedup": "2"}, "a number"),
        ({"speedup": 1.5, "rule": "unified"}, "balanced"),
        ({"speedup": 2, "rule": "measured"}, "balanced"),
        ({"speedup": 2, "rule": "balancd"}, "Did you mean 'balanced'"),
        ({"skip": (1,), "rule": "unified"}, "leave it out"),
        ({"skip": (1,), "part": "atention"}, "Did you mean 'attention'"),
        ({"skip": (1,), "phase": "prefill"}, "'all', 'decode'"),
        ({"skip": (1,), "decide": "token"}, "not available"),
    ],
)
def test_a_setting_that_cannot_hold_raises(fields, words):
    with pytest.raises(SettingError) as error:
        LayerSkip(**fields)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("technique", "layers", "kept"),
    [
        (LayerSkip(skip=(1, -1)), 4, (0, 2)),
        (LayerSkip(keep=(0, -1)), 5, (0, 4)),
        (LayerSkip(skip=()), 3, (0, 1, 2)),
        (LayerSkip(speedup=2), 8, (0, 2, 5, 7)),
        (LayerSkip(speedup=1.5), 12, (0, 2, 3, 5, 6, 8, 9, 11)),
        (LayerSkip(speedup=12), 12, (0,)),
        (LayerSkip(speedup=2, rule="unified"), 32, (*range(0, 29, 2), 31)),
        (LayerSkip(speedup=3, rule="unified"), 32, (0, 3, 6, 9, 12, 15, 18, 21, 24, 31)),
    ],
)
def test_kept_layers(technique, layers, kept):
    assert technique.kept(layers) == kept


def released_rule(layers: int, speedup: int) -> list[int]:
    """The selection of Unified Layer Skipping's released code, written out from its description."""
    wanted = int(layers / speedup)
    interval = int(layers / (wanted - 2 + 1))
    chosen = {0, layers - 1}
    for index in range(1, layers - 1):
        if index % interval == 0 and len(chosen) < wanted:
            chosen.add(index)
    return sorted(chosen)


@given(st.integers(2, 96), st.integers(2, 12))
def test_unified_is_the_released_rule_or_refuses(layers, speedup):
    technique = LayerSkip(speedup=speedup, rule="unified")
    if int(layers / speedup) <= 1:
        with pytest.raises(SettingError, match="balanced"):
            technique.kept(layers)
    else:
        assert list(technique.kept(layers)) == released_rule(layers, speedup)


@given(st.integers(1, 128), st.floats(1.01, 20))
def test_balanced_keeps_what_was_promised(layers, speedup):
    technique = LayerSkip(speedup=speedup)
    if speedup > layers:
        with pytest.raises(SettingError):
            technique.kept(layers)
        return
    kept = technique.kept(layers)
    assert len(kept) == len(set(kept)) == int(layers / speedup)
    assert list(kept) == sorted(kept)
    assert kept[0] == 0
    if len(kept) > 1:
        assert kept[-1] == layers - 1
        gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("technique", "words"),
    [(LayerSkip(skip=(3,)), "0 to 2"), (LayerSkip(skip=(0, 1, 2)), "every one"), (LayerSkip(keep=(-4,)), "-3 to -1")],
)
def test_impossible_for_this_model_raises_at_once(technique, words):
    with pytest.raises(SettingError, match=words):
        fxopt.compile(Handwritten(), technique)


# -- what it computes -----------------------------------------------------------------------------------------------


def deleted(model: Handwritten, skipped: set[int]) -> Handwritten:
    """The model with those layers really gone, made here by hand."""
    other = Handwritten(layers=len(model.layers))
    other.load_state_dict(model.state_dict())
    other.layers = nn.ModuleList(layer for i, layer in enumerate(other.layers) if i not in skipped)
    return other.eval()


@pytest.mark.parametrize("skipped", [{0}, {1}, {2}, {0, 2}])
def test_equals_the_model_with_those_layers_deleted(eager_lowering, skipped):
    model = TINY["handwritten"]()
    expected = deleted(model, skipped)(IDS)
    assert torch.equal(fxopt.reference(model, LayerSkip(skip=tuple(skipped)))(IDS), expected)
    fxopt.compile(model, LayerSkip(skip=tuple(skipped)))
    assert torch.equal(model(IDS), expected)
    assert fxopt.report(model).count("layer_skip") == len(skipped)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_part_contributes_nothing(eager_lowering, part):
    model = TINY["handwritten"]()
    last = {"attention": "proj", "mlp": "down"}[part]
    zeroed = Handwritten().eval()
    zeroed.load_state_dict(model.state_dict())
    with torch.no_grad():
        getattr(zeroed.layers[1], last).weight.zero_()
        getattr(zeroed.layers[1], last).bias.zero_()
    fxopt.compile(model, LayerSkip(skip=(1,), part=part))
    torch.testing.assert_close(model(IDS), zeroed(IDS), rtol=1e-6, atol=1e-6)
    assert fxopt.report(model).count("layer_skip") == 1


def test_skipped_weights_are_not_read(eager_lowering):
    model = TINY["handwritten"]()
    with torch.no_grad():
        for parameter in model.layers[1].parameters():
            parameter.fill_(float("nan"))
    fxopt.compile(model, LayerSkip(skip=(1,)))
    assert model(IDS).isfinite().all()


def test_skipped_layers_train_and_gradients_equal_the_reference(eager_lowering):
    technique = LayerSkip(skip=(1,))
    model = TINY["handwritten"]().train()
    reference = fxopt.reference(model, technique).train()
    reference(IDS).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fxopt.compile(model, technique)
    model(IDS).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert not any(name.startswith("layers.1.") for name in found)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_dynamic_shapes_compile_once(eager_lowering):
    model = TINY["handwritten"]()
    technique = LayerSkip(skip=(0,))
    reference = fxopt.reference(model, technique)
    fxopt.compile(model, technique, dynamic=True)
    for length in (5, 9, 33):
        ids = torch.arange(length)[None] % 128
        torch.testing.assert_close(model(ids), reference(ids))
    assert len(fxopt.report(model).graphs) == 1


# -- phase="decode" -------------------------------------------------------------------------------------------------


def caches(model):
    from transformers import DynamicCache, StaticCache

    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=48),
    }


def conversation(model, cache, turns=(5, 1, 1, 4, 1, 2, 1)):
    """Feed chunks of these lengths on one cache; all logits."""
    generator = torch.Generator().manual_seed(7)
    logits = []
    with torch.no_grad():
        for length in turns:
            ids = torch.randint(2, 128, (1, length), generator=generator)
            logits.append(model(input_ids=ids, past_key_values=cache).logits)
    return torch.cat(logits, 1)


def eager_loop(model, cache, skipped, turns=(5, 1, 1, 4, 1, 2, 1)):
    """All layers on chunks, the kept ones in decode steps, written out for a tiny Llama.

    A layer that was skipped attends, in later chunks, to the rows it wrote.
    """
    generator = torch.Generator().manual_seed(7)
    inner = model.model
    kept_keys: list[list[torch.Tensor]] = [[] for _ in inner.layers]
    kept_values: list[list[torch.Tensor]] = [[] for _ in inner.layers]
    position, logits = 0, []
    with torch.no_grad():
        for length in turns:
            ids = torch.randint(2, 128, (1, length), generator=generator)
            x = inner.embed_tokens(ids)
            positions = torch.arange(position, position + length)[None]
            cos, sin = inner.rotary_emb(x, positions)
            decode = length == 1 and position > 0
            for number, layer in enumerate(inner.layers):
                if decode and number in skipped:
                    continue
                x = _llama_layer(layer, x, cos, sin, kept_keys[number], kept_values[number])
            logits.append(model.lm_head(inner.norm(x)))
            position += length
    return torch.cat(logits, 1)


def _llama_layer(layer, x, cos, sin, keys, values):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention = layer.self_attn
    normed = layer.input_layernorm(x)
    batch, length, _ = normed.shape
    shape = (batch, length, -1, attention.head_dim)
    q, k, v = (p(normed).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    past = sum(t.shape[2] for t in keys)
    keys.append(k)
    values.append(v)
    mask = torch.ones(length, past + length).tril(past).bool()
    out = nn.functional.scaled_dot_product_attention(
        q, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask, enable_gqa=True
    )
    x = x + attention.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
    return x + layer.mlp(layer.post_attention_layernorm(x))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decode_phase_equals_the_eager_loop_over_turns(eager_lowering, kind):
    model = TINY["llama"]()
    technique = LayerSkip(skip=(1,), phase="decode")
    make = caches(model)[kind]
    expected = eager_loop(model, None, {1})
    torch.testing.assert_close(conversation(fxopt.reference(model, technique), make()), expected, rtol=1e-4, atol=1e-5)
    fxopt.compile(model, technique)
    torch.testing.assert_close(conversation(model, make()), expected, rtol=1e-4, atol=1e-5)
    statuses = {g.count("layer_skip") for g in fxopt.report(model).graphs}
    assert statuses == {0, 1}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_one_token_prompt_runs_every_layer(eager_lowering, kind):
    model = TINY["llama"]()
    make = caches(model)[kind]
    expected = conversation(fxopt.reference(model), make(), turns=(1,))
    fxopt.compile(model, LayerSkip(skip=(0, 1), phase="decode"))
    conversation(model, make(), turns=(4, 1, 1))  # the decode graph exists by now
    torch.testing.assert_close(conversation(model, make(), turns=(1,)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_several_tokens_on_a_filled_cache_run_every_layer(eager_lowering, kind):
    model = TINY["llama"]()
    make = caches(model)[kind]
    turns = (3, 4, 2)
    expected = conversation(fxopt.reference(model), make(), turns)
    fxopt.compile(model, LayerSkip(skip=(1,), phase="decode"))
    torch.testing.assert_close(conversation(model, make(), turns), expected, rtol=1e-4, atol=1e-5)


def test_two_conversations_do_not_mix_and_reset_starts_anew(eager_lowering):
    model = TINY["llama"]()
    technique = LayerSkip(skip=(1,), phase="decode")
    reference = fxopt.reference(model, technique)
    make = caches(model)["static"]
    alone = conversation(reference, make())
    fxopt.compile(model, technique)
    first, second = make(), make()
    generator = torch.Generator().manual_seed(7)
    logits = []
    with torch.no_grad():
        for length in (5, 1, 1, 4, 1, 2, 1):
            ids = torch.randint(2, 128, (1, length), generator=generator)
            logits.append(model(input_ids=ids, past_key_values=first).logits)
            model(input_ids=(ids + 9) % 128, past_key_values=second)
    torch.testing.assert_close(torch.cat(logits, 1), alone, rtol=1e-4, atol=1e-5)
    second.reset()
    torch.testing.assert_close(conversation(model, second), alone, rtol=1e-4, atol=1e-5)


# -- what it must not do --------------------------------------------------------------------------------------------


class Funnel(nn.Module):
    """Repeated blocks whose width changes: nothing that could be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(w, w // 2), nn.ReLU()) for w in (64, 32, 16))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_no_layers_is_one_warning_and_the_model_runs(eager_lowering):
    model = Funnel()
    x = torch.randn(2, 64)
    expected = model(x)
    fxopt.compile(model, LayerSkip(skip=(1,)))
    with pytest.warns(UserWarning, match="FX112") as caught:
        assert torch.equal(model(x), expected)
    assert len([w for w in caught if "fxopt" in str(w.message)]) == 1
    assert fxopt.report(model).count("layer_skip", "missed") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), expected)


def test_fragments_without_layers_are_one_warning(eager_lowering):
    model, x = Funnel(), torch.randn(2, 64)
    backend = Backend(Settings.build({"layer_skip": LayerSkip(skip=(1,))}), model)
    with pytest.warns(UserWarning, match="FX112.*This graph runs without it") as caught:
        for block in model.blocks:  # what Dynamo makes of a forward that it cannot follow
            x = torch.compile(block, backend=backend)(x)
    assert len([w for w in caught if "FX112" in str(w.message)]) == 1
    codes = [r.code for record in fxopt.reports() for r in record.remarks if r.technique == "layer_skip"]
    assert set(codes) == {"FX112"}
    assert len(codes) >= 3


def test_no_layers_is_an_error_under_strict(eager_lowering):
    model = fxopt.compile(Funnel(), LayerSkip(skip=(1,)), strict=True)
    with pytest.raises(Exception, match="strict.*FX112"):
        model(torch.randn(2, 64))


class Broken(Handwritten):
    """A graph break between layers."""

    def forward(self, ids):
        x = self.layers[0](self.embed(ids))
        torch._dynamo.graph_break()
        return self.head(self.norm(self.layers[2](self.layers[1](x))))


class BrokenLoop(Handwritten):
    """A graph break inside the loop over layers: Dynamo gives up the loop and compiles one layer for all of them."""

    def forward(self, ids):
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            if number == 2:
                torch._dynamo.graph_break()
            x = layer(x)
        return self.head(self.norm(x))


def test_a_stack_in_two_graphs_is_skipped_by_index(eager_lowering):
    torch.manual_seed(0)
    model = Broken().eval()
    expected = model.head(model.norm(model.layers[0](model.embed(IDS))))
    fxopt.compile(model, LayerSkip(skip=(1, 2)))
    torch.testing.assert_close(model(IDS), expected)
    assert fxopt.report(model).count("layer_skip") == 2


def test_counting_from_the_end_of_a_stack_in_two_graphs_is_blocked(eager_lowering):
    torch.manual_seed(0)
    model = Broken().eval()
    expected = model(IDS)
    compiled = torch.compile(model, backend="fxopt", options={"layer_skip": {"skip": (-1,)}})
    with pytest.warns(UserWarning, match="FX105"):
        torch.testing.assert_close(compiled(IDS), expected)


def test_a_layer_without_a_number_is_not_skipped(eager_lowering):
    torch.manual_seed(0)
    model = BrokenLoop().eval()
    expected = model(IDS)
    fxopt.compile(model, LayerSkip(skip=(1,)))
    with pytest.warns(UserWarning, match="FX505"):
        torch.testing.assert_close(model(IDS), expected)
