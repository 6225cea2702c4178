"""Heads, classifiers and shortlists that are not the model's own: against the eager reference, and what is refused."""

from __future__ import annotations

import json

import exit_harness as harness
import pytest
import torch
from torch import nn

import fxopt
from fxopt.passes.early_exit import EarlyExit
from fxopt.testing import TINY, _hf

IDS = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(3))


def carrying():
    """A tiny Llama with a head (its own norm and projection) and a classifier for each of two exits."""
    model = TINY["llama"]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model.heads = nn.ModuleDict({str(n): nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 128)) for n in (1, 2)})
        model.sure = nn.ModuleDict({"one": nn.Linear(64, 1), "all": nn.Linear(64, 1, bias=False)})
        model.narrow = nn.Linear(32, 128)
        model.short = nn.Linear(64, 100)
        for head in model.heads.values():
            head[1].weight.data.mul_(12)
        model.sure["all"].weight.data.mul_(8)
    return model.eval()


@pytest.fixture(scope="module")
def captured():
    """Graphs of one model, captured with a static and with a growing cache, made once for this file."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        model = carrying()
        recaptured = harness.Recaptured(model)
        for cache in ("static", None):
            harness.generate(model, IDS, cache)
        yield recaptured


@pytest.fixture(autouse=True)
def _fresh():
    """In place of the fixture of all tests, which would throw the captured code away."""
    import fxopt.reporting

    fxopt.reporting.clear()


@pytest.mark.parametrize("cache", ["static", None], ids=["static", "growing"])
@pytest.mark.parametrize(
    "technique",
    [
        EarlyExit(layers=(1, 2), head="heads", threshold=0.2, rows="each"),
        EarlyExit(layers=(1, 2), head={2: "heads.2"}, threshold=0.02, rows="each"),
        EarlyExit(layers=(1, 2), head="heads", confidence="state", threshold=0.87),
        EarlyExit(layers=(1, 2), head={1: "heads.1"}, confidence="state", threshold=0.87),
        EarlyExit(layers=(1, 2), head={2: "heads.2"}, confidence="state", threshold=0.87),
        EarlyExit(layers=(1, 2), head={2: "heads.2"}, confidence="state", threshold=0.87, rows="each"),
        EarlyExit(layers=(1, 2), confidence="sure.all", threshold=0.48, rows="each"),
        EarlyExit(layers=(2,), head="heads.2", confidence="sure.all", threshold=0.5, rows="each", phase="decode"),
        EarlyExit(layers=(1, 2), confidence="max", shortlist="tokens.json", threshold=0.033),
    ],
    ids=lambda t: str(t),
)
def test_generates_what_the_reference_generates(captured, technique, cache, tmp_path):
    if technique.shortlist is not None:
        path = tmp_path / "tokens.json"
        path.write_text(json.dumps(list(range(5, 128, 3))))
        technique = EarlyExit(layers=(1, 2), confidence="max", shortlist=str(path), threshold=0.033)
    rewritten = captured.use(technique.check(captured.model))
    got = harness.generate(rewritten.model, IDS, cache)
    reference = fxopt.reference(carrying(), technique)
    wanted = harness.generate(reference, IDS, cache)
    assert torch.equal(got.sequences, wanted.sequences)
    for mine, theirs in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)
    ran = {n for rows in reference.exit_state.depths for n in rows}
    assert len(ran) > 1, "the setting is meant to exit in some steps"


@torch.no_grad()
def test_a_row_that_exits_has_the_logits_of_its_own_head(eager_lowering):
    """By hand: two layers of the model, then the head; for every position of a prompt."""
    technique = EarlyExit(layers=(2,), head="heads", confidence="max", threshold=0.0)
    model = carrying()
    state = model(IDS, output_hidden_states=True).hidden_states[2]
    wanted = model.heads["2"](state)
    for meant in (fxopt.reference(model, technique), fxopt.compile(carrying(), technique, strict=True)):
        torch.testing.assert_close(meant(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(meant(IDS, logits_to_keep=1).logits, wanted[:, -1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("taken", [1, 2, 3, 4])
@pytest.mark.parametrize("owned", [(1, 2, 3), (1, 3), (2,)])
def test_the_head_of_the_exit_that_was_taken_scores_a_prompt(taken, owned, eager_lowering):
    """By hand: classifiers that are sure at one exit and behind it, and a head that only some exits have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).eval()
    model.heads = nn.ModuleDict({str(n): nn.Linear(64, 128) for n in owned})
    model.exits = nn.ModuleDict({"sure": nn.ModuleDict({str(n): nn.Linear(64, 1) for n in (1, 2, 3)})})
    for n, classifier in model.exits["sure"].items():
        classifier.weight.zero_()
        classifier.bias.fill_(9.0 if int(n) == taken else -9.0)
    states = []
    model.model.layers[taken - 1].register_forward_hook(lambda _, args, out: states.append(out))
    model(IDS)
    head = model.heads[str(taken)] if taken in owned else lambda h: model.lm_head(model.model.norm(h))
    wanted = head(states[0])
    heads = {n: f"heads.{n}" for n in owned}
    technique = EarlyExit(layers=(1, 2, 3), head=heads, confidence="exits.sure", threshold=0.5)
    fxopt.compile(model, technique, strict=True)
    torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_file_becomes_the_models_and_is_read_once(tmp_path, eager_lowering):
    safetensors = pytest.importorskip("safetensors.torch")
    heads = {f"{n}.weight": torch.randn(128, 64, generator=torch.Generator().manual_seed(n)) for n in (1, 2)}
    path = str(tmp_path / "heads.safetensors")
    safetensors.save_file(heads, path)
    technique = EarlyExit(layers=(1, 2), head=path, confidence="max", threshold=0.0)
    model = fxopt.compile(TINY["llama"](), technique, strict=True)
    assert {k for k in model.state_dict() if "exit" in k} == {f"fxopt_exit.head.{n}.weight" for n in (1, 2)}
    with torch.no_grad():
        state = TINY["llama"]()(IDS, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(model(IDS).logits, state @ heads["1.weight"].T, atol=1e-4, rtol=1e-4)
        # It is the model's now: what is changed there is what compiled code reads, and another compile keeps it.
        model.fxopt_exit.head["1"].weight = nn.Parameter(-heads["1.weight"])
        torch.testing.assert_close(model(IDS).logits, -state @ heads["1.weight"].T, atol=1e-4, rtol=1e-4)
        kept = model.fxopt_exit.head
        assert fxopt.compile(model, technique).fxopt_exit.head is kept


def test_an_encoders_exits_have_heads_too(eager_lowering):
    config = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_labels": 5,
              "intermediate_size": 96, "max_position_embeddings": 64}  # fmt: skip
    model = _hf("BertForSequenceClassification", "BertConfig", **config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.ramp = nn.Linear(64, 5)
    model.ramp.weight.data.mul_(3)
    with torch.no_grad():
        state = model(IDS, output_hidden_states=True).hidden_states[1][:, 0]
        chances = torch.softmax(model.ramp(state), -1).amax(-1)
        technique = EarlyExit(layers=(1,), head="ramp", confidence="max", threshold=float(chances.mean()), rows="each")
        wanted = fxopt.reference(model, technique)(IDS).logits
        left = chances > chances.mean()
        assert left.tolist() in ([True, False], [False, True])
        torch.testing.assert_close(wanted[left], model.ramp(state)[left])
        got = fxopt.compile(model, technique, strict=True)(IDS).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"head": "hats"}, "no module 'hats'. Did you mean 'heads'"),
        ({"head": "narrow"}, "does not take a state of the model's width 64"),
        ({"head": "short"}, "128 results"),
        ({"head": {1: "heads.2", 2: "short"}}, "exit after 2 layers"),
        ({"confidence": "sure.none"}, "no module 'sure.none'"),
        ({"confidence": "heads.1"}, "1 result"),
        ({"head": "missing.safetensors"}, "cannot be read"),
        ({"shortlist": "missing.json"}, "cannot be read"),
    ],
)
def test_what_a_model_does_not_have_is_refused(fields, said):
    for act in (fxopt.compile, fxopt.reference):
        with pytest.raises(fxopt.SettingError, match=said):
            act(carrying(), EarlyExit(**{"layers": (1, 2), **fields}))


