"""On every tiny architecture, for every technique: no node without descent, no refusal without module path and line.

Each graph is captured once; the passes run on copies of it, as they stand and as on an H200, and nothing is lowered.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

import fxopt
from fxopt import AsyncSoftmax, EarlyExit, LayerSkip, MixtureOfDepths, SparseAttention
from fxopt.backend import describe, own_module, run_passes
from fxopt.codegen import roofline
from fxopt.compiler import settle
from fxopt.elsewhere import move_graph
from fxopt.inspection import places
from fxopt.passes.provenance import number_nodes
from fxopt.passes.record import GraphRecord, Recorder
from fxopt.planning import decode_inputs
from fxopt.testing import TINY, capture, inputs_for

SETTINGS = (
    (),
    (AsyncSoftmax(phi=0.0),),
    (LayerSkip(skip=(1,)),),
    (LayerSkip(skip=(1,), part="attention", phase="decode"),),
    (LayerSkip(keep=(0, -1), part="mlp"),),
    (EarlyExit(layers=(1,)),),
    (EarlyExit(layers=(1, 2), confidence="state", rows="each"),),
    (SparseAttention(sinks=1, window=4),),
    (SparseAttention(method="pages", budget=64, min_length=64),),
    (SparseAttention(method="double_sparsity", budget=1.0),),
    (LayerSkip(skip=(1,)), EarlyExit(layers=(1,)), SparseAttention(sinks=1, window=4), AsyncSoftmax(phi=0.0)),
)


FAST = ("llama", "gpt2", "t5", "handwritten")
ARCHITECTURES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TINY]


def wrong_places(graphs):
    """Orphaned rows and refusals that do not say where, in words."""
    found = []
    for graph in graphs:
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


def captured(name, model):
    """The graphs of a prompt and, where the model generates with a cache, of a decode step on a static one."""
    graphs = capture(model, **inputs_for(name, model))
    with contextlib.suppress(fxopt.SettingError, AttributeError):
        graphs += capture(model, **decode_inputs(model, cache=256))
    for gm in graphs:
        number_nodes(gm.graph)
    return graphs


def rewritten(gm, settings, device):
    """What the passes leave of a copy of a captured graph, decided for a device of the roofline's table or for here."""
    gm, record = own_module(gm), GraphRecord(0, "-", "")
    if device is not None:
        move_graph(gm.graph)
    describe(record, gm)
    recorder = Recorder(record, "1")
    recorder.stage("captured", gm.graph, level="torch", seconds=0.0)
    with torch.no_grad(), roofline.planning(device):
        run_passes(gm, record, recorder, settings)
    return record


@pytest.mark.filterwarnings("ignore:fxopt")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_node_has_a_descent_and_every_refusal_a_place(name):
    model = TINY[name]()
    graphs, seen, wrong = captured(name, model), [], []
    for techniques in SETTINGS:
        try:
            settings, _ = settle(model, techniques)
        except fxopt.SettingError:
            continue  # refused at once, with a message of its own
        for device in (None, roofline.DEVICES["H200"]):
            records = [rewritten(gm, settings, device) for gm in graphs]
            seen += [remark for record in records for remark in record.remarks]
            wrong += [f"{techniques}: {problem}" for problem in wrong_places(records)]
    assert wrong == []
    assert {r.technique for r in seen} >= {"flat_gemm", "layer_skip"}, "every architecture has linears and layers"
    assert any(r.status == "applied" for r in seen) and any(r.status != "applied" for r in seen)


@pytest.mark.filterwarnings("ignore:fxopt", "ignore:mixture of depths")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_routed_models_too(name):
    model = TINY[name]()
    try:
        model = MixtureOfDepths(capacity=0.5, every=2)(model)
    except fxopt.SettingError:
        pytest.skip("mixture of depths refuses this model at once")
    with torch.no_grad():
        model(**inputs_for(name, model))  # a block says what it returns by its annotation, or by having run once
    settings, _ = settle(model, ())
    records = [rewritten(gm, settings, None) for gm in captured(name, model)]
    assert wrong_places(records) == []
    assert any(remark.technique == "mixture_of_depths" for record in records for remark in record.remarks)


def test_what_is_switched_off_and_what_fails_say_where(monkeypatch):
    model = TINY["handwritten"]()
    planned = fxopt.plan(model, inputs=(torch.zeros(1, 8, dtype=torch.long),))
    assert wrong_places(planned.graphs) == []
    monkeypatch.setattr(LayerSkip, "rewrite", lambda *a: (_ for _ in ()).throw(RuntimeError("planted")))
    with pytest.warns(UserWarning, match="planted"):
        failed = fxopt.plan(model, LayerSkip(skip=(1,)), inputs=(torch.zeros(1, 8, dtype=torch.long),))
    assert failed.count("layer_skip", "blocked") == 1 and wrong_places(failed.graphs) == []
    ids = torch.zeros(1, 8, dtype=torch.long)
    monkeypatch.setattr("fxopt.codegen.compat.compile_with_inductor", lambda gm, inputs, mode, patches: gm.forward)
    fxopt.compile(model, disable=("flat_gemm",))(ids)
    off = fxopt.report(model)
    assert off.count("flat_gemm", "blocked") == 1 and wrong_places(off.graphs) == []
