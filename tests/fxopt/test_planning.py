"""plan: the report of a compilation, without weights, devices or computing."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
from torch import nn

import fxopt
from fxopt import LayerSkip, SettingError
from fxopt.inspection import places
from fxopt.testing import TINY, Handwritten

IDS = torch.tensor([[5, 17, 3, 99, 42, 8, 61]])


def test_plan_says_what_compiling_does(eager_lowering):
    model = TINY["handwritten"]()
    planned = fxopt.plan(model, LayerSkip(skip=(1,)), inputs=(IDS,))
    fxopt.compile(model, LayerSkip(skip=(1,)))
    with torch.no_grad():
        model(IDS)
    done = fxopt.report(model)
    assert [s.name for s in planned.passes] == [s.name for s in done.passes]
    assert planned.remarks == done.remarks
    assert planned.graphs[0].nodes_after == done.graphs[0].nodes_after
    assert (planned.graphs[0].role, planned.graphs[0].model) == ("plan", "Handwritten")


def test_nothing_is_computed_and_nothing_kept():
    class Poisoned(Handwritten):
        def forward(self, ids):
            x = super().forward(ids)
            return x, ids

    model = Poisoned()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert fxopt.plan(model, inputs=(IDS,)).graphs[0].nodes_before > 10
    assert fxopt.reports() == []
    # a model that was planned is compiled as if it had not been
    counter = torch._dynamo.testing.CompileCounter()
    torch.compile(model, backend=counter)(IDS)
    assert counter.frame_count == 1


def test_planning_many_times_meets_no_recompile_limit():
    models = [nn.Sequential(nn.Linear(4, 4 + i)) for i in range(10)]
    for model in models:
        assert len(fxopt.plan(model, inputs=(torch.zeros(2, 4),)).graphs) == 1


def test_a_graph_break_gives_two_graphs():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    assert len(fxopt.plan(Broken(), inputs=(torch.zeros(2, 4),)).graphs) == 2


def test_meta_inputs_for_a_real_model_and_the_reverse():
    model = TINY["handwritten"]()
    assert fxopt.plan(model, inputs=(IDS.to("meta"),)).graphs
    assert fxopt.plan(model.to("meta"), inputs=(IDS,)).graphs


def test_a_70b_shape_on_the_meta_device():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    report = fxopt.plan(model, LayerSkip(skip=(1, 2)), target="h200")
    assert report.count("layer_skip") == 2
    (estimate,) = [r for r in report.remarks if r.technique == "roofline"]
    # 856 MB of weights a layer, 2.1 GB of lm_head (the embedding is only looked up), 4.8 TB/s
    layer = (8192 * 8192 * 2 + 8192 * 1024 * 2 + 3 * 8192 * 28672) * 2 / 4.8e9  # ms
    head = 128256 * 8192 * 2 / 4.8e9  # ms
    captured, rewritten = (float(number) for number in re.findall(r"([\d.]+) ms", estimate.message))
    assert captured == pytest.approx(4 * layer + head, rel=0.02)
    assert rewritten == pytest.approx(2 * layer + head, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": None}, "give inputs="),
        ({"inputs": (IDS,), "target": "h2000"}, "Did you mean 'h200'"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(SettingError, match=message):
        fxopt.plan(TINY["handwritten"](), **arguments)


def test_a_failing_model_leaves_no_record():
    class Failing(nn.Module):
        def forward(self, x):
            return torch.ones(3) @ x

    with pytest.raises(Exception, match=r"size|shape|mat"):
        fxopt.plan(Failing(), inputs=(torch.zeros(2, 4),))
    assert fxopt.reports() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "t5"])
def test_every_remark_says_where_and_every_node_has_a_descent(name):
    report = fxopt.plan(TINY[name](), LayerSkip(skip=(1,)), inputs=None)
    for graph in report.graphs:
        table = graph.rows(len(graph.stages) - 1)
        assert all(row.id >= 0 and row.origins for row in table)
        for remark in graph.remarks:
            if remark.status in ("missed", "blocked"):
                assert remark.path and (remark.source or places.source_of(graph, remark.path)), remark


def test_a_record_keeps_no_weights_alive():
    model = nn.Sequential(nn.Linear(4, 4))
    weight = weakref.ref(model[0].weight)
    report = fxopt.plan(model, inputs=(torch.zeros(2, 4),))
    del model
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None and report.graphs[0].nodes_before > 1