@pytest.mark.parametrize(
    ("text", "said"),
    [("[1, 2.5]", "whole numbers"), ("{}", "whole numbers"), ("[7]", "at least two"), ("[3, 128]", "of 0 to 127"),
     ("[", "cannot be read")],
)  # fmt: skip
def test_lists_that_are_none_are_refused(text, said, tmp_path):
    (tmp_path / "tokens.json").write_text(text)
    technique = EarlyExit(layers=(1,), confidence="max", shortlist=str(tmp_path / "tokens.json"))
    with pytest.raises(fxopt.SettingError, match=said):
        fxopt.compile(carrying(), technique)


def test_paths_are_plain_data():
    """A setting with paths is hashed, told apart, written and read again like any other."""
    first = EarlyExit(layers=(1, 2), head={1: "heads.1", 2: "heads.2"})
    again = EarlyExit(**{k: v for k, v in first.to_dict().items() if k != "technique"})
    assert again == first and hash(again) == hash(first) and again.digest == first.digest
    assert EarlyExit(layers=(1, 2), head={1: "heads.1"}).digest != first.digest


def test_without_a_look_at_the_model_modules_are_blocked(captured):
    captured.strict = False
    with pytest.warns(UserWarning, match="FX506 .* found by fxopt.compile"):
        captured.use(EarlyExit(layers=(1,), head="heads"))
    captured.strict = True
