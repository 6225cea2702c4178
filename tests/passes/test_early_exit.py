"""Early exit against its eager reference, truncated models, and keys and values computed by hand.

Graphs are captured once and rewritten for each setting (:mod:`exit_harness`); what Inductor makes of them is tested
where that is the question.
"""

from __future__ import annotations

import copy

import exit_harness as harness
import pytest
import torch

import fxopt
from fxopt.passes import confidence as measures
from fxopt.passes import counters, exit_region
from fxopt.passes.early_exit import EarlyExit
from fxopt.passes.modules import delete_layers, module_stacks
from fxopt.passes.technique import SettingError
from fxopt.testing import TINY

IDS = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(3))


def sharp(name: str = "llama"):
    """A tiny model whose choices are clear enough that confidences spread over [0, 1]."""
    model = TINY[name]()
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * 12)
    return model


def truncated(name: str, layers: int):
    model = sharp(name)
    delete_layers(module_stacks(model)[-1], range(layers))
    return model


@pytest.fixture(scope="module")
def captured():
    """``captured(cache)``: a llama whose graphs were captured while it generated, made once for this file."""
    made = {}

    def get(cache):
        if cache not in made:
            model = sharp()
            made[cache] = harness.Recaptured(model)
            harness.generate(model, IDS, cache)
        return made[cache]

    torch._dynamo.reset()
    # Both models share the code of one forward, and with it one limit.
    with torch._dynamo.config.patch(recompile_limit=64):
        yield get


@pytest.fixture(autouse=True)
def _fresh():
    """In place of the fixture of all tests, which would throw the captured code away: only the records go."""
    import fxopt.backend
    import fxopt.reporting

    fxopt.reporting.clear()
    fxopt.backend._reset_warnings()


def compare(captured, technique, cache, tokens=10, ids=IDS):
    """Tokens, logits and depths of the rewritten graphs against the reference; returns the reference's depths."""
    rewritten = captured(cache).use(technique)
    got = harness.generate(rewritten.model, ids, cache, tokens)
    reference = fxopt.reference(sharp(), technique)
    wanted = harness.generate(reference, ids, cache, tokens)
    assert torch.equal(got.sequences, wanted.sequences)
    for mine, theirs in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)
    return reference.exit_state.depths


SETTINGS = [
    EarlyExit(layers=(2,), confidence="max", threshold=0.08),
    EarlyExit(layers=(1, 2), confidence="margin", threshold=0.02),
    EarlyExit(layers=(1, 2), confidence="margin", threshold=0.1, rows="each"),
    EarlyExit(layers=(1, 2), confidence="state", threshold=0.85, rows="each"),
    EarlyExit(layers=(1, 2), confidence="patience", threshold=2, rows="each"),
    EarlyExit(layers=(1, 2), confidence="entropy", threshold=((0, 0.9), (8, 0.25)), shortlist=64, phase="decode"),
]


@pytest.mark.parametrize("cache", ["static", None], ids=["static", "dynamic"])
@pytest.mark.parametrize("technique", SETTINGS, ids=str)
def test_generates_what_the_reference_generates(captured, technique, cache):
    depths = compare(captured, technique, cache)
    assert {d for rows in depths for d in rows} != {3}, "the setting is meant to exit somewhere"


@pytest.mark.parametrize("cache", ["static", None], ids=["static", "dynamic"])
def test_always_exits_is_the_truncated_model(captured, cache):
    rewritten = captured(cache).use(EarlyExit(layers=(2,), confidence="max", threshold=0.0))
    got = harness.generate(rewritten.model, IDS, cache)
    wanted = harness.generate(truncated("llama", 2), IDS, cache)
    assert torch.equal(got.sequences, wanted.sequences)
    for mine, theirs in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    # The same without any cache for the layers after it.
    none = captured(cache).use(EarlyExit(layers=(2,), confidence="max", threshold=0.0, kv="none"))
    assert torch.equal(harness.generate(none.model, IDS, cache).sequences, wanted.sequences)
    assert len(none.remarks("applied")) == len(none.entries)


