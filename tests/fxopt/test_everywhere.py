"""On every tiny architecture: no node without descent, no refusal without module path and source line."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt import EarlyExit, LayerSkip, MixtureOfDepths, SparseAttention
from fxopt.inspection import places
from fxopt.testing import TINY, inputs_for


def wrong_places(report):
    """Orphaned rows and refusals that do not say where, in words."""
    found = []
    for graph in report.graphs:
        captured = {row.id for row in graph.rows(0)}
        for number, stage in enumerate(graph.stages):
            for row in graph.rows(number):
                if row.op != "output" and not (row.origins and set(row.origins) <= captured):
                    found.append(f"orphan {row.name} after {stage.name}")
        for remark in graph.remarks:
            line = remark.source or places.source_of(graph, remark.path)
            if remark.status in ("missed", "blocked") and not (remark.path and line):
                found.append(str(remark))
    return found


@pytest.mark.filterwarnings("ignore:fxopt")
@pytest.mark.parametrize("name", TINY)
def test_every_node_has_a_descent_and_every_refusal_a_place(name):
    model = TINY[name]()
    report = fxopt.plan(model, LayerSkip(skip=(1,)), inputs=inputs_for(name, model))
    assert report.graphs and report.remarks and wrong_places(report) == []


@pytest.mark.filterwarnings("ignore:fxopt")
@pytest.mark.parametrize("technique", [EarlyExit(layers=(1,)), SparseAttention(sinks=1, window=4),
                                       MixtureOfDepths(capacity=0.5, every=2)], ids=lambda t: t.name)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "t5"])
def test_the_other_techniques_too(name, technique):
    model = TINY[name]()
    try:
        report = fxopt.plan(model, technique, inputs=inputs_for(name, model))
    except fxopt.SettingError:
        pytest.skip(f"{technique.name} refuses this model at once")
    assert report.graphs and wrong_places(report) == []


def test_what_is_switched_off_and_what_fails_say_where(monkeypatch):
    model = TINY["handwritten"]()
    planned = fxopt.plan(model, inputs=(torch.zeros(1, 8, dtype=torch.long),))
    assert wrong_places(planned) == []
    monkeypatch.setattr(LayerSkip, "rewrite", lambda *a: (_ for _ in ()).throw(RuntimeError("planted")))
    with pytest.warns(UserWarning, match="planted"):
        failed = fxopt.plan(model, LayerSkip(skip=(1,)), inputs=(torch.zeros(1, 8, dtype=torch.long),))
    assert failed.count("layer_skip", "blocked") == 1 and wrong_places(failed) == []
    ids = torch.zeros(1, 8, dtype=torch.long)
    monkeypatch.setattr("fxopt.codegen.compat.compile_with_inductor", lambda gm, inputs, mode, patches: gm.forward)
    fxopt.compile(model, disable=("flat_gemm",))(ids)
    off = fxopt.report(model)
    assert off.count("flat_gemm", "blocked") == 1 and wrong_places(off) == []
