"""TORCH_TRACE artifacts, equal bytes in separate processes, a plan of 32 layers in the browser, errors in each pass."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import fxopt
from fxopt import LayerSkip
from fxopt.codegen import roofline
from fxopt.inspection import views
from fxopt.inspection.numerics import numerics
from fxopt.inspection.work import least_seconds, work
from fxopt.passes import order
from fxopt.passes.technique import Technique
from fxopt.planning import decode_inputs
from fxopt.testing import TINY

PROGRAM = """
import sys, torch, fxopt
from fxopt.codegen import compat
from fxopt.testing import TINY
compat.compile_with_inductor = lambda gm, inputs, mode, patches: gm.forward
model = fxopt.compile(TINY["handwritten"](), fxopt.LayerSkip(skip=(1,)))
with torch.no_grad():
    model(torch.tensor([[5, 17, 3, 99]]))
fxopt.report(model).to_json(sys.argv[1], times=False)
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """The reports of two processes that did the same, and the trace folder of the first."""
    folder, written = tmp_path_factory.mktemp("traced"), []
    for turn in "ab":
        env = {**os.environ, "TORCH_TRACE": str(folder / f"trace{turn}"), "PYTHONHASHSEED": str(ord(turn))}
        path = folder / f"{turn}.json"
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path)], check=True, env=env, capture_output=True, timeout=600
        )
        written.append(path.read_bytes())
    return written, folder / "tracea"


def test_equal_input_in_two_processes_gives_equal_bytes_and_a_trace(traced):
    written, trace = traced
    assert written[0] == written[1] and len(written[0]) > 10_000
    (log,) = trace.iterdir()
    lines = log.read_text().splitlines()
    entry = next(i for i, line in enumerate(lines) if '"artifact"' in line and '"fxopt_record"' in line)
    header = json.loads(lines[entry].split("] ", 1)[1])
    assert header["artifact"] == {"name": "fxopt_record", "encoding": "json"} and "frame_id" in header
    assert "layer_skip" in lines[entry + 1]


def test_tlparse_lists_our_artifact(traced, tmp_path):
    if shutil.which("tlparse") is None:
        pytest.skip("no tlparse here: pip install tlparse")
    (log,) = traced[1].iterdir()
    subprocess.run(["tlparse", str(log), "-o", str(tmp_path / "out"), "--no-browser"], check=True, timeout=600)
    (kept,) = (tmp_path / "out").rglob("fxopt_record*.json")
    assert kept.name in (tmp_path / "out" / "index.html").read_text()
    assert json.loads(kept.read_text())["model"] == "Handwritten"