def test_propagated_keys_and_values_by_hand(captured):
    from transformers import StaticCache
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rewritten = captured("static").use(EarlyExit(layers=(1,), confidence="max", threshold=0.0, phase="decode"))
    out = harness.generate(rewritten.model, IDS, "static", 3)
    cache = out.past_key_values
    assert isinstance(cache, StaticCache)
    model = sharp()
    with torch.no_grad():
        # Prompt with every layer, then two tokens whose state after one layer is what layers 1 and 2 are given.
        tokens = out.sequences[:, :-1]
        full = model(tokens[:, :6], use_cache=True, output_hidden_states=True)
        kept = full.past_key_values
        for step in range(6, tokens.shape[1]):
            position = torch.full((2, 1), step)
            hidden = model(tokens[:, step : step + 1], past_key_values=kept, output_hidden_states=True).hidden_states[1]
            cos, sin = model.model.rotary_emb(hidden, position)
            for index in (1, 2):
                layer = model.model.layers[index]
                normed = layer.input_layernorm(hidden)
                key = layer.self_attn.k_proj(normed).view(2, 1, 2, 16).transpose(1, 2)
                value = layer.self_attn.v_proj(normed).view(2, 1, 2, 16).transpose(1, 2)
                _, key = apply_rotary_pos_emb(key, key, cos, sin)
                torch.testing.assert_close(cache.layers[index].keys[:, :, step : step + 1], key, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(
                    cache.layers[index].values[:, :, step : step + 1], value, atol=1e-5, rtol=1e-5
                )


def test_threshold_one_changes_nothing(captured):
    rewritten = captured("static").use(None)
    plain = [str(e.rewritten.graph) for e in rewritten.entries]
    rewritten.use(EarlyExit(layers=(1,), threshold=1.0))
    assert [str(e.rewritten.graph) for e in rewritten.entries] == plain
    assert [r.status for r in rewritten.remarks()] == ["analysis"] * len(plain)


def test_never_exits_below_one_is_the_model_bit_for_bit(captured):
    rewritten = captured("static").use(None)
    plain = harness.generate(rewritten.model, IDS, "static")
    rewritten.use(EarlyExit(layers=(1, 2), confidence="max", threshold=0.999999))
    got = harness.generate(rewritten.model, IDS, "static")
    assert any("cond" in str(n.target) for e in rewritten.entries for n in e.rewritten.graph.nodes)
    for mine, theirs in zip(got.logits, plain.logits, strict=True):
        assert torch.equal(mine, theirs)


def test_all_rows_exit_with_the_least_sure(captured):
    """rows='all' leaves where the smallest confidence is above the threshold, and nowhere else."""
    technique = EarlyExit(layers=(2,), confidence="max", threshold=0.08)
    depths = compare(captured, technique, "static")
    assert all(len(set(rows)) == 1 for rows in depths)
    each = compare(captured, EarlyExit(layers=(2,), confidence="max", threshold=0.2, rows="each"), "static")
    assert any(len(set(rows)) == 2 for rows in each), "rows of this batch are meant to differ"


def test_a_row_does_not_depend_on_its_neighbours(captured):
    technique = EarlyExit(layers=(1, 2), confidence="margin", threshold=0.1, rows="each")
    rewritten = captured("static").use(technique)
    both = harness.generate(rewritten.model, IDS, "static").sequences
    swapped = harness.generate(rewritten.model, IDS.flip(0), "static").sequences
    assert torch.equal(both.flip(0), swapped)
    reference = fxopt.reference(sharp(), technique)
    alone = torch.cat([harness.generate(reference, IDS[i : i + 1], "static").sequences for i in range(2)])
    assert torch.equal(both, alone)


def test_two_conversations_do_not_mix(captured):
    technique = EarlyExit(layers=(1, 2), confidence="margin", threshold=0.02)
    rewritten = captured(None).use(technique)
    first, second = IDS, IDS.flip(1)
    apart = [harness.generate(rewritten.model, ids, None, 6).sequences for ids in (first, second)]
    model = rewritten.model
    with torch.no_grad():
        states = [(model(ids, use_cache=True), ids) for ids in (first, second)]
        turns = [(out.past_key_values, torch.cat((ids, out.logits[:, -1:].argmax(-1)), 1)) for out, ids in states]
        for _ in range(5):
            following = []
            for cache, tokens in turns:
                out = model(tokens[:, -1:], past_key_values=cache, use_cache=True)
                following.append((cache, torch.cat((tokens, out.logits[:, -1:].argmax(-1)), 1)))
            turns = following
    for (_, tokens), wanted in zip(turns, apart, strict=True):
        assert torch.equal(tokens, wanted)


def test_nan_never_exits_and_is_counted(captured):
    technique = EarlyExit(layers=(1,), confidence=nan_for_first_row, threshold=0.0, rows="each", phase="decode")
    before = set(counters.counters(counters.DepthCounter))
    rewritten = captured("static").use(technique)
    harness.generate(rewritten.model, IDS, "static", 5)
    mine = [c for c in counters.counters(counters.DepthCounter) if c not in before]
    assert sum(c.nan_rows for c in mine) == 4
    assert counters.depths(mine) == {1: 4, 3: 4}


def nan_for_first_row(logits):
    sure = torch.ones_like(logits[:, 0])
    return torch.where(torch.cumsum(sure, 0) == 1, float("nan"), sure)


def test_counts_the_depth_of_every_row(captured):
    technique = EarlyExit(layers=(1, 2), confidence="margin", threshold=0.1, rows="each")
    before = set(counters.counters(counters.DepthCounter))
    depths = compare(captured, technique, "static")
    mine = [c for c in counters.counters(counters.DepthCounter) if c not in before]
    flat = [d for rows in depths for d in rows]
    assert counters.depths(mine) == {n: flat.count(n) for n in (1, 2, 3)}


def test_writes_after_the_branches_compute_the_same(captured, monkeypatch):
    """The form for torch 2.11, whose branches must not write: the same tokens, and no write in a branch."""
    monkeypatch.setattr("fxopt.codegen.compat.cond_may_write", lambda: False)
    technique = EarlyExit(layers=(1, 2), confidence="margin", threshold=0.1, rows="each")
    compare(captured, technique, "static")
    for entry in captured("static").entries:
        for name, module in entry.rewritten.named_modules():
            if name:
                assert not [n for n in module.graph.nodes if exit_region.written_memory(n) is not None]


def test_remarks_tell_the_cost(captured):
    rewritten = captured("static").use(EarlyExit(layers=(1, 2), confidence="max", threshold=0.5))
    applied = rewritten.remarks("applied")
    assert len(applied) == 2 * len(rewritten.entries)
    # width 64: head 128x64, a layer 64x64 x2 + 32x64 x2 + 96x64 x3 and two norms; keys and values 32x64 x2 and a norm
    assert "its check reads 33 kB" in applied[0].message
    assert "exit after 1 of 3" in applied[0].message
    assert rewritten.remarks("blocked") == []


def test_training_is_blocked():
    model = sharp()
    fxopt.compile(model, EarlyExit(layers=(1,)), strict=True)
    with pytest.raises(Exception, match="gradients are recorded"):
        model(IDS)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["static"])
