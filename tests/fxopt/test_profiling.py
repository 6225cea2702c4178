"""Measured times: whose they are, that they are kept and shown, and that nothing is measured unasked."""

from __future__ import annotations

import json

import pytest
import torch

import fxopt
from fxopt import profiling
from fxopt.inspection import views
from fxopt.inspection.work import measured
from fxopt.passes.record import Measured
from fxopt.testing import TINY

from .conftest import profile_of

IDS = torch.tensor([[5, 17, 3, 99, 42, 8, 61]])


def test_a_call_is_placed_by_its_turn_and_added_up_where_turns_do_not_tell():
    computed = {"extern_kernels.mm:1": [3], "cpp_fused_add_0:2": [4, 5], "extern_kernels.mm:3": [7]}
    events = [("aten::mm", 1.0), ("graph_0_cpp_fused_add_0", 0.25), ("aten::mm", 2.0), ("aten::item", 0.5)]
    found = profiling.placed(events, computed)
    assert found == {("mm", (3,)): 1.0, ("mm", (7,)): 2.0, ("cpp_fused_add_0", (4, 5)): 0.25, ("item", ()): 0.5}
    # one of the two was in the branch that was not taken
    assert profiling.placed(events[:1], computed) == {("mm", (3, 7)): 1.0}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:10",
         "_scaled_dot_product_flash_attention_for_cpu"),
        ("fxopt::decode_attention", "decode_attention"),
        ("torch.ops.fxopt.decode_attention.default:2", "decode_attention"),
        ("triton_poi_fused_add_0", "triton_poi_fused_add_0"),
    ],
)  # fmt: skip
def test_both_sides_say_a_name_alike(given, name):
    assert profiling.short_name(given) == name


def test_kernels_of_a_compiled_model_have_times_nodes_and_modules(tmp_path):
    model = fxopt.compile(TINY["handwritten"](), fxopt.LayerSkip(skip=(1,)))
    with torch.no_grad(), profiling.measuring():
        wanted = [model(IDS) for _ in range(4)][-1]
    report = fxopt.report(model)
    (graph,) = report.graphs
    assert graph.profile is not None and graph.profile.calls == 2  # of four, the first two do not count
    linears = {row.id for row in graph.rows(len(graph.stages) - 1) if row.target == "linear"}
    products = [k for k in graph.profile.kernels if k.name in ("mm", "addmm", "_linear_pointwise")]
    assert {n for k in products for n in k.nodes} >= linears and len(products) == len(linears) == 9
    assert any(k.modules == ("layers.2.up",) for k in products) and not any("layers.1" in str(k) for k in products)
    fused = [k for k in graph.profile.kernels if k.name.startswith("cpp_fused")]
    assert fused and all(k.nodes and k.modules for k in fused)
    assert all(k.seconds > 0 for k in graph.profile.kernels)
    assert sum(k.seconds for k in graph.profile.kernels) <= graph.profile.seconds
    (up,) = [r for r in measured(graph, report.environment)["rows"] if r[2][:1] == ["layers.*.up"] and r[5]]
    assert up[1] == 2 and up[5] == 2 * 2.0 * 7 * 64 * 128
    # kept, and the same again; what nobody asked for is not measured, and is the same function
    again = views.load(report.to_json(tmp_path / "r.json"))
    assert again.graphs[0].profile == graph.profile
    torch._dynamo.reset()
    plain = fxopt.compile(TINY["handwritten"](), fxopt.LayerSkip(skip=(1,)))
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS), wanted)
    assert fxopt.report(plain).graphs[0].profile is None


def test_nothing_is_wrapped_unasked_and_only_some_calls_are_measured(eager_lowering, monkeypatch):
    seen = []
    monkeypatch.setattr("fxopt.codegen.compat.compile_with_provenance", lambda gm, i, m, p, keep: gm.forward)
    monkeypatch.setattr("fxopt.codegen.compat.profiled", lambda f, inputs: seen.append(1) or (f(*inputs), 1.0, []))
    model = TINY["handwritten"]()
    with torch.no_grad():
        fxopt.compile(model)(IDS)
        assert not seen
        with profiling.measuring():
            fxopt.compile(model, disable=("flat_gemm",))
            for _ in range(profiling.CALLS + 3):
                model(IDS)
    assert len(seen) == profiling.CALLS
    assert fxopt.report(model).graphs[-1].profile.calls == profiling.CALLS - profiling.WARM


def test_times_are_shown_and_left_out_of_reproducible_files(made_up, tmp_path):
    report = made_up(layers=6)
    report.graphs[0].profile = profile_of(report.graphs[0])
    text = " ".join(views.kernels(report).text(100).split())
    assert "medians of 8 calls under the profiler" in text and "model.layers.*.mlp.down_proj" in text
    assert views.kernels(report).to_dict()["measured"][0]["calls"] == 8
    first = report.to_json(tmp_path / "a.json", times=False).read_bytes()
    kernels = report.graphs[0].profile.kernels
    kernels[:] = [Measured(k.name, k.nodes, k.modules, 2 * k.seconds) for k in kernels]
    assert report.to_json(tmp_path / "b.json", times=False).read_bytes() == first


def test_a_damaged_profile_is_one_clear_error(made_up, tmp_path):
    report = made_up(layers=2)
    report.graphs[0].profile = profile_of(report.graphs[0])
    data = report.to_dict()
    data["graphs"][0]["profile"]["kernels"][0]["seconds"] = "<script>"
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="damaged.*seconds"):
        views.load(tmp_path / "r.json")


def test_the_page_shows_measured_times_and_leads_to_the_node(made_up, browser, tmp_path):
    report = made_up(layers=32)
    report.environment["device"] = "NVIDIA H200"
    report.graphs[0].profile = profile_of(report.graphs[0])
    browser.open(report.to_html(tmp_path / "r.html"), "g0.measured")
    assert browser.js("document.getElementById('card').hidden")
    block = "document.getElementById('g0.measured')"
    text = browser.js(f"{block}.textContent")
    assert "medians of 8 calls" in text and "model.layers.*.mlp.down_proj" in text and "times the least" in text
    assert browser.js(f"{block}.querySelectorAll('tr').length") == 5  # 32 layers are one row for each kernel
    assert browser.js(f"{block}.querySelector('tr').textContent").startswith("attention")
    browser.js(f"{block}.querySelector('tr a').click()")
    browser.wait("!document.getElementById('card').hidden")
    assert "Measured in" in browser.js("document.getElementById('card').textContent")
    assert browser.complaints() == []
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")