def test_a_plan_of_32_layers_opens_within_two_seconds(browser, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                                      num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    report = fxopt.plan(model, LayerSkip(skip=(7, 20)), target="h200")
    path = report.to_html(tmp_path / "r.html")
    assert report.graphs[0].nodes_before > 1500 and path.stat().st_size < 3_000_000
    browser.call("Performance.enable", timeDomain="threadTicks")
    before = browser.metric("TaskDuration")
    browser.open(path)
    assert browser.metric("TaskDuration") - before < 2
    browser.call("Performance.disable")
    assert "×32, 2 differ: 7, 20" in browser.js("document.querySelector('figcaption').textContent")


@pytest.mark.filterwarnings("ignore:fxopt")
@pytest.mark.parametrize("name", [n for n in order.names() if Technique.registry[n].level == "torch"])
def test_an_error_in_any_pass_is_bisected_to_it(name, monkeypatch):
    """The pass does its work, and then the embedding is scaled: only that pass may be named."""
    cls = Technique.registry[name]
    rewrite = cls.rewrite

    def wrong(self, graph, context):
        rewrite(self, graph, context)
        node = next(n for n in graph.nodes if n.target is torch.nn.functional.embedding)
        new = context.rewriter.call(torch.mul, (node, 1.01), like=node, after=node, name="planted")
        context.rewriter.replace(node, new, only=lambda user: user is not new)
        context.applied(node, "planted")

    monkeypatch.setattr(cls, "rewrite", wrong)
    asked = {"layer_skip": (LayerSkip(skip=(1,)),), "early_exit": (fxopt.EarlyExit(layers=(2,)),),
             "sparse_attention": (fxopt.SparseAttention(sinks=1, window=4),),
             "async_softmax": (fxopt.AsyncSoftmax(phi=0.0),)}.get(name, ())  # fmt: skip
    model = TINY["handwritten"]()
    if name == "mixture_of_depths":
        model = fxopt.MixtureOfDepths(capacity=0.5, every=2)(model)
    numbers = numerics(model, (torch.arange(1, 13)[None],), *asked, compiled=False)
    stages = {s.name: s for s in numbers.stages}
    if name not in stages:
        pytest.skip(f"{name} does not run on this model by itself")
    assert numbers.first == name and numbers.culprit is not None and "planted" in numbers.culprit.made
    assert dataclasses.asdict(numbers.culprit)["source"]


def test_a_plan_has_kernels_for_its_target_and_the_work_of_each_component():
    pytest.importorskip("triton")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=1024, num_hidden_layers=2, num_attention_heads=8,
                                      num_key_value_heads=2, intermediate_size=2048, vocab_size=512)  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    step = decode_inputs(model, cache=1024)
    report = fxopt.plan(model, fxopt.AsyncSoftmax(), inputs=step, target="h200")
    assert report.count("flat_gemm") == 15 and report.count("async_softmax") == 2 == report.count("cache_extent")
    assert sorted(k.family for k in report.kernels) == ["attention"] + ["gemv"] * 5
    for kernel in report.kernels:
        assert kernel.resources["target"] == "sm_90" and "@triton.jit" in kernel.source
        assert any(key.endswith("registers") and value > 0 for key, value in kernel.resources.items())
        assert any(key.endswith("assembly") and ".target sm_90" in value for key, value in kernel.resources.items())
    gemvs, attention = report.kernels[0], next(k for k in report.kernels if k.family == "attention")
    assert gemvs.modules[:3] == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "kqv")
    assert gemvs.resources["decided by"] == "roofline model"
    assert attention.modules == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert attention.resources["async_split registers"] > 0 and attention.resources["recompute_split spills"] == 0
    assert "for model.layers.*.self_attn x2" in views.kernels(report).text(100)
    found = work(report.graphs[0], report.environment)
    rows = {row[0]: row for row in found["rows"]}
    assert found["device"] == "H200"
    _, places, flops, moved, seconds, bound = rows["model.layers.*.mlp.down_proj"]
    assert (places, flops) == (2, 2 * 2.0 * 1024 * 2048) and bound == "memory"
    # weights, input, residual and output of each, and the residual is read once
    assert moved == 2 * 2 * (1024 * 2048 + 2048 + 2 * 1024) and seconds == pytest.approx(moved / 4.8e12)
    _, places, flops, moved, _, _ = rows["model.layers.*.self_attn"]
    heads, kv, positions, width = 8, 2, 1024, 128
    assert (places, flops) == (2, 2 * 4.0 * heads * width * positions)
    assert moved == pytest.approx(2 * 2 * (2 * kv * positions * width + 2 * heads * width), rel=0.01)
    least = least_seconds(report.graphs[0], report.environment)
    captured, packed = least[0], least[[s.name for s in report.passes].index("gqa_packing")]
    # The captured graph reads keys and values of every query head, the packed one those of every KV head.
    assert captured - packed == pytest.approx(2 * 2 * 2 * (heads - kv) * positions * width / 4.8e12, rel=0.01)


def test_a_graph_on_a_gpu_records_its_kernels_as_its_plan_does(eager_lowering, monkeypatch):
    """A CPU counts as the GPU: what is recorded comes from the rewritten graph, also the attention's kernels."""
    pytest.importorskip("triton")
    model = TINY["llama"]().to(torch.bfloat16)
    step = decode_inputs(model, cache=64)
    planned = fxopt.plan(model, fxopt.AsyncSoftmax(), inputs=step, target="h200")
    monkeypatch.setattr("fxopt.codegen.lowering.KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr("fxopt.codegen.roofline.current_device", lambda device=None: roofline.DEVICES["H200"])
    fxopt.compile(model, fxopt.AsyncSoftmax())
    with torch.no_grad(), pytest.raises(RuntimeError, match="needs a GPU"):  # compiled, and then there is none
        model(**step)
    done = fxopt.report(model)
    told = {k.name: (k.family, k.modules, k.source) for k in done.kernels}
    assert told == {k.name: (k.family, k.modules, k.source) for k in planned.kernels} and "attention" in str(told)
    assert done.count("async_softmax") == planned.count("async_softmax") == 3


def test_a_plan_for_a_target_does_not_depend_on_where_the_model_is():
    model = TINY["handwritten"]()
    reports = [fxopt.plan(model.to(d), inputs=(torch.zeros(1, 1, dtype=torch.long),), target="l4")
               for d in ("cpu", "meta")]  # fmt: skip
    for report in reports:
        for remark in (r for r in report.graphs[0].remarks if r.status != "analysis"):
            assert remark.code != "FX207", remark  # nothing is refused for the device that the model happens to be on
        report.graphs[0].compile_id = "-"
    assert [r.graphs[0].remarks for r in reports[:1]] == [r.graphs[0].remarks for r in reports[1:]]
    assert [k.source for k in reports[0].kernels] == [k.source for k in reports[1].kernels] != []
    assert "no cross-compiler knows L4" in reports[0].graphs[0].remarks[-1].message