def test_decode_steps_through_inductor(cache):
    """Two conditionals with cache writes in their branches, as Inductor lowers it; compiling again hits the cache."""
    from torch._dynamo.utils import counters
    from transformers import StaticCache

    technique = EarlyExit(layers=(1, 2), confidence="margin", threshold=0.1, rows="each")
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        for attempt in ("miss", "hit"):
            torch._dynamo.reset()
            counters.clear()
            model, reference = sharp(), fxopt.reference(sharp(), technique)
            filled = StaticCache(config=model.config, max_cache_len=16) if cache else None
            out = reference(IDS, past_key_values=filled, use_cache=True)
            mine, theirs = copy.deepcopy(out.past_key_values), out.past_key_values
            if cache is None:
                for layer in mine.layers:
                    torch._dynamo.mark_dynamic(layer.keys, 2)
                    torch._dynamo.mark_dynamic(layer.values, 2)
            fxopt.compile(model, technique, strict=True)
            token = out.logits[:, -1:].argmax(-1)
            for _ in range(4):
                got = model(token, past_key_values=mine, use_cache=True).logits
                wanted = reference(token, past_key_values=theirs, use_cache=True).logits
                torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
                for a, b in zip(mine.layers, theirs.layers, strict=True):
                    torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)
                    torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-5)
                token = wanted.argmax(-1)
            assert {d for rows in reference.exit_state.depths[1:] for d in rows} == {1, 3}
            assert counters["aot_autograd"][f"autograd_cache_{attempt}"] == 1
            assert counters["aot_autograd"]["autograd_cache_bypass"] == 0


# -- confidences ----------------------------------------------------------------------------------------------------


