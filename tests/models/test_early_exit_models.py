"""Early exit on every architecture: exact counts, and what the eager reference generates, with both kinds of cache."""

from __future__ import annotations

import exit_harness as harness
import pytest
import torch

import fxopt
from fxopt.passes.early_exit import EarlyExit
from fxopt.testing import TINY

IDS = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(3))
FALLING = ((0, 0.2), (9, 0.05), (13, 0.02))
EVERYWHERE = EarlyExit(layers=(1, 2), confidence="margin", threshold=0.1, rows="each")
DECODE = EarlyExit(layers=(1, 2), confidence="margin", threshold=FALLING, rows="each", phase="decode")
# The prompt and decode steps; a sliding window is compiled again once it is full, and growing lengths as they turn
# symbolic, in an order that Dynamo's memory of earlier shapes decides.
GRAPHS = {("static", "gemma2"): 3, ("static", "mistral"): 3, "static": 2, "growing": 3}
WINDOWS = ("gemma2", "mistral")
NAMES = ("llama", "qwen3", "gemma2", "mistral", "gpt2", "gpt_neox", "opt", "t5", "bart")
ROLLS = pytest.mark.branches_write  # a window that is full is written whole, not by index
CASES = [
    pytest.param(name, cache, marks=ROLLS if cache == "static" and name in WINDOWS else (), id=f"{name}-{cache}")
    for name in NAMES
    for cache in ("static", "growing")
]


def sharp(name):
    model = TINY[name]()
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * 12)
    return model


@pytest.mark.parametrize(("name", "cache"), CASES)
def test_generates_what_the_reference_generates(name, cache):
    kind = "static" if cache == "static" else None
    # A sliding window that fills up, and lengths that turn dynamic, take more graphs than Dynamo's limit of 8 allows to
    # one function that two models share; beyond it, Dynamo runs the model as it is, without any rewrite.
    with torch._dynamo.config.patch(recompile_limit=64):
        captured = harness.Recaptured(sharp(name))
        harness.generate(captured.model, IDS, kind)
        graphs = len(captured.entries)
        if cache == "static" or name not in WINDOWS:
            assert graphs == GRAPHS.get((cache, name), GRAPHS[cache])
        for technique in (EVERYWHERE, DECODE):
            if name == "mistral" and technique is DECODE:
                continue  # test_position_of_windows_alone_is_unknown
            captured.use(technique)
            got = harness.generate(captured.model, IDS, kind)
            reference = fxopt.reference(sharp(name), technique)
            wanted = harness.generate(reference, IDS, kind)
            assert torch.equal(got.sequences, wanted.sequences)
            for mine, theirs in zip(got.logits, wanted.logits, strict=True):
                torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)
            exits = {d for rows in reference.exit_state.depths for d in rows}
            assert exits & {1, 2}, "the setting is meant to exit somewhere"
            prompts = 0 if technique.phase == "all" else 1
            compiled = len(captured.entries)
            assert len(captured.remarks("applied")) == len(technique.layers) * (compiled - prompts)
            assert [r.code for r in captured.remarks("blocked")] == ["FX503"] * prompts
            # Rows that a branch returned lie in memory otherwise than those that a growing window cut: Dynamo, which
            # guards strides, compiles two more graphs, once.
            assert compiled == graphs or (compiled == graphs + 2 and cache == "growing" and name in WINDOWS)
            harness.generate(captured.model, IDS, kind)
            assert len(captured.entries) == compiled, "recompiles do not grow with the depth of the exits"
            graphs = compiled


def test_position_of_windows_alone_is_unknown():
    captured = harness.Recaptured(sharp("mistral"))
    harness.generate(captured.model, IDS, None, 4)
    with pytest.raises(Exception, match="FX208 every layer's cache is a sliding window"):
        captured.use(DECODE)


def test_a_window_that_rolls_is_blocked_where_branches_must_not_write(monkeypatch):
    """Only rows that are written by their index can be written after the branches."""
    monkeypatch.setattr("fxopt.codegen.compat.cond_may_write", lambda: False)
    captured = harness.Recaptured(sharp("mistral"))
    harness.generate(captured.model, IDS, "static", 4)
    captured.strict = False
    with pytest.warns(UserWarning, match="FX208 .* before torch 2.12"):
        captured.use(EVERYWHERE)
    full = captured.entries[-1]
    assert any(r.code == "FX208" for r in full.record.remarks)
    left = [str(node.target) for node in full.rewritten.graph.nodes]
    assert not any("cond" in target or "topk" in target for target in left), "the graph is as it was"
