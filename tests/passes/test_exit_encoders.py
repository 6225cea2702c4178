"""Exits of encoders: classifiers of texts and images, and encoders that end in their states."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import transformers

import fxopt
from fxopt.codegen import compat
from fxopt.passes.counters import DepthCounter, counters, depths
from fxopt.passes.early_exit import EarlyExit
from fxopt.reporting import owner_of
from fxopt.testing import TINY, _hf

BERT = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_labels": 5,
        "intermediate_size": 96, "max_position_embeddings": 64}  # fmt: skip
ENCODERS = {
    "bert": partial(_hf, "BertForSequenceClassification", "BertConfig", **BERT),
    "roberta": partial(_hf, "RobertaForSequenceClassification", "RobertaConfig", **BERT),
    "vit": TINY["vit"],
    "bert states": partial(_hf, "BertModel", "BertConfig", **BERT),
}
IDS = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones(3, 9, dtype=torch.int64)
PADDED[1, 6:] = 0


def sharp(name):
    model = ENCODERS[name]()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features in (2, 5):
            module.weight.data.mul_(60)
    return model


def inputs(name, rows=slice(None)):
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))[rows]}
    return {"input_ids": IDS[rows], "attention_mask": PADDED[rows]}


def results(model, name, rows=slice(None)):
    with torch.no_grad():
        out = model(**inputs(name, rows))
    return out.last_hidden_state if name == "bert states" else out.logits


def threshold_between(model, name, confidence):
    """One that some row of the batch is above, and some other is not."""
    seen = []

    def watch(logits):
        seen.append(getattr(fxopt.passes.confidence, "largest")(logits))  # noqa: B009
        return seen[-1] * 0

    if confidence == "max":
        reference = fxopt.reference(model, EarlyExit(layers=(1,), confidence=watch, threshold=0.5))
        results(reference, name)
        low, high = seen[0].sort().values[[0, -1]].tolist()
    else:
        states = model(**inputs(name), output_hidden_states=True).hidden_states
        cosine = torch.cosine_similarity(states[1][:, 0], states[0][:, 0], -1)
        low, high = cosine.sort().values[[0, -1]].tolist()
    return (low + high) / 2


@pytest.mark.parametrize("rows", ["all", "each"])
@pytest.mark.parametrize(
    ("name", "confidence"),
    [("bert", "max"), ("bert", "state"), ("bert", "patience"), ("roberta", "max"), ("vit", "max"),
     ("bert states", "state")],
)  # fmt: skip
def test_encoders_compute_what_the_reference_computes(name, confidence, rows, eager_lowering):
    model = sharp(name)
    threshold = 2 if confidence == "patience" else threshold_between(model, name, confidence)
    technique = EarlyExit(layers=(1, 2), confidence=confidence, threshold=threshold, rows=rows)
    reference = fxopt.reference(model, technique)
    wanted = results(reference, name)
    compiled = fxopt.compile(sharp(name), technique, strict=True)
    torch.testing.assert_close(results(compiled, name), wanted, atol=1e-5, rtol=1e-5)
    (ran,) = reference.exit_state.depths
    counted = depths(counters(DepthCounter, owner_of(compiled)))
    assert counted == {n: ran.count(n) for n in (1, 2, 3)}
    if rows == "each":
        if confidence != "patience":
            assert len(set(ran)) > 1, "rows are meant to part"
        for row in range(3):
            alone = results(compiled, name, slice(row, row + 1))
            torch.testing.assert_close(alone, wanted[row : row + 1], atol=1e-5, rtol=1e-5)
    assert fxopt.report(compiled).count("early_exit") >= 2


def test_layers_after_an_exit_do_not_run(eager_lowering):
    """An exit that is always taken is the encoder of that many layers, and its cond takes the branch without them."""
    model = sharp("bert")
    technique = EarlyExit(layers=(1,), confidence="max", threshold=0.0)
    compiled = fxopt.compile(sharp("bert"), technique, strict=True)
    del model.bert.encoder.layer[1:]
    torch.testing.assert_close(results(compiled, "bert"), results(model, "bert"), atol=1e-5, rtol=1e-5)
    assert depths(counters(DepthCounter, owner_of(compiled))) == {1: 3, 3: 0}


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_rows_that_have_exited_are_not_computed(name, eager_lowering):
    """Counted in rows that linears are given: after the exit only those that are left."""
    model = sharp(name)
    threshold = threshold_between(model, name, "max")
    technique = EarlyExit(layers=(1,), confidence="max", threshold=threshold, rows="each")
    reference = fxopt.reference(model, technique)
    results(reference, name)
    left = reference.exit_state.depths[0].count(3)
    assert 0 < left < 3
    compiled = fxopt.compile(sharp(name), technique, strict=True)
    results(compiled, name)
    linears = 6
    assert rows_of_linears(model, name) == 3 * linears * 3
    told = [r.code for r in fxopt.report(compiled).remarks if "computed along" in r.message]
    if name == "bert" and compat.torch_version() < (2, 12):  # where it asks a number of rows whether it is one
        assert told == ["FX204"]
        return
    assert not told
    assert rows_of_linears(compiled, name) == linears * 3 + 2 * linears * left


def rows_of_linears(model, name):
    """Rows of the batch that all linears on states were given, [rows, S, W] or [rows * S, W]; a pooler's [rows, W] is
    less than one row of S positions."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        results(model, name)
    shapes = [event.input_shapes[0] for event in profile.events() if event.name == "aten::linear"]
    positions = next(shape[1] for shape in shapes if len(shape) == 3)
    return sum(math.prod(shape[:-1]) // positions for shape in shapes)


@pytest.mark.slow
def test_fewer_rows_through_inductor():
    """Sizes that are known when it runs, in nested branches; the same code for any number of rows that is left."""
    model = sharp("bert")
    technique = EarlyExit(
        layers=(1, 2), confidence="max", threshold=threshold_between(model, "bert", "max"), rows="each"
    )
    reference = fxopt.reference(model, technique)
    compiled = fxopt.compile(sharp("bert"), technique, strict=True)
    seen = set()
    for seed in range(4):
        ids = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            wanted = reference(input_ids=ids, attention_mask=PADDED).logits
            got = compiled(input_ids=ids, attention_mask=PADDED).logits
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        seen.add(tuple(sorted(reference.exit_state.depths[-1])))
    assert len(seen) > 1
    assert len(fxopt.report(compiled).graphs) == 1


def test_models_that_classify_no_whole_input_are_refused():
    tokens = _hf("BertForTokenClassification", "BertConfig", **BERT)
    causal = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(n_embd=64, n_layer=3, n_head=4))
    for model in (tokens, causal, TINY["bert"](), ENCODERS["bert states"]()):
        for act in (fxopt.compile, fxopt.reference):
            with pytest.raises(fxopt.SettingError, match="does not generate"):
                act(model, EarlyExit(layers=(1,), confidence="max"))