def test_confidences_against_their_definitions():
    logits = torch.randn(5, 33, dtype=torch.float32) * 3
    chances = torch.softmax(logits.double(), -1)
    top = chances.sort(-1, descending=True).values
    torch.testing.assert_close(measures.margin(logits).double(), top[:, 0] - top[:, 1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(measures.largest(logits).double(), top[:, 0], atol=1e-6, rtol=1e-5)
    entropy = torch.distributions.Categorical(probs=chances).entropy()
    wanted = 1 - entropy / torch.log(torch.tensor(33.0, dtype=torch.float64))
    torch.testing.assert_close(measures.certainty(logits, vocabulary=33).double(), wanted, atol=1e-5, rtol=1e-5)
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(measures.saturation(a, b), cosine.clamp(0, 1))


def test_confidences_stay_in_range_and_keep_nan():
    extreme = torch.tensor([[1e4, 0.0, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, -float("inf")]])
    bad = torch.tensor([[float("nan"), 0.0, 0.0]])
    for function in (measures.margin, measures.largest, measures.of_logits("entropy", 3)):
        values = function(extreme)
        assert bool(((values >= 0) & (values <= 1)).all())
        assert bool(function(bad).isnan().all())


def test_patience_counts_agreeing_exits():
    def logits(*choices):
        return torch.nn.functional.one_hot(torch.tensor(choices), 4).float()

    choice, run = measures.agreement(logits(0, 1), None, None)
    choice, run = measures.agreement(logits(0, 2), choice, run)
    choice, run = measures.agreement(logits(0, 2), choice, run)
    assert run.tolist() == [3, 2]


def test_schedules():
    falling = measures.decay(0.8, tokens=16)
    assert falling(torch.tensor(0.0)).item() == pytest.approx(0.9 * 0.8 + 0.1)
    assert falling(torch.tensor(1000.0)).item() == pytest.approx(0.72)
    stepped = measures.steps(((0, 0.9), (4, 0.5)))
    assert [round(stepped(torch.tensor(float(p))).item(), 3) for p in (0, 3, 4, 99)] == [0.9, 0.9, 0.5, 0.5]


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": ()}, "at least one exit"),
        ({"layers": 2}, r"layers=\(2,\)"),
        ({"layers": (0,)}, "no count of layers"),
        ({"layers": (1, 1)}, "each exit once"),
        ({"threshold": 1.5}, r"\[0, 1\]"),
        ({"threshold": -0.1}, r"\[0, 1\]"),
        ({"threshold": float("nan")}, r"\[0, 1\]"),
        ({"threshold": ((3, 0.5),)}, "begin at 0"),
        ({"confidence": "margn"}, "Did you mean 'margin'"),
        ({"confidence": "patience"}, "threshold=2"),
        ({"confidence": "patience", "threshold": 2}, "can never agree"),
        ({"head": {2: "heads.0"}}, "no exit after"),
        ({"head": {1: 0}}, "path of a module"),
        ({"head": "heads", "shortlist": 16}, "one of the two"),
        ({"shortlist": "tokens.csv"}, "number of tokens"),
        ({"shortlist": 16, "confidence": "state"}, "reads no head"),
        ({"rows": "some"}, "'all', 'each'"),
        ({"phase": "prompt"}, "'all', 'decode'"),
        ({"kv": "recompute"}, "not available in this version; use kv='propagate'"),
        ({"kv": "project"}, "not available in this version"),
        ({"kv": "copy"}, "no such policy"),
        ({"kv": "none"}, "always taken"),
    ],
)
def test_bad_settings_are_refused_at_once(fields, said):
    with pytest.raises(SettingError, match=said):
        EarlyExit(**{"layers": (1,), **fields})


@pytest.mark.parametrize("returned", [0.5, "sure", torch.ones(2), (1, 2)])
def test_a_confidence_that_computes_nothing_is_refused(returned):
    state = torch.fx.Graph().placeholder("logits")
    with pytest.raises(SettingError, match="has to return a tensor that it computes from its arguments"):
        measures.traced(lambda logits: returned, [state])
    assert len(measures.traced(lambda logits: logits.amax(-1), [state]).nodes) == 3


def test_exit_after_the_last_layer_is_refused():
    with pytest.raises(SettingError, match="counts run from 1 to 2"):
        fxopt.compile(sharp(), EarlyExit(layers=(3,)))
    with pytest.raises(SettingError, match="counts run from 1 to 2"):
        fxopt.reference(sharp(), EarlyExit(layers=(4,)))


def test_trunks_and_encoders_are_refused():
    for model in (sharp().model, TINY["bert"]()):
        for act in (fxopt.compile, fxopt.reference):
            with pytest.raises(SettingError, match="does not generate"):
                act(model, EarlyExit(layers=(1,)))


@pytest.mark.parametrize("name", ["bert", "handwritten trunk"])
def test_a_graph_without_a_decoders_head_is_blocked(name):
    """Reached without fxopt.compile's look at the model."""
    torch._dynamo.reset()
    model = TINY["bert"]() if name == "bert" else sharp().model
    options = {"early_exit": EarlyExit(layers=(1,)), "strict": True}
    compiled = torch.compile(model, backend="fxopt", options=options)
    said = "without a causal mask" if name == "bert" else "0 outputs of the graph are a projection"
    with pytest.raises(Exception, match=said), torch.no_grad():
        compiled(IDS, use_cache=False) if name != "bert" else compiled(IDS)
